"""Putting a new stack in the old one's place: all of it, or nothing of either.

Slots of one path over all blocks are built at a time. In both ways of placing, the model's record
says what is true at every moment, so that a later call finds the base whatever happens.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from qwenlora.bulk import Group
from qwenlora.deltas import DeltaBuilder, GroupDeltas, SlotDeltas, require_finite, uniform
from qwenlora.plan import SlotKind
from qwenlora.report import NO_SLOTS, ComposeReport
from qwenlora.slots import Change, prepare_group, slot_of
from qwenlora.state import AppliedState, write_state
from qwenlora.steps import forget_steps

if TYPE_CHECKING:
    from torch import nn

    from qwenlora.grouped import GroupBuilder
    from qwenlora.kept import KeptGroup
    from qwenlora.plan import SlotPlan, StackPlan
    from qwenlora.planned import Planned, Plans
    from qwenlora.source import TensorFetcher
    from qwenlora.spec import ComposeOptions
    from qwenlora.structure import Structure
    from qwenlora.targets import Target

__all__ = ["Journal", "PathUnit", "Placer", "path_units", "restore_all"]


Member: TypeAlias = "tuple[Target, SlotPlan | None]"
Deltas: TypeAlias = "SlotDeltas | GroupDeltas"


@dataclass
class PathUnit:
    """Slots of one path over all blocks: what is built at a time.

    Attributes:
        groups: Slots that are built together.
        rest: Slots that are built one by one, with their plans; None brings one to its base, or
            fills it up with zeros where the others' ranks must be its own.
        twins: Under offload, the slots of the buffer blocks that the others are copied into; all
            then get the same rank.
    """

    groups: list[Group] = field(default_factory=list)
    rest: list[Member] = field(default_factory=list)
    twins: list[Target] = field(default_factory=list)

    @property
    def targets(self) -> list[Target]:
        """All slots but the twins."""
        together = [target for group in self.groups for target in group.targets]
        return together + [target for target, _ in self.rest]

    def parts(self, limit_bytes: int) -> list[PathUnit]:
        """The same in smaller units, whose base branches take at most this much each.

        Slots that share buffers stay together.
        """
        if self.twins:
            return [self]
        parts = [
            PathUnit(groups=[part]) for group in self.groups for part in group.parts(limit_bytes)
        ]
        return parts + ([PathUnit(rest=self.rest)] if self.rest else [])


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
        self, model: nn.Module, structure: Structure, before: AppliedState, *, started: float
    ) -> None:
        """`started` is when the call began, on `time.perf_counter`."""
        self._started = started
        self._model = model
        self._structure = structure
        self._before = before
        report = ComposeReport((), NO_SLOTS, 0, 0.0, failure="interrupted while it was written")
        self._in_flight = AppliedState(None, structure.bare_records, report, in_flight=True)

    def begin(self) -> None:
        """Slots are about to be written."""
        if self._structure.layout is not None:
            self._structure.layout.synchronise()
        # What was computed with the stack before must not outlive it, whatever comes between.
        forget_steps(self._model)
        write_state(self._model, self._in_flight)

    def done(self, state: AppliedState) -> None:
        """All slots are written."""
        write_state(self._model, state.taken(time.perf_counter() - self._started))

    def undone(self) -> None:
        """All slots are as they were before."""
        write_state(self._model, self._before)

    def to_base(self, error: BaseException) -> None:
        """Bring every slot to its base and say why."""
        restore_all(self._structure.with_twins())
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
        report = ComposeReport((), NO_SLOTS, 0, 0.0, failure=failure)
        write_state(self._model, AppliedState(stack=None, report=report))


class Placer:
    """Builds units and puts them in place, in one of the two ways."""

    def __init__(
        self,
        units: Sequence[PathUnit],
        plan: StackPlan,
        builder: DeltaBuilder,
        groups: GroupBuilder,
        fetchers: Sequence[TensorFetcher],
        options: ComposeOptions,
        journal: Journal,
        *,
        leaving: Iterable[KeptGroup] = (),
    ) -> None:
        self._units = units
        self._leaving = {own.group.targets[0].path: own for own in leaving}
        self._plan = plan
        self._journal = journal
        self._builder = builder
        self._groups = groups
        self._fetchers = fetchers
        self._progress = options.progress
        self._total = sum(len(unit.targets) for unit in units)
        self._staged = 0
        self._written = 0

    def whole(self, state_of: Callable[[Sequence[Deltas]], AppliedState]) -> None:
        """Build everything beside the old stack, then move all pointers, or none."""
        prepared = [pair for unit in self._units for pair in self._prepare(unit)]
        # Host memory is being filled meanwhile.
        state = state_of([deltas for _, deltas in prepared])
        self._groups.check()
        for fetcher in self._fetchers:
            fetcher.finish()
        begun: list[Change] = []
        try:
            self._journal.begin()
            for change, deltas in prepared:
                self._tell_write(deltas)
                begun.append(change)
                change.make()
            self._journal.done(state)
        except BaseException:
            self._journal.begin()
            for change in reversed(begun):
                change.unmake()
            self._journal.undone()
            raise

    def by_path(self, state_of: Callable[[Sequence[Deltas]], AppliedState]) -> None:
        """One path at a time, old tensors let go as it goes; an error ends in the bare base."""
        done: list[Deltas] = []
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

    def _replace(self, unit: PathUnit) -> list[Deltas]:
        """Build one unit and put it in place; the old tensors are let go with this call."""
        prepared = self._prepare(unit)
        self._groups.wait()
        for change, deltas in prepared:
            self._tell_write(deltas)
            change.make()
        return [deltas for _, deltas in prepared]

    def _prepare(self, unit: PathUnit) -> list[tuple[Change, Deltas]]:
        together, alone = self._build(unit)
        if unit.twins:
            ranks = [deltas.rank_added for deltas in together]
            rank = max([*ranks, *(deltas.rank_added for deltas in alone)])
            alone = uniform([*alone, *(SlotDeltas(twin, rank_added=rank) for twin in unit.twins)])
        prepared: list[tuple[Change, Deltas]] = [
            (prepare_group(deltas, self._left_by(deltas)), deltas.without_tensors())
            for deltas in together
        ]
        prepared += [
            (slot_of(deltas.target).prepare(deltas), deltas.without_tensors()) for deltas in alone
        ]
        return prepared

    def _left_by(self, deltas: GroupDeltas) -> KeptGroup | None:
        """What these very slots hold now, where that will be kept."""
        left = self._leaving.get(deltas.targets[0].path)
        return left if left is not None and left.of(deltas.targets) else None

    def _build(self, unit: PathUnit) -> tuple[list[GroupDeltas], list[SlotDeltas]]:
        together: list[GroupDeltas] = []
        differing: list[Target] = []
        planned = any(group.stacks for group in unit.groups)
        filled = [target for target, _ in unit.rest] if unit.twins and planned else []
        for group in unit.groups:
            built = self._groups.build(group, empty=filled, tell=self._tell_staged)
            together += built.deltas
            differing += built.rest
        plans = self._plan.some(target.path for target in differing) if differing else {}
        members = [(target, plans.get(target.path)) for target in differing]
        alone = self._build_alone([*members, *([] if filled else unit.rest)])
        rank = max((deltas.rank_added for deltas in together), default=0)
        if unit.twins and any(deltas.rank_added > rank for deltas in alone) and together:
            # A slot that shares no ranks where the others do: all of them get more.
            plans = self._plan.some(target.path for target in unit.targets)
            return [], self._build_alone([(t, plans.get(t.path)) for t in unit.targets])
        return together, alone

    def _build_alone(self, members: Sequence[Member]) -> list[SlotDeltas]:
        first = self._staged
        built = self._builder.build(
            members,
            before_slot=lambda: self._tell_staged(1),
            before_batch=lambda done: self._tell("compress", min(first + done, self._total - 1)),
        )
        require_finite(built)
        return built

    def _tell_staged(self, slots: int) -> None:
        for _ in range(slots if self._progress is not None else 0):
            if self._staged < self._total:
                self._tell("stage", self._staged)
                self._staged += 1

    def _tell_write(self, deltas: Deltas) -> None:
        targets = deltas.targets if isinstance(deltas, GroupDeltas) else (deltas.target,)
        for _ in targets if self._progress is not None else ():
            # Buffer blocks are written with the slots that they serve, and are not counted.
            if self._written < self._total:
                self._tell("write", self._written)
                self._written += 1

    def _tell(self, phase: str, done: int) -> None:
        if self._progress is not None:
            self._progress(phase, done, self._total)


def path_units(planned: Planned, structure: Structure, state: AppliedState) -> list[PathUnit]:
    """Group by path the slots that change: planned ones, and those that lose their deltas.

    Where one offloaded slot of a path changes, all of them do, and the buffers' slots with them.
    """
    resident = [group for group in planned.groups if not group.targets[0].row.offloaded]
    units = [PathUnit(groups=[group]) for group in resident]
    by_pattern: dict[str, PathUnit] = defaultdict(PathUnit)
    for target, plan in planned.single:
        if not target.row.offloaded:
            by_pattern[target.row.pattern].rest.append((target, plan))
    leaving = state.records.keys() - planned.paths
    for paths, group in structure.packed:
        own = paths & leaving
        if own and not group.targets[0].row.offloaded:
            leaving -= own
            targets = tuple(target for target in group.targets if target.path in own)
            units.append(PathUnit(groups=[group if len(own) == len(paths) else Group(targets)]))
    others = [structure.targets[path] for path in leaving if path in structure.targets]
    others.sort(key=lambda target: structure.order[target.path])
    for target in others:
        if not target.row.offloaded:
            by_pattern[target.row.pattern].rest.append((target, None))
    # Host memory first: beside the old stack others go on while it is written.
    return [*_offloaded_units(planned, structure, others), *units, *by_pattern.values()]


def _offloaded_units(
    planned: Planned, structure: Structure, leaving: Sequence[Target]
) -> list[PathUnit]:
    if structure.layout is None:
        return []
    changing = {target.row.pattern for target in leaving if target.row.offloaded}
    changing |= planned.offloaded.keys()
    # A new manager's buffers are copies of block 0, with what that had.
    changing |= {twin.row.pattern for twin in structure.twins if not slot_of(twin).is_base()}
    units = []
    for pattern, targets in structure.offloaded.items():
        if pattern not in changing:
            continue
        groups, single = planned.offloaded.get(pattern, ([], []))
        if groups or single:
            unit = _offloaded_unit(targets, groups, single, planned.plan.some)
        else:
            unit = _leaving_unit(targets, structure)
        unit.twins = structure.layout.twins(targets[0])
        units.append(unit)
    return units


def _leaving_unit(targets: Sequence[Target], structure: Structure) -> PathUnit:
    """All slots of a path that go through the buffers, returning to their base."""
    own = {target.path for target in targets}
    groups = [group for paths, group in structure.packed if paths <= own]
    return PathUnit(groups, [(t, None) for t in targets if t.kind is not SlotKind.SVDQ])


def _offloaded_unit(
    targets: Sequence[Target], groups: Sequence[Group], single: Sequence[Member], some: Plans
) -> PathUnit:
    """All slots of a path that go through the buffers."""
    if len(groups) == 1 and not single:
        own = {id(target) for target in groups[0].targets}
        return PathUnit(list(groups), [(t, None) for t in targets if id(t) not in own])
    # One rank for all of them: known only when every slot's own is.
    plans = some(target.path for target in targets)
    return PathUnit(rest=[(target, plans.get(target.path)) for target in targets])
