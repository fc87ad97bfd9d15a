"""A planned stack on the slots of the model at hand: groups that are alike, and single slots.

Both ways of composing leave the same bits. `apart` composes every slot by itself, which is slow:
for tests of that promise, and to find out which way a fault belongs to.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING

from qwenlora.group.group import group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from qwenlora.group.group import Group
    from qwenlora.model.target import Target
    from qwenlora.plan.documents import SlotPlan, StackPlan

__all__ = ["Division", "Partition", "Plans", "apart", "chosen_division"]


class Division(Enum):
    """A way to divide a stack's slots."""

    TOGETHER = "together"
    """Slots that are alike are composed at once."""
    APART = "apart"
    """Every slot is composed by itself."""


_CHOSEN: ContextVar[Division] = ContextVar("qwenlora_division", default=Division.TOGETHER)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Compose every slot by itself while this is entered, in this thread."""
    token = _CHOSEN.set(Division.APART)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen_division() -> Division:
    """The division that compositions of this thread use."""
    return _CHOSEN.get()


Plans: TypeAlias = "Callable[[Iterable[str]], Mapping[str, SlotPlan]]"


class Partition:
    """The plan's groups and single slots with their targets.

    Attributes:
        plan: The plan.
        groups: Slots that are alike.
        single: The other slots, with their plans.
    """

    def __init__(
        self,
        plan: StackPlan,
        targets: Sequence[Target],
        *,
        division: Division = Division.TOGETHER,
    ) -> None:
        """Sort the plan's slots."""
        self.plan = plan
        self.groups: list[Group] = []
        single = dict(plan.single)
        for alike in plan.alike:
            group = group_of(alike, targets) if division is Division.TOGETHER else None
            if group is not None:
                self.groups.append(group)
                continue
            plans = plan.some(targets[index].path for index in alike.slots)
            single |= {index: plans[targets[index].path] for index in alike.slots}
        self.single = [(targets[index], single[index]) for index in sorted(single)]

    @cached_property
    def paths(self) -> frozenset[str]:
        """Paths of all slots that change."""
        grouped = [target.row.path for group in self.groups for target in group.targets]
        return frozenset(grouped).union(target.row.path for target, _ in self.single)

    @cached_property
    def held(self) -> Mapping[int, int]:
        """In how many slots each LoRA has a delta."""
        held: dict[int, int] = {}
        for group in self.groups:
            for share in group.shares:
                held[share.lora] = held.get(share.lora, 0) + len(group.targets)
        for _, plan in self.single:
            for lora in {piece.lora for piece in plan.pieces}:
                held[lora] = held.get(lora, 0) + 1
        return held

    @cached_property
    def offloaded(self) -> Mapping[str, tuple[list[Group], list[tuple[Target, SlotPlan]]]]:
        """The groups and single slots of offloaded blocks, by pattern."""
        found: dict[str, tuple[list[Group], list[tuple[Target, SlotPlan]]]] = {}
        for group in self.groups:
            row = group.targets[0].row
            if row.offloaded:
                found.setdefault(row.pattern, ([], []))[0].append(group)
        for target, plan in self.single:
            if target.row.offloaded:
                found.setdefault(target.row.pattern, ([], []))[1].append((target, plan))
        return found
