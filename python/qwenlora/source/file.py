"""The two sources of tensors: a file read by Rust, or a state dict in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.errors import LoraReadError
from qwenlora.packing.layout import round_up
from qwenlora.source.dtypes import DTYPES, NAMES
from qwenlora.source.read_ahead import files
from qwenlora.work.threads import fillers_for

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence
    from pathlib import Path

    from qwenlora.plan.documents import TensorRef
    from qwenlora.source.source import Run, TensorFetcher
    from qwenlora.work.workers import Readers, Reading

__all__ = ["FileSource"]


_ALIGNMENT = 64
"""Tensors begin at multiples of this in a buffer: any dtype can be viewed there."""


class FileSource:
    """A safetensors file or a PEFT folder."""

    cacheable = True

    def __init__(self, path: Path, plan: _core.FilePlan, *, threads: int | None) -> None:
        self.path = path
        self._threads = fillers_for(threads)
        self._plan = plan

    @property
    def plan(self) -> _core.FilePlan:
        """The file's plan."""
        return self._plan

    @property
    def identity(self) -> Hashable:
        """Path and identity of the file that was planned."""
        return (str(self.path), self._plan.identity)

    @property
    def nbytes(self) -> int:
        """Size of the file that was planned."""
        return 0 if self._plan.identity is None else self._plan.identity[0][0]

    def read_ahead(self) -> None:
        """Begin to bring the file into the system's memory, in the background."""
        files.add(self.path)

    def open(self) -> TensorFetcher:
        """Open the file that was planned.

        Raises:
            LoraReadError: It is another file by now.
        """
        files.cancel(self.path)
        reader = _core.TensorReader(self.path)
        planned = self._plan.identity
        if planned is not None and reader.identity[0] != planned[0]:
            reader.close()
            raise LoraReadError(
                f"`{self.path}` changed after it was planned"
                "\nhint: compose again when it is written"
            )
        return _FileFetcher(reader, threads=self._threads)


class _FileFetcher:
    def __init__(self, reader: _core.TensorReader, *, threads: int) -> None:
        self._reader = reader
        self._threads = threads

    def fetch(self, refs: Sequence[TensorRef]) -> list[torch.Tensor]:
        """Read into one buffer and return views of it."""
        offsets, end = [], 0
        for ref in refs:
            offsets.append(end)
            end = round_up(end + ref.len_bytes, _ALIGNMENT)
        buffer = torch.empty(end, dtype=torch.uint8)
        ranges = [
            (ref.offset_bytes, ref.len_bytes, offset)
            for ref, offset in zip(refs, offsets, strict=True)
        ]
        self._reader.read_into(ranges, buffer.numpy(), threads=self._threads)
        return [
            buffer[offset : offset + ref.len_bytes].view(DTYPES[ref.dtype]).view(ref.shape)
            for ref, offset in zip(refs, offsets, strict=True)
        ]

    def read_into(
        self,
        runs: Iterable[Run],
        buffer: torch.Tensor,
        readers: Readers,
        *,
        measure: torch.dtype | None,
    ) -> Reading:
        """Begin to read tensors into a buffer."""
        own = [(run.offsets, run.nbytes, run.begin) for run in runs]
        dtype = None if measure is None else NAMES[measure]
        return readers.read(self._reader, own, buffer.numpy(), measure=dtype)

    def finish(self) -> None:
        """Check the file's identity again, and close it."""
        self._reader.verify_unchanged()
        self._reader.close()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
