"""A weight as a layer stores it: the interface of its forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RoundingSteps", "StoredWeight"]


class RoundingSteps(NamedTuple):
    """The steps to which the elements of a weight were rounded.

    The step of the element in row i and column k is the root of
    `squares[i, k // group] * columns[k]`, where a group is K / G columns.

    Attributes:
        squares: (rows, G) float64.
        columns: (K,) float64.
    """

    squares: Tensor
    columns: Tensor

    def row_noise(self) -> Tensor:
        """(rows,) float64: the energy that rounding to nearest adds to each row, step²/12 each."""
        groups = self.squares.shape[1]
        by_group = self.columns.view(groups, -1).sum(dim=1)  # (G,)
        return (self.squares @ by_group) / 12

    def column_noise(self) -> Tensor:
        """(K,) float64: what it adds to each column."""
        groups = self.squares.shape[1]
        by_group = self.squares.sum(dim=0)  # (G,)
        return (by_group[:, None] * self.columns.view(groups, -1)).flatten() / 12


class StoredWeight(Protocol):
    """The part of a layer's weight that no low-rank branch holds.

    Rows are in the order of files. Tensors are on the device that the computation runs on.
    """

    @property
    def alignment(self) -> int:
        """Rows that begin and end at multiples of this are the cheapest to read."""

    def rows(self, begin: int, count: int) -> Tensor:
        """(count, K) float32: the values that the layer multiplies its raw input with."""

    def steps(self, begin: int, count: int) -> RoundingSteps | None:
        """What these rows were rounded to; None where rounding adds nothing to their norms."""
