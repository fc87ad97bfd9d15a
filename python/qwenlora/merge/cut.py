"""How much of a module's sum is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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

    def kept(self, energies: Tensor, total: float) -> int | None:
        """How many of the leading ranks are kept.

        Args:
            energies: (k,) squares of the largest singular values, descending.
            total: Sum of the squares of all singular values.

        Returns:
            The number; None where more than `k` are needed, or all there are.
        """
        if self.rank is not None:
            return min(self.rank, energies.numel())
        if self.energy is None or self.energy == 1:
            # The last ranks are less than what rounding makes of the sum.
            return None
        enough = torch.cumsum(energies.double(), 0) >= self.energy * total
        return int(enough.int().argmax()) + 1 if bool(enough.any()) else None
