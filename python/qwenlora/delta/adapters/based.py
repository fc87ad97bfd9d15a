"""Adapters whose delta is made of the base weight: W' - W of a slot's rows, without strength."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qwenlora.delta.adapters import dora
from qwenlora.delta.adapters.adapter import unknown_adapter
from qwenlora.delta.adapters.glora import glora
from qwenlora.delta.adapters.hra import hra
from qwenlora.delta.adapters.ia3 import ia3
from qwenlora.delta.adapters.rotation import boft_of_inputs, oft_of_inputs, rotation_of_rows
from qwenlora.errors import NormsFileError
from qwenlora.plan.documents import PieceKind, Side, SlotKind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from qwenlora.delta.adapters.dora import KronFactors
    from qwenlora.delta.adapters.weight import Weight
    from qwenlora.delta.diagonal import DiagonalDelta
    from qwenlora.delta.factors import Factors
    from qwenlora.delta.rotation import RotationDelta
    from qwenlora.model.target import Target
    from qwenlora.plan.documents import Piece, RotationRule

__all__ = ["Base", "Based", "based_delta", "depends_on_weight", "has_estimated_norms", "is_based"]


class Base(Protocol):
    """What is known of the weight that a slot's layer computes with."""

    @property
    def weight(self) -> Weight:
        """The weight; made when it is first asked for."""

    def norms(self, module: str, side: Side, *, length: int) -> Tensor | None:
        """Exact squared norms (length,) float64 of a module; None where none are known."""


@dataclass(frozen=True)
class Based:
    """The parts of one delta; what it has not is None.

    Attributes:
        pair: A low-rank pair, without the piece's scale.
        kron: A Kronecker product, likewise.
        diagonal: Factors on rows or columns.
        rotation: A rotation of rows or columns.
    """

    pair: Factors | None = None
    kron: KronFactors | None = None
    diagonal: DiagonalDelta | None = None
    rotation: RotationDelta | None = None


def is_based(piece: Piece) -> bool:
    """Tell if a piece's delta is made here."""
    return piece.adapter in _ADAPTERS and piece.kind in _KINDS


def depends_on_weight(piece: Piece) -> bool:
    """Tell if a piece's delta is another one on a model of other weights."""
    return piece.adapter in ("dora", "glora", "hra", "set")


def has_estimated_norms(piece: Piece, target: Target, base: Base) -> bool:
    """Tell if a piece divides by norms of a quantized weight, for want of the 16-bit one's."""
    if piece.adapter != "dora" or target.kind not in (SlotKind.SVDQ, SlotKind.AWQ):
        return False
    return _stored_norms(piece, base) is None


def based_delta(piece: Piece, tensors: Mapping[str, Tensor], base: Base) -> Based:
    """Make the delta of a piece for which `is_based` is true.

    Args:
        piece: What is planned.
        tensors: Its tensors by role.
        base: The weight that its slot's layer computes with.

    Raises:
        NonFiniteError: A value is NaN or infinite, or a norm to divide by is zero.
        UnsupportedAdapterError: Nothing makes it: the plan is of another version.
    """
    return _ADAPTERS[piece.adapter](piece, tensors, base)


def _dora(piece: Piece, tensors: Mapping[str, Tensor], base: Base) -> Based:
    place = dora.Place(piece.target, _side(piece), piece.row_begin, piece.row_count)
    norms = _norms(piece, base)
    is_product = piece.rank == 0
    if is_product:
        made = dora.as_kron(tensors, base.weight, place, scale=piece.scale, norms=norms)
    else:
        made = dora.as_pair(
            tensors,
            base.weight,
            place,
            scale=piece.scale,
            norms=norms,
            budget=piece.rank_budget,
        )
    return Based(pair=made.pair, kron=made.kron, diagonal=made.diagonal)


def _norms(piece: Piece, base: Base) -> Tensor | None:
    """Exact squared norms of the rows or columns that a DoRA divides by; None for none.

    Raises:
        NormsFileError: They are not of the weight that the layer's was quantized from.
    """
    exact = _stored_norms(piece, base)
    if exact is None:
        return None
    at = (piece.row_begin, piece.row_count)
    weight = base.weight
    own = weight.row_norms(*at) if _side(piece) is Side.OUT else weight.column_norms(*at)
    ratio = float(exact.sum() / own.sum())
    if not abs(ratio - 1) < _MOST_DIFFERENCE:
        raise NormsFileError(
            f"the norms of `{piece.target}` are of another checkpoint: squared, they sum up to"
            f" {ratio:.3g} times those of the model's weight"
            "\nhint: make them of the checkpoint that the model was quantized from"
        )
    return exact


def _stored_norms(piece: Piece, base: Base) -> Tensor | None:
    side = _side(piece)
    length = piece.row_count if side is Side.OUT else base.weight.columns
    return base.norms(piece.target, side, length=length)


def _ia3(piece: Piece, tensors: Mapping[str, Tensor], _base: Base) -> Based:
    diagonal = ia3(
        tensors,
        module=piece.target,
        side=_side(piece),
        row_begin=piece.row_begin,
        row_count=piece.row_count,
    )
    return Based(diagonal=diagonal)


def _glora(piece: Piece, tensors: Mapping[str, Tensor], base: Base) -> Based:
    pair = glora(
        tensors,
        base.weight,
        module=piece.target,
        row_begin=piece.row_begin,
        row_count=piece.row_count,
    )
    return Based(pair=pair)


def _hra(piece: Piece, tensors: Mapping[str, Tensor], base: Base) -> Based:
    pair = hra(
        tensors,
        base.weight,
        module=piece.target,
        row_begin=piece.row_begin,
        row_count=piece.row_count,
    )
    return Based(pair=pair)


def _oft(piece: Piece, tensors: Mapping[str, Tensor], base: Base) -> Based:
    rule = _rule(piece)
    if _side(piece) is Side.OUT:
        return Based(rotation=_of_rows(piece, tensors, rule))
    rotation = oft_of_inputs(
        tensors,
        rule,
        module=piece.target,
        columns=base.weight.columns,
        row_begin=piece.row_begin,
        row_count=piece.row_count,
    )
    return Based(rotation=rotation)


def _boft(piece: Piece, tensors: Mapping[str, Tensor], base: Base) -> Based:
    if "boft_r" not in tensors:
        return Based(rotation=_of_rows(piece, tensors, _rule(piece)))
    rotation = boft_of_inputs(
        tensors,
        module=piece.target,
        columns=base.weight.columns,
        row_begin=piece.row_begin,
        row_count=piece.row_count,
    )
    return Based(rotation=rotation)


def _of_rows(piece: Piece, tensors: Mapping[str, Tensor], rule: RotationRule) -> RotationDelta:
    return rotation_of_rows(
        tensors,
        rule,
        module=piece.target,
        row_begin=piece.row_begin,
        row_count=piece.row_count,
    )


def _side(piece: Piece) -> Side:
    if piece.side is None:
        raise unknown_adapter(piece.adapter, "a weight without a side")
    return piece.side


def _rule(piece: Piece) -> RotationRule:
    if piece.rotation is None:
        raise unknown_adapter(piece.adapter, "blocks without a rule")
    return piece.rotation


_ADAPTERS: Mapping[str, Callable[[Piece, Mapping[str, Tensor], Base], Based]] = {
    "dora": _dora,
    "ia3": _ia3,
    "glora": _glora,
    "hra": _hra,
    "oft": _oft,
    "boft": _boft,
}
_MOST_DIFFERENCE = 0.03
"""Of sums of squared norms: quantizing leaves 0.1 %, checkpoints that were trained apart more."""
_KINDS = (PieceKind.LOW_RANK, PieceKind.DIAGONAL, PieceKind.ROTATION)
