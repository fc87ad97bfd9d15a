"""One slot's deltas, ready to be written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.finite import are_finite, non_finite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from qwenlora.delta.pieces import Refusal
    from qwenlora.delta.scale import KronShape, ScaledDense, ScaledKron, ScaledPair
    from qwenlora.model.target import Target

__all__ = ["SlotDeltas", "require_finite", "uniform"]


@dataclass(frozen=True)
class SlotDeltas:
    """One slot's deltas, ready to be written.

    Attributes:
        target: The slot.
        pairs: The deltas in stack order, in the slot's dtype, on its device.
        rank: Ranks of the deltas, without padding.
        rank_added: Ranks that the slot will hold beyond its base.
        krons: Kronecker products that run beside the layer, in the slot's dtype.
        kron_room: Shapes of those that the layer holds; more than `krons` where offload wants every
            block to hold the same.
        kron_count: How many the LoRAs brought.
        dense: A matrix that runs beside a plain linear.
        dense_held: Whether the layer holds one.
        values: What is added to stored parameters, by name: float64, rows as in files.
        energy_lost: Share of the whole delta's energy that truncation dropped; None where there was
            none.
        energy: Energy of the whole delta, where it had to be known.
        energy_is_bound: Whether both are at most so, instead of measured.
        rank_exact: Ranks that the slot would hold for the exact sum.
        zero: Indices of LoRAs whose delta here is all zero, hence left out exactly.
        thirded: Indices of LoRAs whose alpha here may be a third of what is meant.
        refused: (LoRA, module) left out for what they would lose.
    """

    target: Target
    pairs: tuple[ScaledPair, ...] = ()
    rank: int = 0
    rank_added: int = 0
    krons: tuple[ScaledKron, ...] = ()
    kron_room: tuple[KronShape, ...] = ()
    dense: ScaledDense | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    energy_lost: float | None = None
    zero: tuple[int, ...] = ()
    thirded: tuple[int, ...] = ()
    refused: tuple[tuple[int, Refusal], ...] = ()
    dense_held: bool = False
    kron_count: int = 0
    energy: float | None = None
    energy_is_bound: bool = False
    rank_exact: int = 0

    @property
    def composed(self) -> bool:
        """Whether the slot differs from its base."""
        return bool(self.rank_added or self.kron_room or self.dense_held or self.values)

    @property
    def nbytes(self) -> int:
        """Bytes that the slot's tensors grow by; swapped values take the old ones' place."""
        row = self.target.row
        elements = sum(shape.elements for shape in self.kron_room)
        elements += row.in_features * row.out_features if self.dense_held else 0
        return elements * row.element_bytes + self.target.rank_bytes * self.rank_added

    @property
    def saved_bytes(self) -> int:
        """Bytes that the exact sum would take beyond these."""
        return self.target.rank_bytes * max(0, self.rank_exact - self.rank_added)

    def tensors(self) -> list[Tensor]:
        """All that will be written beside the base, for checking."""
        pairs = [half for pair in self.pairs for half in (pair.down, pair.up)]
        factors = [factor for kron in self.krons for factor in (kron.w1, kron.w2)]
        dense = [] if self.dense is None else [self.dense.values]
        return pairs + factors + dense + list(self.values.values())

    def without_tensors(self) -> SlotDeltas:
        """The record of deltas whose tensors have been copied into place."""
        return replace(
            self,
            pairs=(),
            krons=(),
            dense=None,
            values=dict.fromkeys(self.values, torch.empty(0)),
        )


def uniform(deltas: Sequence[SlotDeltas]) -> list[SlotDeltas]:
    """Give slots of one offload buffer the same tensors; what a slot lacks is zero."""
    rank = max(d.rank_added for d in deltas)
    room: Counter[KronShape] = Counter()
    for d in deltas:
        room |= Counter(d.kron_room)
    shapes = tuple(sorted(room.elements()))
    exact = max(d.rank_exact for d in deltas)
    return [replace(d, rank_added=rank, rank_exact=exact, kron_room=shapes) for d in deltas]


def require_finite(built: Sequence[SlotDeltas]) -> None:
    """Check the deltas of several slots with one device synchronisation.

    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    """
    held = [(deltas.target, tensor) for deltas in built for tensor in deltas.tensors()]
    for (target, _), ok in zip(held, are_finite([tensor for _, tensor in held]), strict=True):
        if not ok:
            raise non_finite(target)
