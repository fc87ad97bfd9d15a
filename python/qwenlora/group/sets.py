"""Tensors of slots under sets that were left, kept where there is room: a return moves pointers.

On a device the base branch is held once while much memory is not free, in the composed tensors, and
copied out of them; so are composed sets packed anew. Where more is free than anything will ask for,
and for the base in host memory, which is slower to copy than to keep, the tensors themselves stay.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenlora import cache
from qwenlora.group.deltas import GroupDeltas
from qwenlora.model.target import factors_of
from qwenlora.packing.layout import LowRankSide
from qwenlora.work.pending import Pending

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from qwenlora.group.arena import SlotFactors
    from qwenlora.group.group import Group
    from qwenlora.group.place import PlacedGroup
    from qwenlora.model.target import Target

__all__ = ["KeptGroup", "KeptSets", "LeftGroup"]


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
        """True where the slots are in host memory."""
        return self.group.device.type == "cpu"

    def kept(self) -> KeptGroup:
        """The same with its tensors."""
        parameters = [factors_of(self.group.targets, side) for side in LowRankSide]
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
        """Tell if these are the group's slots."""
        return self.group.targets is targets or self.group.targets == targets


class KeptSets:
    """The sets that one model left, the oldest first; they go with its structure.

    A finalizer may drop all at any moment, in the midst of a method, too. Another dictionary then
    takes the place of the one that the method has.
    """

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
            sets = self._sets
            own = [kept for groups in sets.values() for kept in groups.values()]
        return sum(kept.nbytes for kept in own if kept.on_host is on_host)

    def holds(self, key: Hashable) -> bool:
        """Tell if tensors of a set are kept."""
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
                self._sets = {}
            self._versions |= versions

    def watch(self, live: Iterable[Tensor]) -> None:
        """Drop all when a tensor's memory is freed: the model is moved, or taken apart.

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
            sets = self._sets
            if kept:
                sets[key] = sets.pop(key, {}) | kept
            while len(sets) > _MAX_SETS:
                del sets[next(iter(sets))]

    def drop_oldest(self, *, on_host: bool) -> bool:
        """Drop one set's tensors on the host, or on devices; whether there was one."""
        with self._lock:
            sets = self._sets
            for key, groups in sets.items():
                rest = {path: own for path, own in groups.items() if own.on_host is not on_host}
                if len(rest) < len(groups):
                    if rest:
                        sets[key] = rest
                    else:
                        del sets[key]
                    return True
        return False

    def clear_devices(self) -> None:
        """Drop what is on devices."""
        while self.drop_oldest(on_host=False):
            pass

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._sets = {}


def _clear(kept: weakref.ref[KeptSets]) -> None:
    own = kept()
    if own is not None:
        own.clear()
