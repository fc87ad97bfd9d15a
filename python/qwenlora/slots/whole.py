"""A layer with all its parts that deltas may change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.delta.slot_deltas import SlotDeltas
from qwenlora.slots.branch import BranchChange, SideBranchSlot, has_branch, low_rank_branch
from qwenlora.slots.kinds import KINDS
from qwenlora.slots.packed import PackedChange
from qwenlora.slots.slot import Changes
from qwenlora.slots.value import BASE_VALUES, ValueSlot

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from qwenlora.group.deltas import GroupDeltas
    from qwenlora.group.sets import KeptGroup
    from qwenlora.model.target import Target
    from qwenlora.slots.slot import Change, Slot

__all__ = ["WholeSlot", "prepare_group", "slot_of"]


def prepare_group(deltas: GroupDeltas, left: KeptGroup | None = None) -> Change:
    """Make the change that puts the joined tensors of many slots in place.

    Args:
        deltas: The tensors.
        left: What the same packed slots hold now, where that is known.
    """
    targets = deltas.targets
    changes: list[Change] = []
    if targets[0].place is not None:
        changes.append(PackedChange(targets, deltas.factors, left))
        changes += [
            SideBranchSlot(target).prepare(SlotDeltas(target))
            for target in targets
            if has_branch(target.module)
        ]
    else:
        changes += [
            BranchChange(target.module, new=low_rank_branch(target, factors))
            for target, *factors in zip(targets, *deltas.factors.wait(), strict=True)
        ]
    changes += [
        ValueSlot(target).prepare(SlotDeltas(target))
        for target in targets
        if BASE_VALUES in target.module.__dict__
    ]
    return Changes(changes)


def slot_of(target: Target) -> WholeSlot:
    """The layer with all its parts, by its kind."""
    return WholeSlot(target.path, KINDS[target.kind].parts(target))


class WholeSlot:
    """A layer with all the parts that deltas may change."""

    def __init__(self, path: str, parts: Sequence[Slot]) -> None:
        self.path = path
        self._parts = parts

    def prepare(self, deltas: SlotDeltas) -> Changes:
        """Prepare every part."""
        return Changes([part.prepare(deltas) for part in self._parts])

    def rank_added(self) -> int:
        """Ranks beyond the base that are in place now."""
        return sum(part.rank_added() for part in self._parts)

    def room(self) -> Hashable:
        """The shapes in place beyond the base, part by part."""
        return tuple(part.room() for part in self._parts)

    def is_base(self) -> bool:
        """Tell if every part holds its base."""
        return all(part.is_base() for part in self._parts)

    def restore(self) -> None:
        """Restore every part that is not the base."""
        for part in self._parts:
            if not part.is_base():
                part.restore()
