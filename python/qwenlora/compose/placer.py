"""Putting a new stack in the old one's place: all of it, or nothing of either.

Slots of one path over all blocks are built at a time. In both ways of placing, the model's record
says what is true at every moment, so that a later call finds the base whatever happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.delta.slot_deltas import BuiltSlot, require_finite, uniform
from qwenlora.plan.documents import Route
from qwenlora.slots.whole import prepare_group, slot_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qwenlora.compose.journal import Journal
    from qwenlora.compose.units import Member, PathUnit
    from qwenlora.delta.deltas import DeltaBuilder
    from qwenlora.delta.outcome import SlotOutcome
    from qwenlora.group.builder import GroupBuilder
    from qwenlora.group.deltas import GroupDeltas
    from qwenlora.group.sets import KeptGroup
    from qwenlora.model.state import AppliedState
    from qwenlora.model.target import Target
    from qwenlora.plan.documents import StackPlan
    from qwenlora.slots.slot import Change
    from qwenlora.source.source import TensorFetcher
    from qwenlora.spec import Progress

__all__ = ["Placer"]


class Placer:
    """Builds units and puts them in place, in one of the two ways."""

    def __init__(
        self,
        units: Sequence[PathUnit],
        plan: StackPlan,
        builder: DeltaBuilder,
        groups: GroupBuilder,
        fetchers: Sequence[TensorFetcher],
        journal: Journal,
        *,
        progress: Progress | None,
        leaving: Iterable[KeptGroup] = (),
    ) -> None:
        self._units = units
        self._leaving = {own.group.targets[0].path: own for own in leaving}
        self._plan = plan
        self._journal = journal
        self._builder = builder
        self._groups = groups
        self._fetchers = fetchers
        self._progress = progress
        self._total = sum(len(unit.targets) for unit in units)
        self._staged = 0
        self._written = 0

    def whole(self, state_of: Callable[[Sequence[SlotOutcome]], AppliedState]) -> None:
        """Build everything beside the old stack, then move all pointers, or none."""
        prepared = [pair for unit in self._units for pair in self._prepare(unit)]
        # Host memory is being filled meanwhile.
        state = state_of([outcome for _, outcome in prepared])
        self._groups.check()
        for fetcher in self._fetchers:
            fetcher.finish()
        self._journal.write(self._told(prepared), state)

    def _told(self, prepared: Sequence[tuple[Change, SlotOutcome]]) -> Iterator[Change]:
        for change, outcome in prepared:
            self._tell_write(outcome)
            yield change

    def by_path(self, state_of: Callable[[Sequence[SlotOutcome]], AppliedState]) -> None:
        """One path at a time, old tensors let go as it goes; an error ends in the bare base."""
        done: list[SlotOutcome] = []
        try:
            self._journal.begin()
            for unit in self._units:
                done += self._replace(unit)
            # At the end: an error ends in the base in any case, and to ask waits for the device.
            self._groups.check()
            for fetcher in self._fetchers:
                fetcher.finish()
            self._journal.done(state_of(done))
        except BaseException as error:
            # It is short of memory: what was built goes with the slots that hold it.
            self._groups.drop_unchecked()
            self._journal.begin()
            self._journal.to_base(error)
            raise

    def _replace(self, unit: PathUnit) -> list[SlotOutcome]:
        """Build one unit and put it in place; the old tensors are let go with this call."""
        prepared = self._prepare(unit)
        self._groups.wait()
        for change in self._told(prepared):
            change.make()
        return [outcome for _, outcome in prepared]

    def _prepare(self, unit: PathUnit) -> list[tuple[Change, SlotOutcome]]:
        together, alone = self._build(unit)
        if unit.twins:
            ranks = [deltas.rank_added for deltas in together]
            rank = max([*ranks, *(own.deltas.rank_added for own in alone)])
            alone = uniform([*alone, *(BuiltSlot.of_zeros(twin, rank) for twin in unit.twins)])
        prepared: list[tuple[Change, SlotOutcome]] = [
            (prepare_group(deltas, self._left_by(deltas)), deltas.outcome()) for deltas in together
        ]
        prepared += [(slot_of(own.deltas.target).prepare(own.deltas), own.outcome) for own in alone]
        return prepared

    def _left_by(self, deltas: GroupDeltas) -> KeptGroup | None:
        """The tensors that these slots hold now and that will be kept, or None."""
        left = self._leaving.get(deltas.targets[0].path)
        return left if left is not None and left.of(deltas.targets) else None

    def _build(self, unit: PathUnit) -> tuple[list[GroupDeltas], list[BuiltSlot]]:
        together: list[GroupDeltas] = []
        differing: list[Target] = []
        planned = any(group.shares for group in unit.groups)
        filled = [target for target, _ in unit.rest] if unit.twins and planned else []
        for group in unit.groups:
            built = self._groups.build(group, empty=filled, tell=self._tell_staged)
            together += built.deltas
            differing += built.rest
        plans = self._plan.some(target.path for target in differing) if differing else {}
        members = [(target, plans.get(target.path)) for target in differing]
        alone = self._build_alone([*members, *([] if filled else unit.rest)])
        rank = max((deltas.rank_added for deltas in together), default=0)
        if unit.twins and together and any(_needs_more(own, rank) for own in alone):
            # A slot that shares no ranks where the others do, or holds parts: all get the same.
            plans = self._plan.some(target.path for target in unit.targets)
            return [], self._build_alone([(t, plans.get(t.path)) for t in unit.targets])
        return together, alone

    def _build_alone(self, members: Sequence[Member]) -> list[BuiltSlot]:
        first = self._staged
        built = self._builder.build(
            members,
            before_slot=lambda: self._tell_staged(1),
            before_batch=lambda done: self._tell("compress", min(first + done, self._total - 1)),
        )
        require_finite([own.deltas for own in built])
        return built

    def _tell_staged(self, slots: int) -> None:
        for _ in range(slots if self._progress is not None else 0):
            if self._staged < self._total:
                self._tell("stage", self._staged)
                self._staged += 1

    def _tell_write(self, outcome: SlotOutcome) -> None:
        for _ in outcome.targets if self._progress is not None else ():
            # Buffer blocks are written with the slots that they serve, and are not counted.
            if self._written < self._total:
                self._tell("write", self._written)
                self._written += 1

    def _tell(self, phase: str, done: int) -> None:
        if self._progress is not None:
            self._progress(phase, done, self._total)


def _needs_more(built: BuiltSlot, rank: int) -> bool:
    """Tell if a slot holds what slots that were built together, of so many ranks, do not."""
    deltas = built.deltas
    return deltas.rank_added > rank or bool(deltas.room) or deltas.route is Route.BESIDE
