"""Norms of weights that are kept while their layers live, and a number for each weight's state.

What is derived from a weight holds for its values alone. A layer's tensors are known by being the
same objects that were written to as often. Not every writer is counted: tensors made in inference
mode count nothing, and neither does who writes past autograd. So sums of a sample of the values
must be the same, too.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from qwenlora import cache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["KeptNorms", "NormsShelf", "shelf"]

_LIMIT_BYTES = 64 << 20
"""Bytes of norms of all models: those of all of Qwen-Image's rows and columns take 34 MB."""
_SAMPLE = 4096
"""Values of a tensor that are summed to tell it."""

_Key: TypeAlias = tuple[str, int, int]
"""Which axis, the first row, how many."""


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was when something was derived from it."""

    tensor: weakref.ref[Tensor]
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        return cls(weakref.ref(tensor), _version(tensor))

    def is_same(self, tensor: Tensor) -> bool:
        """Tell if it is that tensor still, written to as often."""
        return self.tensor() is tensor and self.version == _version(tensor)


@dataclass
class KeptNorms:
    """What is kept of one weight.

    Attributes:
        number: Another one for every weight, and for every change of its values.
        seen: The tensors that it is made of.
        sums: Of a sample of their values.
        norms: (n,) float32 on the host, squared, by what they are of.
    """

    number: int
    seen: Sequence[_Seen]
    sums: Sequence[float]
    norms: dict[_Key, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(own.nbytes for own in list(self.norms.values()))


class NormsShelf:
    """The norms of all models' weights, by layer; a layer that is let go takes its own along."""

    def __init__(self) -> None:
        self._by_layer: weakref.WeakKeyDictionary[nn.Module, dict[str, KeptNorms]]
        self._by_layer = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def of(self, layer: nn.Module, prefix: str, tensors: Sequence[Tensor]) -> KeptNorms:
        """What is kept of a weight; anew where its values may differ from what was seen.

        Args:
            layer: The module that holds it.
            prefix: Tells several weights of one module apart.
            tensors: What it is made of, as the module holds them.
        """
        sums = _sums(tensors)
        with self._lock:
            kept = self._by_layer.get(layer, {}).get(prefix)
            if kept is not None and kept.sums == sums and _are_same(kept.seen, tensors):
                return kept
            kept = KeptNorms(next(self._numbers), [_Seen.of(own) for own in tensors], sums)
            self._by_layer.setdefault(layer, {})[prefix] = kept
            return kept

    def norms(
        self, kept: KeptNorms, key: _Key, device: torch.device, compute: Callable[[], Tensor]
    ) -> Tensor:
        """Norms that are kept, or are computed and kept then.

        Args:
            kept: What is kept of the weight.
            key: What they are of.
            device: Where they are given.
            compute: Computes them, squared.

        Returns:
            (n,) float64: what float32 holds of them.
        """
        own = kept.norms.get(key)
        if own is None:
            own = compute().float().cpu()
            if self.nbytes(on_host=True) + own.nbytes <= _LIMIT_BYTES:
                kept.norms[key] = own
        return own.to(device).double()

    def nbytes(self, *, on_host: bool) -> int:
        """Bytes held; all of it is on the host."""
        if not on_host:
            return 0
        with self._lock:
            layers = list(self._by_layer.values())
        return sum(kept.nbytes for own in layers for kept in list(own.values()))

    def clear_devices(self) -> None:
        """Nothing is on devices."""

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._by_layer.clear()


shelf = NormsShelf()
"""Those of this process."""
cache.register(shelf)


def _version(tensor: Tensor) -> int | None:
    """How often it was written to; None for one made in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def _are_same(seen: Sequence[_Seen], tensors: Sequence[Tensor]) -> bool:
    return len(seen) == len(tensors) and all(map(_Seen.is_same, seen, tensors))


def _sums(tensors: Sequence[Tensor]) -> Sequence[float]:
    """For each tensor the sum of a sample of its values, each times its place; one wait in all."""
    found = []
    for tensor in tensors:
        values = tensor.detach().reshape(-1)
        chosen = values[:: max(values.numel() // _SAMPLE, 1)].double().nan_to_num()
        places = torch.arange(1, len(chosen) + 1, dtype=torch.float64, device=chosen.device)
        found.append(chosen @ places)
    sums: list[float] = torch.stack(found).tolist() if found else []
    return sums
