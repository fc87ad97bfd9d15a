"""The AWQ linear: int4 weights and no low-rank branch. Deltas run in a side branch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from qwenlora.model.target import PACKED_DTYPES
from qwenlora.packing.layout import RowOrder
from qwenlora.packing.pack import interleave_modulation
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.branch import SideBranchSlot
from qwenlora.slots.kind import LayerFacts, LayerKind
from qwenlora.slots.value import ValueSlot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.model.target import Target
    from qwenlora.slots.kind import Found
    from qwenlora.slots.slot import Slot

__all__ = ["AWQ"]


def _facts(found: Found) -> LayerFacts | None:
    if not found.has_tensors("qweight", "wscales", "wzeros"):
        return None
    module: Any = found.module
    scales = cast("Tensor", found.tensors["wscales"])
    dtype = scales.dtype if scales.dtype in PACKED_DTYPES else torch.bfloat16
    return LayerFacts(dtype, int(module.in_features), int(module.out_features))


def _parts(target: Target) -> Sequence[Slot]:
    is_interleaved = target.row_order is RowOrder.INTERLEAVED
    stored = interleave_modulation if is_interleaved else None
    return [SideBranchSlot(target), ValueSlot(target, stored)]


AWQ = LayerKind(
    kind=SlotKind.AWQ,
    telling="qweight",
    facts=_facts,
    parts=_parts,
    # Layers of this kind that can be planned are modulations, whose rows Nunchaku's blocks
    # interleave.
    row_order=RowOrder.INTERLEAVED,
)
