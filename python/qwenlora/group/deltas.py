"""The deltas of slots that are alike, joined to their bases."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenlora.work.pending import Pending

if TYPE_CHECKING:
    from qwenlora.group.arena import SlotFactors
    from qwenlora.model.target import Target

__all__ = ["GroupDeltas"]


NO_FACTORS: Pending[SlotFactors] = Pending.ready(((), ()))


@dataclass(frozen=True)
class GroupDeltas:
    """The deltas of slots that are alike, joined to their bases, ready to be put in place.

    Attributes:
        targets: The slots.
        rank: Ranks of the deltas, without padding.
        rank_added: Ranks that each slot will hold beyond its base.
        factors: Every slot's new `down` and `up`; none in the record of what is in place.
    """

    targets: tuple[Target, ...]
    rank: int
    rank_added: int
    factors: Pending[SlotFactors] = NO_FACTORS

    @property
    def composed(self) -> bool:
        """Whether the slots differ from their bases."""
        return self.rank_added > 0

    @property
    def nbytes(self) -> int:
        """Bytes that the slots' tensors grow by."""
        return sum(target.rank_bytes for target in self.targets) * self.rank_added

    @property
    def saved_bytes(self) -> int:
        """None: such slots hold the exact sums."""
        return 0

    def without_tensors(self) -> GroupDeltas:
        """The record of deltas that are in place."""
        return replace(self, factors=NO_FACTORS)
