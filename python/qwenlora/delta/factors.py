"""A delta as one low-rank pair, which every adapter can be brought to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Factors"]


@dataclass(frozen=True)
class Factors:
    """A delta as `up @ down`, without its scale.

    Attributes:
        down: (r, in).
        up: (rows, r).
        energy_lost: Squared Frobenius norm of what was cut off, without the scale; 0 where rounding
            explains it.
        energy: Squared Frobenius norm of the whole; None where nothing was cut off.
    """

    down: Tensor
    up: Tensor
    energy_lost: float = 0.0
    energy: float | None = None

    @property
    def rank(self) -> int:
        """Ranks of the pair."""
        return int(self.down.shape[0])

    @property
    def share_lost(self) -> float:
        """Share of the energy that was cut off."""
        return self.energy_lost / self.energy if self.energy else 0.0
