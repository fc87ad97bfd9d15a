"""What adapters of a base weight need to know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["Weight"]


class Weight(Protocol):
    """The weight W (N, K) that a layer computes with, rows as in files.

    Results lie where the weight does its arithmetic.
    """

    @property
    def columns(self) -> int:
        """K."""

    def panels(self, begin: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """These rows in order, some at a time: the first of them, and (n, K) float32."""

    def row_norms(self, begin: int, count: int) -> Tensor:
        """(count,) float64: squared norms of these rows, the energy of quantization taken off."""

    def column_norms(self, begin: int, count: int) -> Tensor:
        """(K,) float64: squared norms of the columns of these rows, likewise."""

    def times(self, x: Tensor, begin: int, count: int) -> Tensor:
        """(count, r) float32: these rows times x (K, r)."""

    def times_left(self, b: Tensor, begin: int, count: int) -> Tensor:
        """(r, K) float32: b^T, of b (count, r), times these rows."""
