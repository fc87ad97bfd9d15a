"""A planned piece that needs the base weight, as it bears on one module of the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.based import Based, based_delta, is_based
from qwenlora.delta.factors import Factors
from qwenlora.delta.finite import is_finite
from qwenlora.delta.pieces import is_zero
from qwenlora.delta.replaced import is_replacement, replaced_rows
from qwenlora.delta.strength import factor_at
from qwenlora.merge.changed import changed_rows
from qwenlora.merge.member import has_full_rank
from qwenlora.plan.documents import PieceKind
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.adapters.weight import Weight
    from qwenlora.plan.documents import Piece, Side

__all__ = ["BasedDelta", "BasedMember", "needs_base"]


def needs_base(piece: Piece) -> bool:
    """Tell if a piece's delta is made of the base's values."""
    return is_based(piece) or is_replacement(piece)


class _Base:
    """What is known of a slot's weight, as adapters ask for it."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    def norms(self, module: str, side: Side, *, length: int) -> Tensor | None:
        """None: a weight that was not quantized has its own, which are exact."""
        return None


class BasedDelta:
    """The delta of one piece, of which several modules may have rows."""

    def __init__(self, piece: Piece, tensors: Mapping[str, Tensor], weight: Weight) -> None:
        """Take what it is made of; it is made when it is first asked for.

        Args:
            piece: One for which `needs_base` is true, and whose delta is a weight's.
            tensors: Its tensors by role.
            weight: The weight of its slot.
        """
        # A merge cuts the sum alone, if anything.
        self.piece = replace(piece, rank_budget=None)
        self.tensors = tensors
        self._weight = weight

    @cached_property
    def made(self) -> Based:
        """The parts of an adapter's delta."""
        return based_delta(self.piece, self.tensors, _Base(self._weight))

    @cached_property
    def _replaced(self) -> Tensor:
        return replaced_rows(self.piece, self.tensors, self._weight)

    @property
    def is_pair(self) -> bool:
        """True where it is a pair; others have full rank."""
        return self.piece.kind is PieceKind.LOW_RANK

    @property
    def is_zero(self) -> bool:
        """True where W' is W."""
        if is_replacement(self.piece):
            return not bool(self._replaced.any())
        made = self.made
        return (
            (made.pair is None or is_zero(made.pair.up, made.pair.down))
            and (made.kron is None or is_zero(made.kron.w1, made.kron.w2))
            and (made.diagonal is None or made.diagonal.zero)
            and (made.rotation is None or made.rotation.zero)
        )

    def rows(self, begin: int, count: int) -> Tensor:
        """(count, K) float32: some of the slot's rows, the piece's scale included."""
        if is_replacement(self.piece):
            own = begin - self.piece.row_begin
            return self._replaced[own : own + count]
        return changed_rows(
            self.made,
            self._weight,
            (begin, count),
            begin=self.piece.row_begin,
            scale=self.piece.scale,
        )


@dataclass(frozen=True)
class BasedMember:
    """A delta that is made of the base weight, too.

    Attributes:
        delta: The delta.
        strength: Of the LoRA.
        row_begin: First of the piece's rows that is the module's.
        row_count: How many of them there are.
    """

    delta: BasedDelta
    strength: float
    row_begin: int
    row_count: int

    @property
    def piece(self) -> Piece:
        """What is planned."""
        return self.delta.piece

    @property
    def factor(self) -> float:
        """The factor on `factors` or on `dense`: a matrix has the piece's scale in it."""
        return factor_at(self.piece.scale if self.delta.is_pair else 1.0, self.strength)

    @property
    def is_stored(self) -> bool:
        """False: no file stores its pair."""
        return False

    @property
    def is_spectral(self) -> bool:
        """False: its best truncation takes the delta itself."""
        return False

    @property
    def is_zero(self) -> bool:
        """True where W' is W."""
        return self.delta.is_zero

    @property
    def is_thirded(self) -> bool:
        """False: no converter stacks adapters of this kind."""
        return False

    @property
    def is_finite(self) -> bool:
        """True where no tensor holds NaN or infinity."""
        return all(map(is_finite, self.delta.tensors.values()))

    def has_full_rank(self, side: int) -> bool:
        """Tell if it has full rank, given its matrix's smaller side."""
        return has_full_rank(self.piece, side)

    def factors(self) -> Factors:
        """The exact pair of the module's rows, without `factor`."""
        pair = self.delta.made.pair
        if pair is None:
            raise TypeError(f"{self.piece.adapter} is no pair")
        rows = slice(self.row_begin, self.row_begin + self.row_count)
        return Factors(down=pair.down, up=pair.up[rows])

    def truncated(self, rank: int) -> Factors:
        """Never called: it is not spectral."""
        raise TypeError(
            f"{self.piece.adapter} is not cut to {counted(rank, 'rank')} by its tensors"
        )

    def dense(self) -> Tensor:
        """The module's rows (out, in) of the delta, float32, without `factor`."""
        if self.delta.is_pair:
            pair = self.factors()
            return pair.up.to(torch.float32) @ pair.down.to(torch.float32)
        return self.delta.rows(self.piece.row_begin + self.row_begin, self.row_count)
