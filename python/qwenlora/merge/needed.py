"""Which planned pieces need the base weight, and which of them have one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenlora.merge.based_member import needs_base
from qwenlora.merge.diffs import is_value
from qwenlora.plan.documents import PieceKind, Skip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qwenlora.merge.base import MergeBase
    from qwenlora.merge.known import KnownSlot
    from qwenlora.plan.documents import Piece, SlotPlan

__all__ = [
    "BASELESS",
    "DIFFS_REASON",
    "VALUE",
    "Needed",
    "base_values",
    "scaled_bias",
    "scales_bias",
    "split_by_base",
]

BASELESS = "base"
"""Kind of a skip: the piece's delta is made of a base weight that is not at hand."""
VALUE = "value"
"""Kind of a skip: a delta of stored values, for which a low-rank file has no place."""
DIFFS_REASON = "a delta of a bias, norm or table, which diffusers refuses in a file (`--diffs`)"
_BIAS_REASON = "its factors on a bias, whose delta diffusers refuses in a file (`--diffs`)"
_TITLES = {
    "dora": "DoRA",
    "ia3": "IA3",
    "glora": "GLoRA",
    "hra": "HRA",
    "oft": "OFT",
    "boft": "BOFT",
    "set": "`set_weight`",
}
"""Names of adapters that need the base weight."""


@dataclass(frozen=True)
class Needed:
    """What of a merge is made of the base.

    Attributes:
        modules: Modules whose deltas are.
        estimated: Those of them whose norms are estimated from a quantized weight.
    """

    modules: tuple[str, ...] = ()
    estimated: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        slots: Sequence[SlotPlan],
        known: Mapping[str, KnownSlot],
        base: MergeBase | None,
        *,
        diffs: bool,
    ) -> Needed:
        """What of planned slots is; with `diffs` deltas of stored values, too."""
        if base is None:
            return cls()
        own = [
            (slot, piece)
            for slot in slots
            for piece in slot.pieces
            if needs_base(piece) and (diffs or not is_value(piece, slot))
        ]
        estimated = [
            piece.target
            for slot, piece in own
            if piece.adapter == "dora" and base.is_quantized(known[slot.path], _rows(piece))
        ]
        modules = (piece.target for _, piece in own)
        return cls(tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(estimated)))


def split_by_base(
    slots: Sequence[SlotPlan],
    known: Mapping[str, KnownSlot],
    base: MergeBase | None,
    *,
    diffs: bool,
) -> tuple[tuple[SlotPlan, ...], list[Skip]]:
    """Leave out, by name, what needs a base weight that is not at hand.

    Args:
        slots: All planned slots.
        known: The model's slots by path.
        base: Where base weights are read; None where there is none.
        diffs: Whether deltas of biases are written.

    Returns:
        The slots that are left, with the pieces that are; and what is not.
    """
    kept: list[SlotPlan] = []
    skipped: list[Skip] = []
    for slot in slots:
        pieces = []
        for piece in slot.pieces:
            reason = _lacks(piece, known[slot.path], base)
            if reason is not None:
                skipped.append(_skip(piece, BASELESS, reason))
                continue
            pieces.append(piece)
            if base is not None and scales_bias(piece) and not diffs:
                if base.has_bias(known[slot.path], _rows(piece)):
                    skipped.append(_skip(piece, VALUE, _BIAS_REASON))
        if pieces:
            kept.append(replace(slot, pieces=tuple(pieces)))
    return tuple(kept), skipped


def scales_bias(piece: Piece) -> bool:
    """Tell if a piece multiplies the layer's bias, too."""
    return piece.scales_bias and piece.kind is PieceKind.DIAGONAL


def scaled_bias(piece: Piece) -> Piece:
    """The delta of the bias that a piece scales, as a piece of its own."""
    return replace(piece, kind=PieceKind.VECTOR, parameter="bias", scale=1.0)


def base_values(slot: SlotPlan) -> list[Piece]:
    """The deltas of biases that a slot's pieces scale."""
    return [scaled_bias(piece) for piece in slot.pieces if scales_bias(piece)]


def _lacks(piece: Piece, slot: KnownSlot, base: MergeBase | None) -> str | None:
    """Why a piece's base weight is not at hand; None where it is, or none is needed."""
    if not needs_base(piece):
        return None
    title = _TITLES.get(piece.adapter, piece.adapter)
    if base is None:
        return f"{title} needs the base weight: `--base CHECKPOINT`"
    problem = base.problem(slot, _rows(piece))
    return None if problem is None else f"{title} needs the base weight: {problem}"


def _skip(piece: Piece, kind: str, reason: str) -> Skip:
    return Skip(piece.lora, piece.target, kind, reason, piece.kind.value, True)


def _rows(piece: Piece) -> tuple[int, int]:
    return piece.row_begin, piece.row_begin + piece.row_count
