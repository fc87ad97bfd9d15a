"""Slots of one path over all blocks: what is built at a time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwenlora.group.group import Group
from qwenlora.slots.whole import slot_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    from qwenlora.compose.structure import Structure
    from qwenlora.group.partition import Partition, Plans
    from qwenlora.model.state import AppliedState
    from qwenlora.model.target import Target
    from qwenlora.plan.documents import SlotPlan

__all__ = ["Member", "PathUnit", "path_units"]


Member: TypeAlias = "tuple[Target, SlotPlan | None]"


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


def path_units(planned: Partition, structure: Structure, state: AppliedState) -> list[PathUnit]:
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
    # Host memory first: where the old stack stays, other units are built while it is written.
    return [*_offloaded_units(planned, structure, others), *units, *by_pattern.values()]


def _offloaded_units(
    planned: Partition, structure: Structure, leaving: Sequence[Target]
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
    return PathUnit(groups, [(t, None) for t in targets if t.place is None])


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
