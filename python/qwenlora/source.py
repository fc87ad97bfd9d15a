"""Where tensors come from: a file read by Rust, or a state dict in memory."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from qwenlora import _core
from qwenlora.errors import LoraFileError, LoraReadError
from qwenlora.layout import round_up
from qwenlora.read_ahead import files
from qwenlora.threads import fillers_for

if TYPE_CHECKING:
    from qwenlora.plan import TensorRef
    from qwenlora.spec import LoraSpec
    from qwenlora.workers import Readers, Reading

__all__ = [
    "FileSource",
    "LoraSource",
    "Run",
    "StateDictSource",
    "TensorFetcher",
    "known_source",
    "open_source",
]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Torch's dtypes by their safetensors names."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Their safetensors names by torch's dtypes."""

_ALIGNMENT = 64
"""Tensors begin at multiples of this in a buffer: any dtype can be viewed there."""


class Run(NamedTuple):
    """Tensors of one size, and where they go in a buffer, one behind the other.

    Attributes:
        numbers: Which tensors of the source.
        offsets: Their first bytes in the file.
        nbytes: The size of each.
        begin: The first one's first byte in the buffer.
    """

    numbers: Sequence[int]
    offsets: Sequence[int]
    nbytes: int
    begin: int


class TensorFetcher(Protocol):
    """Reads tensors while one composition lasts."""

    def fetch(self, refs: Sequence[TensorRef]) -> list[torch.Tensor]:
        """Return host tensors in the file's dtype and shape, in the order of `refs`."""

    def read_into(
        self,
        runs: Iterable[Run],
        buffer: torch.Tensor,
        readers: Readers,
        *,
        measure: torch.dtype | None,
    ) -> Reading:
        """Begin to read the bytes of tensors into a (n,) uint8 host buffer.

        May be called from several threads at a time, each with a buffer of its own.

        Args:
            runs: The tensors, and where they go.
            buffer: Is filled; bytes between the tensors stay as they are. Nobody may touch it
                before the reading is done.
            readers: Threads that read files.
            measure: The dtype of all these tensors, of which the largest magnitude is wanted, too,
                where it can be had beside reading: float16, bfloat16 or float32.
        """

    def finish(self) -> None:
        """Raise where the source changed since it was opened, and close it."""

    def close(self) -> None:
        """Close without checking; closing twice is allowed."""


class LoraSource(Protocol):
    """One LoRA, planned, whose tensors can be fetched."""

    @property
    def plan(self) -> _core.FilePlan:
        """The file's plan."""

    @property
    def identity(self) -> Hashable:
        """Equal exactly while the contents are the same."""

    @property
    def cacheable(self) -> bool:
        """Whether packed pieces are worth keeping: reading them again costs."""

    @property
    def nbytes(self) -> int:
        """Bytes to read; 0 where all is in memory."""

    def read_ahead(self) -> None:
        """Begin to bring the file into the system's memory, in the background."""

    def open(self) -> TensorFetcher:
        """Begin fetching."""


def open_source(spec: LoraSpec, plans: _PlanCache, *, threads: int | None) -> LoraSource:
    """Plan what a spec names.

    Raises:
        LoraReadError: The file cannot be read.
        LoraFileError: It is not a well-formed safetensors file.
    """
    if isinstance(spec.source, Mapping):
        return StateDictSource(spec.source, spec.title)
    path = Path(spec.source)
    plan = _kept_plan(path, plans)
    if plan is None:
        plan = _core.FilePlan.read(path)
        plans.put(str(path), plan)
    return FileSource(path, plan, threads=threads)


def known_source(spec: LoraSpec, plans: _PlanCache, *, threads: int | None) -> LoraSource | None:
    """The file that a spec names, where its plan is kept; None for what `open_source` must read."""
    if isinstance(spec.source, Mapping):
        return None
    path = Path(spec.source)
    try:
        plan = _kept_plan(path, plans)
    except (LoraReadError, LoraFileError):
        # Whoever opens it says so in its turn.
        return None
    return None if plan is None else FileSource(path, plan, threads=threads)


def _kept_plan(path: Path, plans: _PlanCache) -> _core.FilePlan | None:
    return plans.get(str(path), _core.file_identity(path))


class _PlanCache(Protocol):
    def get(self, path: str, identity: Hashable) -> _core.FilePlan | None: ...

    def put(self, path: str, plan: _core.FilePlan) -> None: ...


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


class StateDictSource:
    """Tensors in memory, under the keys a file would have."""

    cacheable = False
    nbytes = 0

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str) -> None:
        # A copy of the mapping: what was planned is what is fetched.
        self._tensors = dict(tensors)
        rows, scalars = [], []
        for key, tensor in self._tensors.items():
            dtype = _checked_dtype(key, tensor)
            rows.append((key, dtype, list(tensor.shape), tensor.nbytes))
            scalars.append(_scalar(tensor) if tensor.numel() == 1 else None)
        self._plan = _core.FilePlan.from_tensors(name, rows, scalars=scalars, metadata=[])

    @property
    def plan(self) -> _core.FilePlan:
        """The plan of the tensors."""
        return self._plan

    def read_ahead(self) -> None:
        """Nothing to read."""

    @property
    def identity(self) -> Hashable:
        """The tensors themselves and their versions: an in-place change makes another LoRA."""
        return tuple((key, _Same(tensor)) for key, tensor in self._tensors.items())

    def open(self) -> TensorFetcher:
        """Begin fetching."""
        return _StateDictFetcher(self._tensors)


class _Read:
    """A buffer that is filled already, and not measured."""

    def wait(self) -> None:
        """Nothing to wait for."""


class _StateDictFetcher:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def fetch(self, refs: Sequence[TensorRef]) -> list[torch.Tensor]:
        """Bring the tensors to the host."""
        return [self._tensors[ref.key].detach().to("cpu") for ref in refs]

    def read_into(
        self,
        runs: Iterable[Run],
        buffer: torch.Tensor,
        readers: Readers,
        *,
        measure: torch.dtype | None,
    ) -> Reading:
        """Copy tensors into a buffer, at once."""
        keys = list(self._tensors)
        for run in runs:
            begin = run.begin
            for number in run.numbers:
                tensor = self._tensors[keys[number]].detach().to("cpu")
                flat = buffer[begin : begin + run.nbytes].view(tensor.dtype)
                flat.view(tensor.shape).copy_(tensor)
                begin += run.nbytes
        return _Read()

    def finish(self) -> None:
        """Nothing to close."""

    def close(self) -> None:
        """Nothing to close."""


class _Same:
    """Compares a tensor by what it is, not by its values, and does not keep it alive.

    A tensor that is gone equals none: its number may have been given to another.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._id = id(tensor)
        self._tensor = weakref.ref(tensor)
        # Inference tensors do not count their changes: they are never known to be the same.
        self._version = None if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Same)
            and self._tensor() is not None
            and self._tensor() is other._tensor()
            and self._version is not None
            and self._version == other._version
        )

    def __hash__(self) -> int:
        return hash((self._id, self._version))

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process has other tensors: what it loads equals itself alone.
        return (_Gone, ())


class _Gone:
    """A tensor in memory that a saved model knew: it equals no other."""


def _checked_dtype(key: object, tensor: object) -> str:
    """The dtype's name, where the entry is one that can be planned and fetched."""
    if not isinstance(key, str) or not key.isprintable():
        raise LoraFileError(f"a state dict's keys are printable text, not {key!a:.80}")
    if not isinstance(tensor, torch.Tensor):
        raise LoraFileError(f"`{key}` is {type(tensor).__name__}: a state dict holds tensors")
    if tensor.is_meta or tensor.layout is not torch.strided:
        where = "on the meta device" if tensor.is_meta else f"{tensor.layout}"
        raise LoraFileError(f"`{key}` is {where}: a LoRA's tensors are dense and have values")
    try:
        return NAMES[tensor.dtype]
    except KeyError:
        raise LoraFileError(f"`{key}` has dtype {tensor.dtype}, which no LoRA uses") from None


def _scalar(tensor: torch.Tensor) -> float:
    return float(tensor.detach().to("cpu", torch.float64).item())
