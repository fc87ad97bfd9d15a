"""The plan of all reading of a composition: which loads each group takes, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora import cache
from qwenlora.delta.balance import is_narrow
from qwenlora.group.load import loads_of
from qwenlora.group.transfer import BUFFERS
from qwenlora.memory import DEVICE_RESERVE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from qwenlora.group.group import Group
    from qwenlora.group.load import Load
    from qwenlora.group.sets import KeptGroup
    from qwenlora.memory import DeviceMemory

__all__ = ["KeptBytes", "LoadPlan"]


@dataclass(frozen=True)
class KeptBytes:
    """The most bytes of deltas that the caches may hold.

    Attributes:
        host: In host memory.
        device: On a device; None where that depends on the memory it has free.
    """

    host: int
    device: int | None


@dataclass(frozen=True, eq=False)
class LoadPlan:
    """The loads of a composition's groups.

    Attributes:
        groups: The groups, in the order in which they are built.
        loads: The loads of each group; none for a group whose tensors were kept.
        load_bytes: Most bytes of a load, unless one slot takes more.
        kept: Groups' tensors that were kept under this same set, by their first paths.
        needed: Device memory that the slots will take.
    """

    groups: Sequence[Group]
    loads: Sequence[Sequence[Load]]
    load_bytes: int
    kept: Mapping[str, KeptGroup]
    needed: int

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        *,
        staging_bytes: int,
        kept: Mapping[str, KeptGroup],
        needed: int,
    ) -> LoadPlan:
        """Plan the reading for these groups within so much staging memory."""
        # Pinned memory is given out in powers of two.
        load_bytes = 1 << max(1, staging_bytes // BUFFERS).bit_length() - 1
        if any(is_narrow(group.targets[0].dtype) for group in groups):
            # Their values are looked at, and moved, in float32.
            load_bytes = max(1, load_bytes // 4)
        loads = [[] if _usable(kept, group) else loads_of(group, load_bytes) for group in groups]
        return cls(groups, loads, load_bytes, kept, needed)

    @property
    def in_order(self) -> list[Load]:
        """All loads, in the order in which they are used."""
        return [load for own in self.loads for load in own]

    @property
    def devices(self) -> set[torch.device]:
        """The GPUs of the groups."""
        return {group.device for group in self.groups if group.device.type == "cuda"}

    def of_group(self, group: Group) -> Sequence[Load]:
        """The loads of one of the groups."""
        return next(own for one, own in zip(self.groups, self.loads, strict=True) if one is group)

    def kept_of(self, group: Group) -> KeptGroup | None:
        """The kept tensors of these slots, or None."""
        return _usable(self.kept, group)

    def largest(self, device: torch.device) -> int:
        """Bytes of the largest load for a device."""
        return max(load.nbytes for load in self.in_order if load.device == device)

    def device_limit(self, device: torch.device, limit: int | None, memory: DeviceMemory) -> int:
        """Most bytes that the cache on the device may hold; 0 where this stack would not fit.

        Args:
            device: A GPU.
            limit: The most that the caller allows; None leaves `DEVICE_RESERVE` free.
            memory: The devices' free memory.
        """
        total = sum(load.nbytes for load in self.in_order)
        if limit is None:
            kept, rest = cache.on_device.nbytes, self.needed + DEVICE_RESERVE
            if memory.has(device, total + rest):
                limit = total + kept
            else:
                limit = total if memory.has(device, total - kept + rest) else 0
        return limit if total <= limit else 0


def _usable(kept: Mapping[str, KeptGroup], group: Group) -> KeptGroup | None:
    found = kept.get(group.targets[0].path)
    if found is None or not found.of(group.targets):
        return None
    # Deltas that left the base in place were all zero, which is to be found and said again.
    return found if found.rank_added or not group.shares else None
