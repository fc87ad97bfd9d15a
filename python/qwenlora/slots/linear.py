"""A linear with a plain weight. Deltas run in a side branch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.model.target import PACKED_DTYPES
from qwenlora.packing.layout import RowOrder
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.branch import SideBranchSlot
from qwenlora.slots.kind import LayerFacts, LayerKind
from qwenlora.slots.value import ValueSlot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.model.target import Target
    from qwenlora.slots.kind import Found
    from qwenlora.slots.slot import Slot

__all__ = ["LINEAR"]


def _facts(found: Found) -> LayerFacts | None:
    module = found.module
    if not isinstance(module, torch.nn.Linear):
        return None
    # A weight stored below 16 bits is cast by its owner; the branch then runs in bfloat16.
    stored = module.weight.dtype
    dtype = stored if stored in PACKED_DTYPES else torch.bfloat16
    return LayerFacts(dtype, module.in_features, module.out_features)


def _parts(target: Target) -> Sequence[Slot]:
    return [SideBranchSlot(target), ValueSlot(target)]


LINEAR = LayerKind(
    kind=SlotKind.LINEAR,
    telling="weight",
    facts=_facts,
    parts=_parts,
    row_order=RowOrder.PLANAR,
)
