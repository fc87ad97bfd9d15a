"""Tensors of slots under sets that were left, kept where there is room: a return moves pointers.

On a device the base branch is held once while much memory is not free, in the composed tensors, and
copied out of them; so are composed sets packed anew. Where more is free than anything will ask for,
and for the base in host memory, which is slower to copy than to keep, the tensors themselves stay.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenlora import cache
from qwenlora.bulk import Group
from qwenlora.deltas import GroupDeltas
from qwenlora.memory import DEVICE_RESERVE, is_free
from qwenlora.targets import FACTORS, factors_of

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.grouped import PlacedGroup
    from qwenlora.state import AppliedState
    from qwenlora.structure import Structure

__all__ = ["KeptGroup", "KeptSets", "Room", "groups_left"]

_MAX_SETS = 4
"""Sets that are kept: those that a host alternates between."""


@dataclass(frozen=True, eq=False)
class KeptGroup:
    """A group's tensors under a set.

    Attributes:
        group: The slots.
        deltas: Their packed factors, as they were in place.
        placed: How the LoRAs lie in them; None for the base.
        parameters: The layers' downs and ups, whose tensors these are.
    """

    group: Group
    deltas: GroupDeltas
    placed: PlacedGroup | None
    parameters: Sequence[Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        first = self.group.targets[0]
        each = first.base_bytes + first.rank_bytes * self.deltas.rank_added
        return each * len(self.group.targets)

    def of(self, group: Group) -> bool:
        """Whether these are the slots of this group."""
        return self.group is group or self.group.targets == group.targets

    @property
    def on_host(self) -> bool:
        """Whether they are in host memory."""
        return self.group.device.type == "cpu"


class KeptSets:
    """The sets that one model left, the oldest first; they go with its structure."""

    def __init__(self) -> None:
        self._sets: OrderedDict[Hashable, dict[str, KeptGroup]] = OrderedDict()
        self._watch: weakref.finalize[..., Any] | None = None
        cache.register(self)

    def nbytes(self, *, on_host: bool) -> int:
        """Bytes held, on the host or on devices."""
        own = [kept for groups in list(self._sets.values()) for kept in groups.values()]
        return sum(kept.nbytes for kept in own if kept.on_host is on_host)

    def take(self, key: Hashable) -> Mapping[str, KeptGroup]:
        """A set's groups by their first paths; about to be in place, they are kept no longer."""
        return self._sets.pop(key, {})

    def watch(self, live: Tensor | None) -> None:
        """Drop all when a tensor's memory is let go: the model is moved, or taken apart.

        Args:
            live: A tensor of the set that is in place now; None while that changes.
        """
        if self._watch is not None:
            self._watch.detach()
            self._watch = None
        if live is not None and self._sets:
            storage = live.untyped_storage()
            self._watch = weakref.finalize(storage, _clear, weakref.ref(self))
            self._watch.atexit = False

    def put(self, key: Hashable, groups: Iterable[KeptGroup]) -> None:
        """Keep what a set's slots held; the oldest sets are dropped past a few."""
        # The parameters hold what is in place now.
        kept = {own.group.targets[0].path: replace(own, parameters=()) for own in groups}
        if kept:
            self._sets[key] = self._sets.pop(key, {}) | kept
        while len(self._sets) > _MAX_SETS:
            self._sets.popitem(last=False)

    def drop_oldest(self) -> bool:
        """Drop one set; whether there was one."""
        return bool(self._sets) and self._sets.popitem(last=False) is not None

    def clear_devices(self) -> None:
        """Drop what is on devices."""
        for key, groups in list(self._sets.items()):
            on_host = {path: own for path, own in groups.items() if own.on_host}
            if on_host:
                self._sets[key] = on_host
            else:
                del self._sets[key]

    def clear(self) -> None:
        """Drop all."""
        self._sets.clear()


def _clear(kept: weakref.ref[KeptSets]) -> None:
    own = kept()
    if own is not None:
        own.clear()


def groups_left(
    structure: Structure, state: AppliedState, changing: frozenset[str]
) -> list[KeptGroup]:
    """What the slots hold that are about to be left.

    Args:
        structure: The model's slots.
        state: What is in them.
        changing: Paths of all slots that change.

    Returns:
        The composed groups on devices, where the set consists of groups alone; and the base's of
        slots that hold nothing else.
    """
    placed = () if structure.placed is None else structure.placed.groups
    left = [
        _kept(own.group, own, state.records[own.group.targets[0].path].rank_added)
        for own in placed
        if own.group.packed and own.group.device.type != "cpu" and not own.differing
        # Inference tensors can be put back in inference mode only.
        if own.group.plain
    ]
    for paths, group in structure.packed:
        own = paths & changing
        if own and paths.isdisjoint(state.records) and group.plain:
            targets = tuple(target for target in group.targets if target.path in own)
            left.append(_kept(group if own == paths else Group(targets), None, 0))
    return left


@dataclass(frozen=True)
class Room:
    """What may be kept beside a stack.

    Attributes:
        cache_bytes: Most bytes in host memory, deltas included.
        device_bytes: The same on devices; None where that depends on what is free.
        deltas: Bytes of the stack's deltas, which come first in host memory and on devices.
        needed: Device memory that composing the stack will take.
    """

    cache_bytes: int
    device_bytes: int | None
    deltas: int
    needed: int

    def choose(self, left: Sequence[KeptGroup], kept: KeptSets) -> list[KeptGroup]:
        """What of the groups that are left is kept; sets left earlier make room on devices."""
        chosen = []
        free = self.cache_bytes - self.deltas - cache.shelved_bytes(on_host=True)
        for own in left:
            if own.on_host and own.nbytes <= free:
                free -= own.nbytes
                chosen.append(own)
        on_device = [own for own in left if not own.on_host]
        while on_device and not self._fits(on_device):
            if not kept.drop_oldest():
                return chosen
        return chosen + on_device

    def _fits(self, on_device: Sequence[KeptGroup]) -> bool:
        if self.device_bytes is None:
            # What is kept has its memory already; the rest must be free beside it.
            devices = {own.group.device for own in on_device}
            return all(is_free(device, self.needed + DEVICE_RESERVE) for device in devices)
        held = cache.shelved_bytes(on_host=False) + max(cache.on_device.nbytes, self.deltas)
        return held + sum(own.nbytes for own in on_device) <= self.device_bytes


def _kept(group: Group, placed: PlacedGroup | None, rank_added: int) -> KeptGroup:
    modules = [target.module for target in group.targets]
    parameters = [factors_of(modules, name) for name in FACTORS]
    downs, ups = ([parameter.data for parameter in own] for own in parameters)
    ranks = 0 if placed is None else sum(layout.rank for layout in placed.layouts.values())
    deltas = GroupDeltas(group.targets, ranks, rank_added, downs, ups)
    return KeptGroup(group, deltas, placed, parameters)
