"""Deltas of stored values: what `.diff_b` and `.diff` keys add to biases, norms and tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenlora.delta.adapters.set import set_delta
from qwenlora.delta.adapters.vector import value_of
from qwenlora.delta.scale import scaled_values
from qwenlora.plan.documents import PieceKind, SlotKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from qwenlora.merge.known import KnownSlot
    from qwenlora.plan.documents import Piece, SlotPlan

__all__ = ["Value", "is_value", "replaced_value", "sum_values", "value_keys"]

_SUFFIXES = {"bias": "diff_b", "weight": "diff"}
"""Ends of keys, by the parameter that the delta is added to."""


@dataclass(frozen=True)
class Value:
    """A planned delta of stored values with its tensors and the strength of its LoRA."""

    piece: Piece
    tensors: dict[str, Tensor]
    strength: float


def is_value(piece: Piece, slot: SlotPlan) -> bool:
    """Tell if a piece changes stored values: a low-rank file has no place for it."""
    return piece.kind is PieceKind.VECTOR or slot.kind is SlotKind.EMBEDDING


def replaced_value(
    piece: Piece, tensors: Mapping[str, Tensor], base: Tensor
) -> tuple[Piece, dict[str, Tensor]]:
    """A value that takes the place of the base's as a delta of it: the piece, and its tensors.

    Args:
        piece: Of a norm's weight, or of a table.
        tensors: Its value by role.
        base: The base's.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    delta = set_delta(tensors["set_weight"], base, module=piece.target)
    if piece.kind is PieceKind.VECTOR:
        return replace(piece, scale=1.0), {"vector": delta}
    return replace(piece, adapter="full", scale=1.0), {"diff": delta}


def value_keys(piece: Piece, known: KnownSlot) -> list[tuple[str, tuple[int, ...]]]:
    """The keys that a piece's values are written under, without a prefix, and their shapes."""
    end = piece.row_begin + piece.row_count
    suffix = _SUFFIXES[piece.parameter or "weight"]
    out, columns = known.sides
    shape = (columns, out) if known.row.kind == SlotKind.EMBEDDING.value else (out,)
    return [
        (f"{part}.{suffix}", shape)
        for part, (begin, stop) in known.rows.items()
        if piece.row_begin <= begin and stop <= end
    ]


def sum_values(values: Sequence[Value], known: KnownSlot) -> dict[str, Tensor]:
    """The sums of the LoRAs' values in a slot.

    Args:
        values: Those of all LoRAs, in the order of the stack.
        known: The slot.

    Returns:
        Float64 by key, without a prefix, rows in the order of files.
    """
    sums: dict[str, Tensor] = {}
    for value in values:
        whole = value_of(value.piece, value.tensors, known.row.out_features)
        delta = scaled_values(whole.delta, value.strength)
        for key, _ in value_keys(value.piece, known):
            part, _, _ = key.rpartition(".")
            begin, stop = known.rows[part]
            own = delta if len(known.parts) == 1 else delta[begin:stop]
            sums[key] = own if key not in sums else sums[key] + own
    return sums
