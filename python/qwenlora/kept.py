"""Tensors of slots under sets that were left, kept where there is room: a return moves pointers.

On a device the base branch is held once while much memory is not free, in the composed tensors, and
copied out of them; so are composed sets packed anew. Where more is free than anything will ask for,
and for the base in host memory, which is slower to copy than to keep, the tensors themselves stay.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenlora import cache
from qwenlora.allocation import is_part
from qwenlora.bulk import Group
from qwenlora.deltas import GroupDeltas
from qwenlora.memory import DEVICE_RESERVE, DeviceMemory
from qwenlora.pending import Pending
from qwenlora.targets import FACTORS, factors_of

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.arena import SlotFactors
    from qwenlora.grouped import PlacedGroup
    from qwenlora.spec import ComposeOptions
    from qwenlora.state import AppliedState
    from qwenlora.structure import Structure
    from qwenlora.targets import Target

__all__ = [
    "KeptGroup",
    "KeptSets",
    "LeftGroup",
    "Room",
    "base_versions",
    "groups_left",
    "rest_beside",
]

_MAX_SETS = 4
"""Sets that are kept: those that a host alternates between."""


@dataclass(frozen=True, eq=False)
class LeftGroup:
    """A group that is about to be left.

    Attributes:
        group: The slots.
        placed: How the LoRAs lie in them; None for the base.
        rank_added: Ranks that each slot holds beyond its base.
    """

    group: Group
    placed: PlacedGroup | None
    rank_added: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        first = self.group.targets[0]
        each = first.base_bytes + first.rank_bytes * self.rank_added
        return each * len(self.group.targets)

    @property
    def on_host(self) -> bool:
        """Whether they are in host memory."""
        return self.group.device.type == "cpu"

    def kept(self) -> KeptGroup:
        """The same with its tensors."""
        modules = [target.module for target in self.group.targets]
        parameters = [factors_of(modules, name) for name in FACTORS]
        downs, ups = ([parameter.data for parameter in own] for own in parameters)
        layouts = {} if self.placed is None else self.placed.layouts
        ranks = sum(layout.rank for layout in layouts.values())
        factors: SlotFactors = (downs, ups)
        deltas = GroupDeltas(self.group.targets, ranks, self.rank_added, Pending.ready(factors))
        return KeptGroup(self.group, self.placed, self.rank_added, deltas, parameters)


@dataclass(frozen=True, eq=False)
class KeptGroup(LeftGroup):
    """A group's tensors under a set.

    Attributes:
        deltas: Their packed factors, as they were in place.
        parameters: The layers' downs and ups, whose tensors these are.
    """

    deltas: GroupDeltas
    parameters: Sequence[Sequence[Tensor]]

    def of(self, targets: Sequence[Target]) -> bool:
        """Whether these are the slots."""
        return self.group.targets is targets or self.group.targets == targets


class KeptSets:
    """The sets that one model left, the oldest first; they go with its structure."""

    def __init__(self) -> None:
        self._sets: dict[Hashable, dict[str, KeptGroup]] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        self._watches: list[weakref.finalize[..., Any]] = []
        # Entered again by finalizers.
        self._lock = threading.RLock()
        cache.register(self)

    def nbytes(self, *, on_host: bool) -> int:
        """Bytes held, on the host or on devices."""
        with self._lock:
            own = [kept for groups in self._sets.values() for kept in groups.values()]
        return sum(kept.nbytes for kept in own if kept.on_host is on_host)

    def holds(self, key: Hashable) -> bool:
        """Whether something of a set is kept."""
        with self._lock:
            return key in self._sets

    def take(self, key: Hashable) -> Mapping[str, KeptGroup]:
        """A set's groups by their first paths; about to be in place, they are kept no longer."""
        with self._lock:
            return self._sets.pop(key, {})

    def check(self, versions: Mapping[str, tuple[int, ...]]) -> None:
        """Drop all where somebody has written to a base since it was last seen.

        Args:
            versions: Of slots that hold their base, how often each factor was written to in place.
        """
        with self._lock:
            if any(self._versions.get(path, own) != own for path, own in versions.items()):
                self._sets.clear()
            self._versions |= versions

    def watch(self, live: Iterable[Tensor]) -> None:
        """Drop all when a tensor's memory is let go: the model is moved, or taken apart.

        Args:
            live: Tensors of the set that is in place now; none while that changes.
        """
        for watch in self._watches:
            watch.detach()
        self._watches.clear()
        for tensor in live if self._sets else ():
            watch = weakref.finalize(tensor.untyped_storage(), _clear, weakref.ref(self))
            watch.atexit = False
            self._watches.append(watch)

    def put(self, key: Hashable, groups: Iterable[KeptGroup]) -> None:
        """Keep what a set's slots held; the oldest sets are dropped past a few."""
        # The parameters hold what is in place now.
        kept = {own.group.targets[0].path: replace(own, parameters=()) for own in groups}
        with self._lock:
            if kept:
                self._sets[key] = self._sets.pop(key, {}) | kept
            while len(self._sets) > _MAX_SETS:
                del self._sets[next(iter(self._sets))]

    def drop_oldest(self, *, on_host: bool) -> bool:
        """Drop one set's tensors on the host, or on devices; whether there was one."""
        with self._lock:
            for key, groups in self._sets.items():
                rest = {path: own for path, own in groups.items() if own.on_host is not on_host}
                if len(rest) < len(groups):
                    self._keep_of(key, rest)
                    return True
        return False

    def clear_devices(self) -> None:
        """Drop what is on devices."""
        while self.drop_oldest(on_host=False):
            pass

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._sets.clear()

    def _keep_of(self, key: Hashable, rest: dict[str, KeptGroup]) -> None:
        if rest:
            self._sets[key] = rest
        else:
            del self._sets[key]


def _clear(kept: weakref.ref[KeptSets]) -> None:
    own = kept()
    if own is not None:
        own.clear()


def base_versions(structure: Structure, state: AppliedState) -> dict[str, tuple[int, ...]]:
    """How often the factors of slots that hold their base were written to in place, by path."""
    versions: dict[str, tuple[int, ...]] = {}
    for paths, group in structure.packed:
        if not group.plain or paths <= state.records.keys():
            continue
        modules = [target.module for target in group.targets]
        downs, ups = (factors_of(modules, name) for name in FACTORS)
        for target, down, up in zip(group.targets, downs, ups, strict=True):
            if target.path not in state.records:
                versions[target.path] = (down._version, up._version)
    return versions


def groups_left(
    structure: Structure, state: AppliedState, changing: frozenset[str]
) -> list[LeftGroup]:
    """What of the slots that are about to be left may be kept.

    Args:
        structure: The model's slots.
        state: What is in them.
        changing: Paths of all slots that change.

    Returns:
        The composed groups on GPUs, where the set consists of groups alone; and the base's of slots
        that hold nothing else.
    """
    placed = () if structure.placed is None else structure.placed.groups
    left = [
        LeftGroup(own.group, own, state.records[own.group.targets[0].path].rank_added)
        for own in placed
        if own.group.packed and own.group.device.type == "cuda" and not own.differing
        # Inference tensors can be put back in inference mode only.
        if own.group.plain
    ]
    for paths, group in structure.packed:
        own = paths & changing
        kept_there = group.device.type in ("cpu", "cuda") and group.plain
        if own and kept_there and paths.isdisjoint(state.records):
            targets = tuple(target for target in group.targets if target.path in own)
            first = factors_of([targets[0].module], FACTORS[0])
            if own == paths or not is_part(first[0]):
                left.append(LeftGroup(group if own == paths else Group(targets), None, 0))
    return left


@dataclass(frozen=True)
class Room:
    """What may be kept beside a stack.

    Attributes:
        cache_bytes: Most bytes in host memory, deltas included.
        device_bytes: The same on devices; None where that depends on what is free.
        deltas: Bytes of the stack's deltas, which come first in host memory and on devices.
        needed: Device memory that composing the stack will take.
        memory: What devices have free.
    """

    cache_bytes: int
    device_bytes: int | None
    deltas: int
    needed: int
    memory: DeviceMemory

    def choose(self, left: Sequence[LeftGroup], kept: KeptSets) -> list[LeftGroup]:
        """What of the groups that are left is kept; sets left earlier make room."""
        while self._host_bytes() < 0 and kept.drop_oldest(on_host=True):
            pass
        chosen, free = [], self._host_bytes()
        for own in left:
            if own.on_host and own.nbytes <= free:
                free -= own.nbytes
                chosen.append(own)
        on_device = [own for own in left if not own.on_host]
        nbytes = sum(own.nbytes for own in on_device)
        if self.device_bytes is not None and self.deltas + nbytes > self.device_bytes:
            on_device = []
        while on_device and not self._fits(on_device, nbytes):
            if not kept.drop_oldest(on_host=False):
                return chosen
            self.memory.changed()
        return chosen + on_device

    def _host_bytes(self) -> int:
        return self.cache_bytes - self.deltas - cache.shelved_bytes(on_host=True)

    def _fits(self, on_device: Sequence[LeftGroup], nbytes: int) -> bool:
        if self.device_bytes is None:
            # What is kept has its memory already; the rest must be free beside it.
            devices = {own.group.device for own in on_device}
            rest = self.needed + self.deltas + DEVICE_RESERVE
            return all(self.memory.has(device, rest) for device in devices)
        held = cache.shelved_bytes(on_host=False) + self.deltas
        return held + nbytes <= self.device_bytes


def rest_beside(options: ComposeOptions, leaving: Sequence[KeptGroup]) -> ComposeOptions:
    """The options with what sets that were left, and are being left, leave to deltas.

    Deltas beyond that are dropped from the caches.
    """
    held = {
        on_host: cache.shelved_bytes(on_host=on_host)
        + sum(own.nbytes for own in leaving if own.on_host is on_host)
        for on_host in (True, False)
    }
    cache_bytes = max(0, options.cache_bytes - held[True])
    cache.pieces.fit(cache_bytes)
    device_bytes = options.device_cache_bytes
    if device_bytes is not None:
        device_bytes = max(0, device_bytes - held[False])
        cache.on_device.fit(device_bytes)
    return replace(options, cache_bytes=cache_bytes, device_cache_bytes=device_bytes)
