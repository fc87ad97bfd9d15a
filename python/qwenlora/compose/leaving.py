"""Choosing the tensors of a stack that is left which are worth keeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora import cache
from qwenlora.group.allocation import is_part
from qwenlora.group.group import Group
from qwenlora.group.loads import KeptBytes
from qwenlora.group.sets import LeftGroup
from qwenlora.memory import DEVICE_RESERVE
from qwenlora.model.target import factors_of
from qwenlora.packing.layout import LowRankSide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.compose.structure import Structure
    from qwenlora.group.sets import KeptGroup, KeptSets
    from qwenlora.memory import DeviceMemory
    from qwenlora.model.state import AppliedState
    from qwenlora.spec import ComposeOptions

__all__ = ["Room", "base_versions", "groups_left", "make_room"]


def base_versions(structure: Structure, state: AppliedState) -> dict[str, tuple[int, ...]]:
    """Versions by path of the factors that hold their base: how often each was written in place."""
    versions: dict[str, tuple[int, ...]] = {}
    for paths, group in structure.packed:
        if not group.plain or paths <= state.records.keys():
            continue
        downs, ups = (factors_of(group.targets, side) for side in LowRankSide)
        for target, down, up in zip(group.targets, downs, ups, strict=True):
            if target.path not in state.records:
                versions[target.path] = (down._version, up._version)
    return versions


def groups_left(
    structure: Structure, state: AppliedState, changing: frozenset[str]
) -> list[LeftGroup]:
    """Choose the slots' tensors to keep before they are replaced.

    Args:
        structure: The model's slots.
        state: What is in them.
        changing: Paths of all slots that change.

    Returns:
        The composed groups on GPUs, where the set consists of groups alone; and the base tensors
        of slots that hold nothing else.
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
            first = factors_of(targets[:1], LowRankSide.DOWN)
            if own == paths or not is_part(first[0]):
                left.append(LeftGroup(group if own == paths else Group(targets), None, 0))
    return left


@dataclass(frozen=True)
class Room:
    """The memory in which left sets may be kept while a stack is in place.

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
        """Choose the left groups to keep; drop sets that were left earlier to make room."""
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
            # What is kept has its memory already; the rest must be free besides.
            devices = {own.group.device for own in on_device}
            rest = self.needed + self.deltas + DEVICE_RESERVE
            return all(self.memory.has(device, rest) for device in devices)
        held = cache.shelved_bytes(on_host=False) + self.deltas
        return held + nbytes <= self.device_bytes


def make_room(options: ComposeOptions, leaving: Sequence[KeptGroup]) -> KeptBytes:
    """Drop cached deltas until the sets that were left, or are being left, fit as well.

    Returns:
        The most bytes that the caches may hold of deltas now.
    """
    held = {
        on_host: cache.shelved_bytes(on_host=on_host)
        + sum(own.nbytes for own in leaving if own.on_host is on_host)
        for on_host in (True, False)
    }
    host_bytes = max(0, options.cache_bytes - held[True])
    cache.pieces.fit(host_bytes)
    device_bytes = options.device_cache_bytes
    if device_bytes is not None:
        device_bytes = max(0, device_bytes - held[False])
        cache.on_device.fit(device_bytes)
    return KeptBytes(host_bytes, device_bytes)
