"""A norm with a weight. Its stored values change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.model.target import PACKED_DTYPES
from qwenlora.packing.layout import RowOrder
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.kind import LayerFacts, LayerKind
from qwenlora.slots.value import ValueSlot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.model.target import Target
    from qwenlora.slots.kind import Found
    from qwenlora.slots.slot import Slot

__all__ = ["NORM"]


def _facts(found: Found) -> LayerFacts | None:
    weight = found.tensors.get("weight")
    if not isinstance(weight, torch.Tensor) or weight.dtype not in PACKED_DTYPES:
        return None
    if weight.ndim != 1:
        return None
    return LayerFacts(weight.dtype, 1, weight.shape[0])


def _parts(target: Target) -> Sequence[Slot]:
    return [ValueSlot(target)]


NORM = LayerKind(
    kind=SlotKind.NORM,
    telling="weight",
    facts=_facts,
    parts=_parts,
    row_order=RowOrder.PLANAR,
)
