"""The truncation of a module's sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cut"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A truncation of each module's sum: to a rank, or to the rank that keeps enough energy.

    Attributes:
        rank: Most ranks to keep.
        energy: Share of the squared Frobenius norm to keep, above 0 and at most 1; given where
            `rank` is not.
    """

    rank: int | None = None
    energy: float | None = None

    def kept(self, shares: Tensor) -> int | None:
        """Count the leading ranks to keep.

        Args:
            shares: (k,) float64: of the squared norm, what the first 1, 2, ... ranks hold.

        Returns:
            The number; None where more than `k` are needed, or all there are.
        """
        if self.rank is not None:
            return min(self.rank, shares.numel())
        if self.energy is None or self.energy == 1:
            # The last ranks are less than what rounding makes of the sum.
            return None
        enough = shares >= self.energy
        return int(enough.int().argmax()) + 1 if bool(enough.any()) else None
