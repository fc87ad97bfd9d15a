"""Deltas of stored values: biases, norms' weights and embedding tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora.delta.adapters.adapter import unknown_adapter
from qwenlora.plan.documents import PieceKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.plan.documents import Piece

__all__ = ["ValueDelta", "value_of"]


@dataclass(frozen=True)
class ValueDelta:
    """The values that are added to one parameter at strength 1.

    Attributes:
        parameter: Its name in the layer: "bias" or "weight".
        delta: Float64, scale included, in the parameter's shape, rows as in files.
    """

    parameter: str
    delta: Tensor


def value_of(piece: Piece, tensors: Mapping[str, Tensor], out_features: int) -> ValueDelta:
    """Bring a stored delta to the shape of the parameter that it changes.

    Args:
        piece: A vector, or a delta of an embedding.
        tensors: Its tensors by role.
        out_features: The layer's rows, of which a fused layer's piece has a part.

    Raises:
        UnsupportedAdapterError: Nothing makes the delta of a table from the piece's adapter.
    """
    if piece.kind is not PieceKind.VECTOR:
        return ValueDelta("weight", _table(piece.adapter, tensors) * piece.scale)
    values = tensors["vector"].flatten().double() * piece.scale
    if piece.parameter == "weight":
        return ValueDelta("weight", values)
    whole = values.new_zeros(out_features)
    whole[piece.row_begin : piece.row_begin + piece.row_count] = values
    return ValueDelta("bias", whole)


def _table(adapter: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The delta (entries, dim) of an embedding's table."""
    if adapter == "full":
        return tensors["diff"].double()
    if adapter != "lora":
        raise unknown_adapter(adapter, "an embedding's table")
    if "down_t" in tensors:
        # (entries, r) @ (r, dim)
        return tensors["down_t"].double() @ tensors["up_t"].double()
    # ((dim, r) @ (r, entries)) -> (entries, dim)
    return (tensors["up"].double() @ tensors["down"].double()).mT.contiguous()
