"""LoRAs out of the patches that ComfyUI's nodes handed over."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch

from qwenlora import LoraSpec
from qwenlora.held import HeldTensors

from .adapters import Patches, tensors_of
from .file_names import file_name

__all__ = ["Call", "loras_of"]


class Call(NamedTuple):
    """Patches that were handed over at once.

    Attributes:
        patches: By the names of the weights.
        strength: A factor on all of them.
    """

    patches: Patches
    strength: float


class _Named(NamedTuple):
    held: HeldTensors
    name: str | None


_held: weakref.WeakValueDictionary[Hashable, HeldTensors] = weakref.WeakValueDictionary()
"""By the identities of tensors, which no others have while these are held."""
_names: weakref.WeakKeyDictionary[HeldTensors, str | None] = weakref.WeakKeyDictionary()


def loras_of(calls: Iterable[Call], unnamed: str) -> list[LoraSpec]:
    """The LoRAs that calls ask for, in their order; those of strength 0 are left out.

    Nodes that give each weight a strength of its own call once for each weight: such calls of one
    strength are one LoRA.

    Args:
        calls: The calls.
        unnamed: What a LoRA is called whose file is not known.
    """
    loras = []
    for strength, patches in _grouped(calls):
        held, name = _held_of(patches)
        loras.append(LoraSpec(held, strength, name or unnamed))
    return loras


def _grouped(calls: Iterable[Call]) -> list[tuple[float, dict[Any, Any]]]:
    """Patches by strength, and by how often that strength met the same weight before."""
    groups: dict[tuple[float, int], dict[Any, Any]] = {}
    turns: Counter[tuple[Any, float]] = Counter()
    for patches, strength in calls:
        if strength == 0:
            continue
        for key, value in patches.items():
            turn = turns[key, strength]
            turns[key, strength] += 1
            groups.setdefault((strength, turn), {})[key] = value
    return [(strength, patches) for (strength, _), patches in groups.items()]


def _held_of(patches: Patches) -> _Named:
    """The tensors of patches: the same object for the same tensors, and the file they are of."""
    tensors = tensors_of(patches)
    mark = tuple(
        (key, value if isinstance(value, float) else id(value)) for key, value in tensors.items()
    )
    held = _held.get(mark)
    if held is None:
        held = _held[mark] = HeldTensors(
            {k: _scalar(v) if isinstance(v, float) else v for k, v in tensors.items()}
        )
        _names[held] = file_name(v for v in tensors.values() if isinstance(v, torch.Tensor))
    return _Named(held, _names[held])


def _scalar(value: float) -> torch.Tensor:
    """A number as a file has it: in float32 where that holds it."""
    single = torch.tensor(value)
    return single if single.item() == value else torch.tensor(value, dtype=torch.float64)
