"""A safetensors file, tensor by tensor: the header's room is kept free and filled in at the end.

Ranks may follow from the data, so the header is not known before the last tensor is written; its
greatest length is. What it needs less is spaces behind it, as the format allows.
"""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING, Any

import torch

from qwenlora.merge.output import writing
from qwenlora.packing.layout import round_up
from qwenlora.source.dtypes import NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["SafetensorsWriter", "TensorShape"]

TensorShape = tuple[str, torch.dtype, tuple[int, ...]]
"""Key, dtype and shape of a tensor."""

_ALIGNMENT = 8
"""The data begins at a multiple of this."""


class SafetensorsWriter:
    """Writes one file, front to back."""

    def __init__(
        self,
        file: IO[bytes],
        path: Path,
        bounds: Iterable[TensorShape],
        metadata: Mapping[str, str],
    ) -> None:
        """Leave room for the header.

        Args:
            file: Opened for writing, empty.
            path: What errors call it.
            bounds: All tensors that may be added, in their order, none smaller than it will be.
            metadata: No entry shorter than it will be.

        Raises:
            OutputError: The file cannot be written.
        """
        self._file = file
        self._path = path
        self._rows: dict[str, Any] = {}
        self._end = 0
        greatest, end = {}, 0
        for key, dtype, shape in bounds:
            greatest[key], end = _row(dtype, shape, end)
        self._room = round_up(len(_header(greatest, metadata)), _ALIGNMENT)
        self._write(bytes(_ALIGNMENT + self._room))

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return _ALIGNMENT + self._room + self._end

    def add(self, key: str, tensor: Tensor) -> None:
        """Write a tensor behind the others.

        Raises:
            OutputError: The file cannot be written.
        """
        self._rows[key], self._end = _row(tensor.dtype, tuple(tensor.shape), self._end)
        data = tensor.contiguous().flatten().view(torch.uint8)
        self._write(data.numpy().data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header.

        Raises:
            OutputError: The file cannot be written.
        """
        header = _header(self._rows, metadata)
        if len(header) > self._room:
            raise ValueError(f"the header takes {len(header)} bytes of {self._room}")
        with writing(self._path):
            self._file.seek(0)
        self._write(self._room.to_bytes(_ALIGNMENT, "little"))
        self._write(header.ljust(self._room))

    def _write(self, data: bytes | memoryview) -> None:
        with writing(self._path):
            self._file.write(data)


def _row(dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> tuple[dict[str, Any], int]:
    """A tensor's entry in the header, and where its bytes end."""
    count = 1
    for side in shape:
        count *= side
    end = begin + count * dtype.itemsize
    row = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return row, end


def _header(rows: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    document = {"__metadata__": dict(metadata), **rows}
    return json.dumps(document, separators=(",", ":")).encode()
