"""A LoRA that is a state dict in memory."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.errors import LoraFileError
from qwenlora.source.dtypes import NAMES
from qwenlora.source.versions import counts_writes

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence
    from typing import Any

    from qwenlora.plan.documents import TensorRef
    from qwenlora.source.source import Run, TensorFetcher
    from qwenlora.work.workers import Readers, Reading

__all__ = ["StateDictSource"]


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
        own = list(self._tensors.values())
        self._plan = _core.FilePlan.from_tensors(
            name,
            rows,
            scalars=scalars,
            metadata=[],
            same=lambda one, other: _are_equal(own[one], own[other]),
        )

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


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare the bytes of two tensors of one dtype and shape."""
    if one is other:
        return True
    values = (own.detach().cpu().contiguous().reshape(-1) for own in (one, other))
    return torch.equal(*(own.view(torch.uint8) for own in values))


class _Read:
    """A buffer that is filled already, and not measured."""

    def wait(self) -> None:
        """Nothing to wait for."""


class _StateDictFetcher:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def fetch(self, refs: Sequence[TensorRef]) -> list[torch.Tensor]:
        """Bring the tensors to the host."""
        return [self._rows(ref).detach().to("cpu") for ref in refs]

    def _rows(self, ref: TensorRef) -> torch.Tensor:
        tensor = self._tensors[ref.key]
        first = ref.first_row
        return tensor if first is None else tensor[first : first + ref.shape[0]]

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
        # One that does not count its changes is never known to be the same.
        self._version = tensor._version if counts_writes(tensor) else None

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
