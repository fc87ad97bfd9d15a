"""One slot's deltas: the tensors that will be written, and the outcome that stays when they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qwenlora.delta.finite import are_finite, non_finite
from qwenlora.delta.outcome import SlotOutcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from qwenlora.delta.scale import KronShape, ScaledDense, ScaledKron, ScaledPair
    from qwenlora.model.target import Target

__all__ = ["BuiltSlot", "SlotDeltas", "require_finite", "uniform"]


@dataclass(frozen=True)
class SlotDeltas:
    """One slot's deltas, ready to be written.

    Attributes:
        target: The slot.
        pairs: Low-rank deltas in stack order, in the slot's dtype, on its device.
        rank_added: Ranks that the slot will hold beyond its base; what exceeds the pairs is zero.
        krons: Kronecker products that run beside the layer, in the slot's dtype.
        kron_room: Shapes of those that the layer holds; what exceeds `krons` is zero.
        dense: A matrix that runs beside a plain linear.
        values: Sums for stored parameters, by name: float64, rows as in files.
    """

    target: Target
    pairs: tuple[ScaledPair, ...] = ()
    rank_added: int = 0
    krons: tuple[ScaledKron, ...] = ()
    kron_room: tuple[KronShape, ...] = ()
    dense: ScaledDense | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All tensors that will be written, the base aside."""
        pairs = [half for pair in self.pairs for half in (pair.down, pair.up)]
        factors = [factor for kron in self.krons for factor in (kron.w1, kron.w2)]
        dense = [] if self.dense is None else [self.dense.values]
        return pairs + factors + dense + list(self.values.values())


@dataclass(frozen=True)
class BuiltSlot:
    """One slot's deltas with their outcome."""

    deltas: SlotDeltas
    outcome: SlotOutcome

    @classmethod
    def of_zeros(cls, target: Target, rank: int) -> BuiltSlot:
        """A slot that holds so many ranks of zeros."""
        outcome = SlotOutcome(targets=(target,), rank=0, rank_added=rank, rank_exact=0)
        return cls(SlotDeltas(target, rank_added=rank), outcome)

    def with_room(self, rank: int, krons: tuple[KronShape, ...], *, exact: int) -> BuiltSlot:
        """The same in a slot that holds so many ranks, and products of these shapes.

        Args:
            rank: Ranks beyond the base.
            krons: Shapes of the products, in order.
            exact: Ranks that exact sums would need.
        """
        deltas = replace(self.deltas, rank_added=rank, kron_room=krons)
        outcome = replace(self.outcome, rank_added=rank, rank_exact=exact, kron_room=krons)
        return BuiltSlot(deltas, outcome)


def uniform(built: Sequence[BuiltSlot]) -> list[BuiltSlot]:
    """Give slots of one offload buffer the same tensors; what a slot lacks is zero."""
    rank = max(own.deltas.rank_added for own in built)
    room: Counter[KronShape] = Counter()
    for own in built:
        room |= Counter(own.deltas.kron_room)
    shapes = tuple(sorted(room.elements()))
    exact = max(own.outcome.rank_exact for own in built)
    return [own.with_room(rank, shapes, exact=exact) for own in built]


def require_finite(built: Sequence[SlotDeltas]) -> None:
    """Check the deltas of several slots with one device synchronisation.

    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    """
    held = [(deltas.target, tensor) for deltas in built for tensor in deltas.tensors()]
    for (target, _), ok in zip(held, are_finite([tensor for _, tensor in held]), strict=True):
        if not ok:
            raise non_finite(target)
