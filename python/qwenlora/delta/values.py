"""Deltas of stored values: biases, norms' weights and embedding tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora.packing.layout import RowOrder
from qwenlora.packing.pack import interleave_modulation, pack_vector
from qwenlora.plan.documents import SlotKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.plan.documents import Piece, SlotPlan

__all__ = ["ValueDelta", "value_of"]


@dataclass(frozen=True)
class ValueDelta:
    """What is added to one parameter at strength 1.

    Attributes:
        parameter: Its name in the layer: "bias" or "weight".
        delta: Float64, scale included, in the parameter's shape and storage order.
    """

    parameter: str
    delta: Tensor


def value_of(
    piece: Piece, tensors: Mapping[str, Tensor], slot: SlotPlan, out_features: int = 0
) -> ValueDelta:
    """Bring a stored delta to the order in which the layer stores the values.

    SVDQ biases lie in packed vector order, those of AWQ modulations interleaved; norms, plain
    linears and tables as in every file.

    Args:
        piece: A vector, or a delta of an embedding.
        tensors: Its tensors by role.
        slot: The slot's plan.
        out_features: The layer's rows, of which a fused layer's piece has a part.
    """
    if slot.kind is SlotKind.EMBEDDING:
        return ValueDelta("weight", _table(tensors) * piece.scale)
    values = tensors["vector"].flatten().double() * piece.scale
    if slot.kind is SlotKind.NORM:
        return ValueDelta("weight", values)
    whole = values.new_zeros(out_features)
    whole[piece.row_begin : piece.row_begin + piece.row_count] = values
    if slot.kind is SlotKind.SVDQ:
        whole = pack_vector(whole)
    elif slot.row_order is RowOrder.INTERLEAVED:
        whole = interleave_modulation(whole)
    return ValueDelta("bias", whole)


def _table(tensors: Mapping[str, Tensor]) -> Tensor:
    """The delta (entries, dim) of an embedding's table."""
    if "diff" in tensors:
        return tensors["diff"].double()
    if "down_t" in tensors:
        # (entries, r) @ (r, dim)
        return tensors["down_t"].double() @ tensors["up_t"].double()
    # ((dim, r) @ (r, entries)) -> (entries, dim)
    return (tensors["up"].double() @ tensors["down"].double()).mT.contiguous()
