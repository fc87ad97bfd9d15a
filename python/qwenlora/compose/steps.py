"""A composition as a chain of steps. Each step takes what the step before it gave.

`Task.opened` opens the files, `Opened.chosen` decides how the stack is placed, `Chosen.begun`
begins to read, `Begun.parted` looks at what the slots hold and keeps what is worth it, and
`Parted.placed` builds the deltas and puts them in place.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from qwenlora import cache
from qwenlora.compose.journal import Journal
from qwenlora.compose.leaving import Room, base_versions, groups_left, make_room
from qwenlora.compose.placer import Placer
from qwenlora.compose.reports import state_of
from qwenlora.compose.rescale import PlacedStack
from qwenlora.compose.structure import forget_structure, remember_structure
from qwenlora.compose.units import path_units
from qwenlora.delta.base import SlotBase
from qwenlora.delta.deltas import DeltaBuilder
from qwenlora.group.builder import GroupReading
from qwenlora.group.loads import KeptBytes, LoadPlan
from qwenlora.model.state import EMPTY, read_state
from qwenlora.spec import Placement

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import nn

    from qwenlora.compose.structure import Structure
    from qwenlora.compose.units import PathUnit
    from qwenlora.group.builder import BegunReading, GroupBuilder
    from qwenlora.group.partition import Partition
    from qwenlora.group.sets import KeptGroup
    from qwenlora.lora_set import LoraSet
    from qwenlora.memory import DeviceMemory
    from qwenlora.model.state import AppliedState
    from qwenlora.source.source import TensorFetcher

__all__ = ["Task", "compose"]


@dataclass(frozen=True, eq=False)
class Task:
    """A set that a model is to be brought to, planned and checked.

    Attributes:
        model: The transformer, its lock held.
        wanted: The set.
        planned: Its plan on the model's slots.
        structure: The model's slots.
        before: The record of what is in place.
        memory: The devices' free memory.
        strict: Raise where a module would be left out.
        started: When the call began, on `time.perf_counter`.
    """

    model: nn.Module
    wanted: LoraSet
    planned: Partition
    structure: Structure
    before: AppliedState
    memory: DeviceMemory
    strict: bool
    started: float

    def journal(self) -> Journal:
        """The journal of writing to the model."""
        return Journal(self.model, self.structure, self.before, started=self.started)

    def opened(self, closing: contextlib.ExitStack) -> Opened:
        """Open the files; `closing` closes them."""
        fetchers: list[TensorFetcher] = []
        for source in self.wanted.sources:
            fetchers.append(source.open())
            closing.callback(fetchers[-1].close)
        return Opened(self, fetchers)


def compose(task: Task) -> None:
    """Build the stack and put it in the old one's place; an error leaves what the ways say."""
    # Until all of it is done, nobody knows what the slots hold.
    forget_structure(task.model)
    with contextlib.ExitStack() as closing:
        placed = task.opened(closing).chosen().begun(closing).parted().placed()
    task.structure.placed = placed
    remember_structure(task.model, task.structure)


@dataclass(frozen=True, eq=False)
class Opened:
    """The files are open.

    Attributes:
        task: The task.
        fetchers: Read each LoRA's tensors.
    """

    task: Task
    fetchers: Sequence[TensorFetcher]

    def chosen(self) -> Chosen:
        """Choose between the two ways of placing, by the memory that each takes."""
        task = self.task
        entering = self._entering()
        needed = self._needed(entering.values())
        is_whole = self._is_whole(needed)
        if not is_whole:
            # Path by path memory is short.
            entering, needed = {}, self._needed(())
        units = path_units(task.planned, task.structure, task.before)
        if not is_whole:
            limit = task.wanted.options.staging_bytes
            units = [part for unit in units for part in unit.parts(limit)]
        plan = LoadPlan.of(
            [group for unit in units for group in unit.groups],
            staging_bytes=task.wanted.options.staging_bytes,
            kept=entering,
            needed=needed,
        )
        placement = Placement.WHOLE if is_whole else Placement.BY_PATH
        return Chosen(self, placement, units, plan)

    def _entering(self) -> Mapping[str, KeptGroup]:
        """Take what is kept of the set that is wanted."""
        task, kept = self.task, self.task.structure.kept
        cache.begin_composition()
        kept.watch(())
        if not kept.holds(task.wanted.key):
            return {}
        kept.check(base_versions(task.structure, task.before))
        return kept.take(task.wanted.key)

    def _needed(self, entering: Collection[KeptGroup]) -> int:
        """Device memory that composing takes, beyond what is there already.

        A new slot holds a second copy of its base until the old tensors are let go.
        """
        there = sum(kept.nbytes for kept in entering if not kept.on_host)
        base_bytes = self.task.structure.base_bytes
        return max(0, self.task.planned.plan.added_bytes + base_bytes - there)

    def _is_whole(self, needed: int) -> bool:
        task, memory = self.task, self.task.memory
        if task.wanted.options.placement is not Placement.AUTO:
            return task.wanted.options.placement is Placement.WHOLE
        device = next(iter(task.structure.targets.values())).device
        if device.type != "cuda":
            return True
        needed += task.wanted.options.margin_bytes
        # What is kept there yields first.
        if memory.has(device, needed):
            return True
        cleared = cache.clear_devices()
        memory.changed()
        return cleared and memory.has(device, needed)


@dataclass(frozen=True, eq=False)
class Chosen:
    """It is known what is built in which order, and which loads that takes.

    Attributes:
        opened: The open files.
        placement: `WHOLE` or `BY_PATH`.
        units: What is built at a time.
        plan: All loads.
    """

    opened: Opened
    placement: Placement
    units: Sequence[PathUnit]
    plan: LoadPlan

    def begun(self, closing: contextlib.ExitStack) -> Begun:
        """Begin to read; `closing` ends it."""
        wanted, fetchers = self.opened.task.wanted, self.opened.fetchers
        reading = GroupReading(
            self.plan, wanted.specs, wanted.sources, fetchers, threads=wanted.options.threads
        )
        closing.callback(reading.close)
        return Begun(self, reading.begin(self.opened.task.memory))


@dataclass(frozen=True, eq=False)
class Begun:
    """Files are being read.

    Attributes:
        chosen: What is built.
        reading: The reading.
    """

    chosen: Chosen
    reading: BegunReading

    def parted(self) -> Parted:
        """Choose what is kept of the stack that is left; the rest of the memory is for deltas."""
        task, plan = self.chosen.opened.task, self.chosen.plan
        if not plan.kept:
            task.structure.kept.check(base_versions(task.structure, task.before))
        leaving = self._leaving() if self.chosen.placement is Placement.WHOLE else []
        kept = make_room(task.wanted.options, leaving)
        return Parted(self.chosen, leaving, kept, self.reading.keeping(kept))

    def _leaving(self) -> list[KeptGroup]:
        """The slots' tensors, as far as there is room to keep them."""
        task, planned = self.chosen.opened.task, self.chosen.opened.task.planned
        options = task.wanted.options
        room = Room(
            cache_bytes=options.cache_bytes,
            device_bytes=options.device_cache_bytes,
            deltas=sum(group.nbytes for group in planned.groups),
            needed=self.chosen.plan.needed,
            memory=task.memory,
        )
        left = groups_left(task.structure, task.before, planned.paths | task.before.records.keys())
        return [own.kept() for own in room.choose(left, task.structure.kept)]


@dataclass(frozen=True, eq=False)
class Parted:
    """It is known what is kept of the stack that is left.

    Attributes:
        chosen: What is built.
        leaving: The groups whose tensors are kept.
        kept: The most bytes that the caches may hold of the deltas.
        groups: Builds the groups.
    """

    chosen: Chosen
    leaving: Sequence[KeptGroup]
    kept: KeptBytes
    groups: GroupBuilder

    def placed(self) -> PlacedStack | None:
        """Build everything and put it in place.

        Returns:
            How the groups lie in their slots, where they are all that there is.
        """
        task, chosen = self.chosen.opened.task, self.chosen
        placer = Placer(
            chosen.units,
            task.planned.plan,
            self._single(),
            self.groups,
            chosen.opened.fetchers,
            task.journal(),
            progress=task.wanted.options.progress,
            leaving=self.leaving,
        )
        place = placer.whole if chosen.placement is Placement.WHOLE else placer.by_path
        place(
            lambda done: state_of(
                task.wanted, task.planned, task.structure, done, strict=task.strict
            )
        )
        # After a failure nothing is composed, under no name.
        left = task.before.stack if task.before.records else EMPTY.stack
        task.structure.kept.put(left, self.leaving)
        task.structure.kept.watch(task.structure.ends())
        return self._alone() if chosen.placement is Placement.WHOLE else None

    def _single(self) -> DeltaBuilder:
        """Builds the deltas of single slots."""
        opened = self.chosen.opened
        wanted = opened.task.wanted
        return DeltaBuilder(
            wanted.specs,
            wanted.sources,
            opened.fetchers,
            replace(wanted.options, cache_bytes=self.kept.host),
            max_rank=wanted.max_rank,
            base_of=partial(SlotBase, device=opened.task.structure.accelerator, exact=wanted.norms),
        )

    def _alone(self) -> PlacedStack | None:
        task = self.chosen.opened.task
        stacks = [own for own in self.groups.placed if own.group.shares]
        composed = sum(own.count for own in stacks)
        if not stacks or composed != len(read_state(task.model).records):
            return None
        return PlacedStack(task.planned, stacks, self.chosen.plan.load_bytes)
