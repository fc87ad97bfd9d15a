"""The deltas of slots that are alike, joined to their bases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora.delta.outcome import SlotOutcome

if TYPE_CHECKING:
    from qwenlora.group.arena import SlotFactors
    from qwenlora.model.target import Target
    from qwenlora.work.pending import Pending

__all__ = ["GroupDeltas"]


@dataclass(frozen=True)
class GroupDeltas:
    """The deltas of slots that are alike, joined to their bases, ready to be put in place.

    Attributes:
        targets: The slots.
        rank: Ranks of the deltas, without padding.
        rank_added: Ranks that each slot will hold beyond its base.
        factors: Every slot's new `down` and `up`.
    """

    targets: tuple[Target, ...]
    rank: int
    rank_added: int
    factors: Pending[SlotFactors]

    def outcome(self) -> SlotOutcome:
        """Their numbers, without the tensors: such slots hold the exact sums."""
        return SlotOutcome(
            targets=self.targets,
            rank=self.rank,
            rank_added=self.rank_added,
            rank_exact=self.rank_added,
        )
