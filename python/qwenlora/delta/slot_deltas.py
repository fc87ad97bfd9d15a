"""One slot's deltas: the tensors that will be written, and the outcome that stays when they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qwenlora.delta.finite import are_finite, non_finite
from qwenlora.delta.outcome import SlotOutcome
from qwenlora.plan.documents import Route

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from qwenlora.delta.parts import PartShape, ScaledPart
    from qwenlora.delta.scale import ScaledPair
    from qwenlora.model.target import Target

__all__ = ["BuiltSlot", "SlotDeltas", "require_finite", "uniform"]


@dataclass(frozen=True)
class SlotDeltas:
    """One slot's deltas, ready to be written.

    Attributes:
        target: The slot.
        pairs: Low-rank deltas in stack order, in the slot's dtype, on its device.
        rank_added: Ranks that the slot will hold beyond its base; what exceeds the pairs is zero.
        parts: What else runs beside the layer, in the order of its shapes.
        room: Shapes of the parts that the layer holds, in order; what exceeds `parts` is zero.
        route: Where the pairs go in a layer that has a packed branch.
        values: Sums for stored parameters, by name: float64, rows as in files.
    """

    target: Target
    pairs: tuple[ScaledPair, ...] = ()
    rank_added: int = 0
    parts: tuple[ScaledPart, ...] = ()
    room: tuple[PartShape, ...] = ()
    route: Route = Route.INSIDE
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All tensors that will be written, the base aside."""
        pairs = [half for pair in self.pairs for half in (pair.down, pair.up)]
        parts = [tensor for part in self.parts for tensor in part.tensors.values()]
        return pairs + parts + list(self.values.values())


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

    def with_room(
        self, rank: int, room: tuple[PartShape, ...], *, exact: int, route: Route
    ) -> BuiltSlot:
        """The same in a slot that holds so many ranks, and parts of these shapes.

        Args:
            rank: Ranks beyond the base.
            room: Shapes of the parts, in order.
            exact: Ranks that exact sums would need.
            route: Where the ranks are.
        """
        deltas = replace(self.deltas, rank_added=rank, room=room, route=route)
        outcome = replace(self.outcome, rank_added=rank, rank_exact=exact, room=room)
        return BuiltSlot(deltas, outcome)


def uniform(built: Sequence[BuiltSlot]) -> list[BuiltSlot]:
    """Give slots of one offload buffer the same tensors; what a slot lacks is zero.

    Where one carries its ranks beside the layer, all do.
    """
    rank = max(own.deltas.rank_added for own in built)
    is_beside = any(own.deltas.route is Route.BESIDE for own in built)
    room: Counter[PartShape] = Counter()
    for own in built:
        room |= Counter(own.deltas.room)
    shapes = tuple(sorted(room.elements()))
    exact = max(own.outcome.rank_exact for own in built)
    route = Route.BESIDE if is_beside else Route.INSIDE
    return [own.with_room(rank, shapes, exact=exact, route=route) for own in built]


def require_finite(built: Sequence[SlotDeltas]) -> None:
    """Check the deltas of several slots with one device synchronisation.

    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    """
    held = [(deltas.target, tensor) for deltas in built for tensor in deltas.tensors()]
    for (target, _), ok in zip(held, are_finite([tensor for _, tensor in held]), strict=True):
        if not ok:
            raise non_finite(target)
