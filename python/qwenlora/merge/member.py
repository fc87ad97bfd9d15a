"""One planned piece as it bears on one module of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from qwenlora.delta.adapters.table import adapter_named
from qwenlora.delta.factors import Factors
from qwenlora.delta.finite import is_finite
from qwenlora.delta.pieces import is_thirded, is_zero
from qwenlora.delta.replaced import is_replacement
from qwenlora.plan.documents import PieceKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.adapters.adapter import Adapter
    from qwenlora.plan.documents import Piece

__all__ = ["Member", "ModuleDelta", "has_full_rank", "is_stored_pair", "rank_bound"]

_HOST = torch.device("cpu")


def is_stored_pair(piece: Piece) -> bool:
    """Tell if the file stores the piece as a pair of factors."""
    return piece.adapter == "lora" and piece.kind is PieceKind.LOW_RANK


def has_full_rank(piece: Piece, side: int) -> bool:
    """Tell if a piece other than a stored pair has full rank, given its matrix's smaller side."""
    return not is_stored_pair(piece) and rank_bound(piece, side) >= side


def rank_bound(piece: Piece, side: int) -> int:
    """The most ranks of a piece's exact pair, given its matrix's smaller side."""
    is_more = piece.kind in (PieceKind.DIAGONAL, PieceKind.ROTATION) or is_replacement(piece)
    return side if is_more else piece.rank_bound


class ModuleDelta(Protocol):
    """A delta of one LoRA that a module takes."""

    @property
    def piece(self) -> Piece:
        """What is planned."""

    @property
    def factor(self) -> float:
        """Factor on `factors`, `truncated` and `dense`."""

    @property
    def is_stored(self) -> bool:
        """True where the file stores it as a pair."""

    @property
    def is_spectral(self) -> bool:
        """True where its best truncation is found from the stored tensors."""

    @property
    def is_zero(self) -> bool:
        """True where the delta is zero."""

    @property
    def is_thirded(self) -> bool:
        """True where its alpha may be a third of what is meant; see `LoraPair.thirded`."""

    @property
    def is_finite(self) -> bool:
        """True where no tensor holds NaN or infinity."""

    def has_full_rank(self, side: int) -> bool:
        """Tell if it has full rank without being a stored pair, given the smaller side."""

    def factors(self) -> Factors:
        """The exact pair of the module's rows, without `factor`."""

    def truncated(self, rank: int) -> Factors:
        """The best pair of at most `rank` ranks of a spectral member, without `factor`."""

    def dense(self) -> Tensor:
        """The module's rows (out, in) of the delta, float32, without `factor`."""


@dataclass(frozen=True)
class Member:
    """A delta that its tensors alone make.

    Attributes:
        piece: What is planned.
        tensors: Its tensors by role, as matrices.
        factor: Strength times scale, as `factor_at` forms it.
        row_begin: First of the piece's rows that is the module's: a fused piece has three modules'.
        row_count: How many of them there are.
    """

    piece: Piece
    tensors: Mapping[str, Tensor]
    factor: float
    row_begin: int
    row_count: int

    @property
    def is_stored(self) -> bool:
        """True where the file stores it as a pair."""
        return is_stored_pair(self.piece)

    @property
    def is_spectral(self) -> bool:
        """True where its best truncation is found from the stored tensors."""
        is_whole = self.row_count == self.piece.row_count
        return is_whole and (self.piece.adapter == "lokr" or self.piece.kind is PieceKind.DENSE)

    @property
    def is_zero(self) -> bool:
        """True where the delta is zero: every kind of adapter is a product of its tensors."""
        return is_zero(*self.tensors.values())

    @property
    def is_thirded(self) -> bool:
        """True where its alpha may be a third of what is meant; see `LoraPair.thirded`."""
        return "up" in self.tensors and is_thirded(self.piece, self.tensors["up"])

    @property
    def is_finite(self) -> bool:
        """True where no tensor holds NaN or infinity."""
        return all(map(is_finite, self.tensors.values()))

    def has_full_rank(self, side: int) -> bool:
        """Tell if it has full rank without being a stored pair, given the smaller side."""
        return has_full_rank(self.piece, side)

    def factors(self) -> Factors:
        """The exact pair of the module's rows, without `factor`."""
        exact = self._adapter.factors(self.tensors, None, _HOST)
        return Factors(down=exact.down, up=exact.up[self._rows])

    def truncated(self, rank: int) -> Factors:
        """The best pair of at most `rank` ranks of a spectral member, without `factor`."""
        return self._adapter.factors(self.tensors, rank, _HOST)

    def dense(self) -> Tensor:
        """The module's rows (out, in) of the delta, float32, without `factor`."""
        return self._adapter.matrix(self.tensors)[self._rows]

    @property
    def _adapter(self) -> Adapter:
        return adapter_named(self.piece.adapter)

    @property
    def _rows(self) -> slice:
        return slice(self.row_begin, self.row_begin + self.row_count)
