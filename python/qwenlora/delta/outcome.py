"""The outcome of building slots' deltas: numbers for the record and the report, and no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenlora.delta.parts import PartShape
    from qwenlora.delta.pieces import Refusal
    from qwenlora.model.target import Target

__all__ = ["SlotOutcome"]


@dataclass(frozen=True, kw_only=True)
class SlotOutcome:
    """The numbers of one slot, or of several that are alike.

    Attributes:
        targets: The slots.
        rank: Ranks of the deltas, without padding.
        rank_added: Ranks that each slot holds beyond its base.
        rank_exact: Ranks that it would hold for the exact sum.
        krons: How many Kronecker products the LoRAs brought.
        dense: Whether the LoRAs brought a matrix that runs beside the layer.
        room: Shapes of the parts that the layer holds beside it; more than the LoRAs brought where
            offload wants every block to hold the same.
        values: Names of the parameters whose values differ from the base's.
        energy_lost: Share of the whole delta's energy that truncation dropped; None where there was
            none.
        energy: Energy of the whole delta, where it had to be known.
        energy_is_bound: Whether both are at most so, instead of measured.
        zero: Indices of LoRAs whose delta here is all zero, hence left out exactly.
        thirded: Indices of LoRAs whose alpha here may be a third of what is meant.
        refused: (LoRA, module) left out for what they would lose.
        estimated: (LoRA, module) whose norms are estimated from the quantized weight.
    """

    targets: tuple[Target, ...]
    rank: int
    rank_added: int
    rank_exact: int
    krons: int = 0
    dense: bool = False
    room: tuple[PartShape, ...] = ()
    values: tuple[str, ...] = ()
    energy_lost: float | None = None
    energy: float | None = None
    energy_is_bound: bool = False
    zero: tuple[int, ...] = ()
    thirded: tuple[int, ...] = ()
    refused: tuple[tuple[int, Refusal], ...] = ()
    estimated: tuple[tuple[int, str], ...] = ()

    @property
    def composed(self) -> bool:
        """True where the slots differ from their bases."""
        return bool(self.rank_added or self.room or self.values)

    @property
    def nbytes(self) -> int:
        """Bytes that the slots' tensors grow by; swapped values take the old ones' place."""
        row = self.targets[0].row
        beside = sum(shape.nbytes(row.element_bytes) for shape in self.room)
        return beside * len(self.targets) + self._rank_bytes * self.rank_added

    @property
    def saved_bytes(self) -> int:
        """Bytes that the exact sums would take beyond these."""
        return self._rank_bytes * max(0, self.rank_exact - self.rank_added)

    @property
    def _rank_bytes(self) -> int:
        return sum(target.rank_bytes for target in self.targets)
