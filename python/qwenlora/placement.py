"""Putting a new stack in the old one's place: all of it, or nothing of either.

Slots of one path over all blocks are built at a time. In both ways of placing, the model's record
says what is true at every moment, so that a later call finds the base whatever happens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwenlora.bulk import Group, group_slots
from qwenlora.deltas import DeltaBuilder, SlotDeltas, require_finite, uniform
from qwenlora.report import ComposeReport
from qwenlora.slots import Change, slot_of
from qwenlora.state import AppliedState, SlotRecord, write_state

if TYPE_CHECKING:
    from torch import nn

    from qwenlora.grouped import GroupBuilder
    from qwenlora.offload import OffloadLayout
    from qwenlora.plan import SlotPlan, StackPlan
    from qwenlora.source import TensorFetcher
    from qwenlora.spec import ComposeOptions
    from qwenlora.targets import Target

__all__ = ["Journal", "PathUnit", "Placer", "path_units", "restore_all"]


@dataclass
class PathUnit:
    """Slots of one path over all blocks: what is built at a time.

    Attributes:
        members: The slots with their plans; None brings one to its base.
        twins: Under offload, the slots of the buffer blocks that the members are copied into; all
            then get the same rank.
        groups: Members that are built together.
        rest: Members that are built one by one, or filled up with zeros.
    """

    members: list[tuple[Target, SlotPlan | None]] = field(default_factory=list)
    twins: list[Target] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    rest: list[tuple[Target, SlotPlan | None]] = field(default_factory=list)

    def sort(self) -> None:
        """Find the members that can be built together."""
        self.groups, self.rest = group_slots(self.members)
        planned = [group for group in self.groups if group.stacks]
        alone = any(plan is not None for _, plan in self.rest)
        if self.twins and planned and (len(planned) > 1 or alone):
            # One rank for all of them: known only when every slot's own is.
            self.groups, self.rest = [], list(self.members)
        elif self.twins and planned:
            # Slots without a plan get as many ranks, all zero.
            own = {id(target) for target, _ in planned[0].slots}
            self.groups = planned
            self.rest = [member for member in self.members if id(member[0]) not in own]


def restore_all(targets: Iterable[Target]) -> None:
    """Bring every slot to its base."""
    for target in targets:
        slot = slot_of(target)
        if not slot.is_base():
            slot.restore()


class Journal:
    """Keeps the recorded state truthful while slots are being written.

    From before the first write until the last the record says so, with every base rank: whatever
    interrupts the writing, and the cleaning up after it, a later call can find the base again.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        layout: OffloadLayout | None,
        before: AppliedState,
    ) -> None:
        self._model = model
        self._targets = [*targets.values()]
        if layout is not None:
            self._targets += layout.all_twins(targets.values())
        self._layout = layout
        self._before = before
        records = {path: SlotRecord(t.row.base_rank, 0) for path, t in targets.items()}
        report = ComposeReport((), (), 0, 0.0, failure="interrupted while it was written")
        self._in_flight = AppliedState(None, records, report, in_flight=True)

    def begin(self) -> None:
        """Slots are about to be written."""
        if self._layout is not None:
            self._layout.synchronise()
        write_state(self._model, self._in_flight)

    def done(self, state: AppliedState) -> None:
        """All slots are written."""
        write_state(self._model, state)

    def undone(self) -> None:
        """All slots are as they were before."""
        write_state(self._model, self._before)

    def to_base(self, error: BaseException) -> None:
        """Bring every slot to its base and say why."""
        restore_all(self._targets)
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
        report = ComposeReport((), (), 0, 0.0, failure=failure)
        write_state(self._model, AppliedState(stack=None, report=report))


class Placer:
    """Builds units and puts them in place, in one of the two ways."""

    def __init__(
        self,
        units: Sequence[PathUnit],
        builder: DeltaBuilder,
        groups: GroupBuilder,
        fetchers: Sequence[TensorFetcher],
        options: ComposeOptions,
        journal: Journal,
    ) -> None:
        self._units = units
        self._journal = journal
        self._builder = builder
        self._groups = groups
        self._fetchers = fetchers
        self._progress = options.progress
        self._total = sum(len(unit.members) for unit in units)
        # Buffer blocks are written with the slots that they serve, and are not counted.
        self._twins = {id(twin) for unit in units for twin in unit.twins}
        self._staged = 0
        self._written = 0

    def whole(self, state_of: Callable[[Sequence[SlotDeltas]], AppliedState]) -> None:
        """Build everything beside the old stack, then move all pointers, or none."""
        prepared = [pair for unit in self._units for pair in self._prepare(unit)]
        self._groups.check()
        for fetcher in self._fetchers:
            fetcher.finish()
        begun: list[Change] = []
        self._journal.begin()
        try:
            for change, deltas in prepared:
                self._tell_write(deltas)
                begun.append(change)
                change.make()
            self._journal.done(state_of([deltas for _, deltas in prepared]))
        except BaseException:
            self._journal.begin()
            for change in reversed(begun):
                change.unmake()
            self._journal.undone()
            raise

    def by_path(self, state_of: Callable[[Sequence[SlotDeltas]], AppliedState]) -> None:
        """One path at a time, old tensors let go as it goes; an error ends in the bare base."""
        done: list[SlotDeltas] = []
        self._journal.begin()
        try:
            for unit in self._units:
                prepared = self._prepare(unit)
                self._groups.check()
                for change, deltas in prepared:
                    self._tell_write(deltas)
                    change.make()
                    done.append(deltas)
            for fetcher in self._fetchers:
                fetcher.finish()
            self._journal.done(state_of(done))
        except BaseException as error:
            self._journal.begin()
            self._journal.to_base(error)
            raise

    def _prepare(self, unit: PathUnit) -> list[tuple[Change, SlotDeltas]]:
        built = self._build(unit)
        if unit.twins:
            built = uniform(built)
            first = built[0]
            built += [
                SlotDeltas(twin, rank_added=first.rank_added, kron_room=first.kron_room)
                for twin in unit.twins
            ]
        return [
            (slot_of(deltas.target).prepare(deltas), deltas.without_tensors()) for deltas in built
        ]

    def _build(self, unit: PathUnit) -> list[SlotDeltas]:
        """All members' deltas, in their order."""
        together: list[SlotDeltas] = []
        alone = list(unit.rest)
        for group in unit.groups:
            empty = [target for target, _ in unit.rest] if unit.twins else []
            built = self._groups.build(group, empty=empty, tell=self._tell_staged)
            together += built.deltas
            alone = built.rest + ([] if empty else alone)
        one_by_one = self._build_alone(alone)
        rank = max((deltas.rank_added for deltas in together), default=0)
        if unit.twins and any(deltas.rank_added > rank for deltas in one_by_one):
            # A slot that shares no ranks where the others do: all of them get more.
            together, one_by_one = [], self._build_alone(unit.members)
        found = {id(deltas.target): deltas for deltas in (*together, *one_by_one)}
        return [found[id(target)] for target, _ in unit.members]

    def _build_alone(self, members: Sequence[tuple[Target, SlotPlan | None]]) -> list[SlotDeltas]:
        built = []
        for target, plan in members:
            self._tell_staged(1)
            built.append(self._builder.build(target, plan))
        require_finite(built)
        return built

    def _tell_staged(self, slots: int) -> None:
        for _ in range(slots):
            if self._staged < self._total:
                self._tell("stage", self._staged)
                self._staged += 1

    def _tell_write(self, deltas: SlotDeltas) -> None:
        if id(deltas.target) not in self._twins:
            self._tell("write", self._written)
            self._written += 1

    def _tell(self, phase: str, done: int) -> None:
        if self._progress is not None:
            self._progress(phase, done, self._total)


def path_units(
    plan: StackPlan,
    targets: Mapping[str, Target],
    layout: OffloadLayout | None,
    state: AppliedState,
) -> list[PathUnit]:
    """Group by path the slots that change: planned ones, and those that lose their deltas.

    Where one offloaded slot of a path changes, all of them do, and the buffers' slots with them.
    """
    plans = {slot.path: slot for slot in plan.slots}
    changing = {
        _unit_key(target)
        for path, target in targets.items()
        if path in plans or path in state.records
    }
    if layout is not None:
        # A new manager's buffers are copies of block 0, with what that had.
        changing |= {
            (twin.row.pattern, True)
            for twin in layout.all_twins(targets.values())
            if not slot_of(twin).is_base()
        }
    units: dict[tuple[str, bool], PathUnit] = defaultdict(PathUnit)
    for path, target in targets.items():
        key = _unit_key(target)
        alone = not target.row.offloaded and path not in plans and path not in state.records
        if key in changing and not alone:
            units[key].members.append((target, plans.get(path)))
    if layout is not None:
        for (_, offloaded), unit in units.items():
            if offloaded:
                unit.twins = layout.twins(unit.members[0][0])
    for unit in units.values():
        unit.sort()
    return list(units.values())


def _unit_key(target: Target) -> tuple[str, bool]:
    # Slots of blocks that stay on the device take no part in a buffer's rank.
    return (target.row.pattern, target.row.offloaded)
