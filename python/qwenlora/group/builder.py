"""Deltas of whole groups of slots: read, moved, packed and checked together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora import cache
from qwenlora.delta.finite import non_finite
from qwenlora.group.deltas import GroupDeltas
from qwenlora.group.filler import Filler
from qwenlora.group.host_arena import arena_of
from qwenlora.group.load import Staged
from qwenlora.group.loader import Loader
from qwenlora.group.place import PlacedGroup, ShareLayout, factor_runs, may_overflow, parts_of
from qwenlora.group.transfer import transfer_to
from qwenlora.packing.layout import round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from qwenlora.group.arena import Arena, SlotFactors
    from qwenlora.group.group import Group, Share
    from qwenlora.group.load import Findings, Load
    from qwenlora.group.loads import KeptBytes, LoadPlan
    from qwenlora.group.sets import KeptGroup
    from qwenlora.group.transfer import Transfer
    from qwenlora.memory import DeviceMemory
    from qwenlora.model.target import Target
    from qwenlora.source.source import LoraSource, TensorFetcher
    from qwenlora.spec import LoraSpec
    from qwenlora.work.pending import Pending

__all__ = ["Built", "GroupBuilder"]


@dataclass(frozen=True)
class Built:
    """A group's deltas.

    Attributes:
        deltas: Those of the slots that are alike; and of slots that get as many ranks, all zero.
        rest: Slots that turned out to differ: their delta is all zero, or shares ranks that the
            others' do not. They are composed one by one.
    """

    deltas: list[GroupDeltas]
    rest: list[Target]


@dataclass(frozen=True, eq=False)
class _Laid:
    """New tensors of a group.

    Attributes:
        layouts: By LoRA, where its ranks lie.
        rank: Ranks that each slot will hold beyond its base.
        arena: All slots' tensors.
        factors: Every slot's `down` and `up`.
    """

    layouts: Mapping[int, ShareLayout]
    rank: int
    arena: Arena
    factors: Pending[SlotFactors]


@dataclass
class _Unchecked:
    """A load of which nobody knows yet whether its values stay finite."""

    load: Load
    layout: ShareLayout
    staged: Staged
    peak: Tensor | None
    arena: Arena
    differing: set[int]


class GroupReading:
    """Reading for groups that has begun, and the threads and memory that it takes."""

    def __init__(
        self,
        plan: LoadPlan,
        specs: Sequence[LoraSpec],
        sources: Sequence[LoraSource],
        fetchers: Sequence[TensorFetcher],
        *,
        threads: int | None,
    ) -> None:
        """Prepare to read.

        Args:
            plan: The groups and their loads.
            specs: The LoRAs of the stack.
            sources: Their plans and files.
            fetchers: Read their tensors.
            threads: Most threads; None takes what the machine has.
        """
        self.plan = plan
        self.filler = Filler(threads=threads)
        self.loader = Loader(
            plan.in_order, sources, fetchers, threads=threads, pinned=bool(plan.devices)
        )
        self._specs = specs
        self._transfers: dict[torch.device, Transfer] = {}

    def begin(self, memory: DeviceMemory) -> BegunReading:
        """Begin to read. What is begun is to be closed."""
        # Where reading takes new pinned memory the driver answers nobody else.
        for device in self.plan.devices:
            memory.ask(device)
        self.loader.begin()
        return BegunReading(self, memory)

    def spec(self, lora: int) -> LoraSpec:
        """One LoRA of the stack."""
        return self._specs[lora]

    def transfer(self, device: torch.device) -> Transfer:
        """Brings loads to a device."""
        if device not in self._transfers:
            largest = self.plan.largest(device)
            self._transfers[device] = transfer_to(device, largest, filler=self.filler)
        return self._transfers[device]

    def close(self) -> None:
        """Stop reading and let buffers go."""
        try:
            self.filler.close()
        finally:
            self.loader.close()
            for transfer in self._transfers.values():
                transfer.close()


class BegunReading:
    """Files are being read. Before a group is built, it is to be said what the caches may keep."""

    def __init__(self, reading: GroupReading, memory: DeviceMemory) -> None:
        self._reading = reading
        self._memory = memory

    def keeping(self, kept: KeptBytes) -> GroupBuilder:
        """Build groups from it, and keep as much of the deltas."""
        plan = self._reading.plan
        limits = {
            device: plan.device_limit(device, kept.device, self._memory) for device in plan.devices
        }
        return GroupBuilder(self._reading, host_bytes=kept.host, device_bytes=limits)


class GroupBuilder:
    """Builds the groups of one composition, in the order of their plan.

    Attributes:
        placed: The groups that were built, and how their deltas lie in the slots.
    """

    def __init__(
        self, reading: GroupReading, *, host_bytes: int, device_bytes: Mapping[torch.device, int]
    ) -> None:
        """`host_bytes` and `device_bytes` are the most that the caches may hold of the deltas."""
        self._reading = reading
        self._plan = reading.plan
        self._loader = reading.loader
        self._filler = reading.filler
        self._host_bytes = host_bytes
        self._device_bytes = device_bytes
        self.placed: list[PlacedGroup] = []
        self._unchecked: list[_Unchecked] = []
        self._sharing: dict[tuple[int, int], tuple[int, ...]] = {}

    @property
    def load_bytes(self) -> int:
        """Most bytes of a load."""
        return self._plan.load_bytes

    def build(self, group: Group, *, empty: Sequence[Target], tell: Callable[[int], None]) -> Built:
        """Build one group.

        Args:
            group: The next one.
            empty: More slots of the same path, which get as many ranks, all zero.
            tell: Is told how many slots are built next.
        """
        kept = None if empty else self._plan.kept_of(group)
        if kept is not None:
            return self._built_before(kept, tell)
        loads = self._plan.of_group(group)
        targets = (*group.targets, *empty)
        laid, taken = self._begin(group, targets, loads[: len(group.shares)])
        if empty:
            laid.arena.clear()
        differing: set[int] = set()
        if not loads:
            tell(len(targets))
        for done, load in enumerate(loads):
            begun, end = (len(targets) * at // len(loads) for at in (done, done + 1))
            tell(end - begun)
            staged = taken.pop(id(load), None) or self._loader.take(load)
            self._write(laid.arena, load, staged, laid.layouts[load.share.lora], differing)
        laid.arena.finish()
        placed = PlacedGroup(group, laid.layouts, frozenset(differing), len(empty))
        self.placed.append(placed)
        return _built(group, empty, laid, differing)

    def _begin(
        self, group: Group, targets: Sequence[Target], first: Sequence[Load]
    ) -> tuple[_Laid, dict[int, Staged]]:
        """Allocate for the targets, and take the first load of each LoRA, by `id`."""
        # Made while they are being read: it fits where modules share as they did before.
        expected = {load.share.lora: self._expected(load.share) for load in first}
        laid = self._laid(group, targets, expected)
        taken = {id(load): self._loader.take(load) for load in first}
        # What the first slot with a delta shares, the others share, or they are set apart.
        sharing = {load.share.lora: taken[id(load)].findings.first_sharing() for load in first}
        if sharing != expected:
            del laid
            laid = self._laid(group, targets, sharing)
            self._sharing |= {(lora, len(own)): own for lora, own in sharing.items()}
        return laid, taken

    def wait(self) -> None:
        """Return when host memory of all that was built is filled."""
        self._filler.wait()

    def check(self) -> None:
        """Check everything that was built, with one device synchronisation, and wait for it.

        Raises:
            NonFiniteError: A delta holds NaN or infinity.
        """
        # Host memory is still being filled: what has to be looked at there is waited for.
        self._judge()
        # All is read, so that threads can end, too.
        self._loader.close()
        self.wait()

    def _judge(self) -> None:
        unchecked, self._unchecked = self._unchecked, []
        by_device: dict[torch.device, list[tuple[Findings, Tensor]]] = defaultdict(list)
        for entry in unchecked:
            if entry.peak is not None:
                by_device[entry.peak.device].append((entry.staged.findings, entry.peak))
        for own in by_device.values():
            ends = torch.cat([peak.float() for _, peak in own]).abs().cpu()
            sizes = [peak.numel() for _, peak in own]
            for (findings, _), found in zip(own, torch.split(ends, sizes), strict=True):
                findings.peak = float(found.amax())
        bad = next(filter(None, map(_overflown, unchecked)), None)
        # Whoever catches the error may need the memory of what was built.
        unchecked.clear()
        if bad is not None:
            raise non_finite(bad)

    def drop_unchecked(self) -> None:
        """Let go of all that was built and is not checked yet: nobody will ask."""
        self._unchecked.clear()

    def _built_before(self, kept: KeptGroup, tell: Callable[[int], None]) -> Built:
        tell(len(kept.group.targets))
        if kept.placed is not None:
            self.placed.append(kept.placed)
        return Built([kept.deltas], [])

    def _expected(self, share: Share) -> tuple[int, ...]:
        """Guess which modules share a `down`: as many of the same LoRA did last, or none."""
        count = len(share.members)
        return self._sharing.get((share.lora, count), tuple(range(count)))

    def _laid(
        self, group: Group, targets: Sequence[Target], sharing: Mapping[int, tuple[int, ...]]
    ) -> _Laid:
        layouts, rank = self._layouts(group, sharing)
        arena = arena_of(targets, rank, row_order=group.row_order, filler=self._filler)
        return _Laid(layouts, rank, arena, arena.factors())

    def _layouts(
        self, group: Group, sharing: Mapping[int, tuple[int, ...]]
    ) -> tuple[dict[int, ShareLayout], int]:
        """Place each LoRA's ranks; returns the ranks of all, too. `sharing` is by LoRA."""
        layouts, end = {}, 0
        for share in group.shares:
            own = sharing[share.lora]
            starts, rank = share.starts(own)
            runs = factor_runs(group, share, self._reading.spec(share.lora))
            layouts[share.lora] = ShareLayout(own, starts, rank, end, runs)
            end += round_up(rank, group.targets[0].rank_multiple)
        return layouts, end

    def _write(
        self, arena: Arena, load: Load, staged: Staged, layout: ShareLayout, differing: set[int]
    ) -> None:
        """Write one load; slots in it that differ from the others are added to `differing`."""
        device = load.device
        transfer = self._reading.transfer(device)
        buffer = transfer.bring(staged, keep=self._keeps(device))
        for part in parts_of(load, buffer, layout):
            arena.write(part)
        begin = load.slots.start
        differing |= {begin + at for at in staged.findings.differing(layout.sharing)}
        peak = _peak(load, buffer) if staged.findings.peak is None else None
        self._unchecked.append(_Unchecked(load, layout, staged, peak, arena, differing))
        key = self._loader.key(load)
        kept = False
        if key is not None and staged.on_host and self._keeps(device):
            on_device = Staged(buffer, staged.findings)
            limit = self._device_bytes[device]
            kept = cache.on_device.put((key, device), on_device, limit_bytes=limit)
        limit = 0 if kept else self._host_bytes
        self._loader.release(load, staged, transfer.used(), keep_bytes=limit)

    def _keeps(self, device: torch.device) -> bool:
        """Tell if deltas that are copied to this device stay there."""
        return self._device_bytes.get(device, 0) > 0


def _peak(load: Load, buffer: Tensor) -> Tensor:
    """Least and greatest values of a load; NaN where there is one."""
    blocks = load.blocks
    begins = [*(block.begin for block in blocks[1:]), load.nbytes]
    dense = all(b.begin + b.nbytes == begin for b, begin in zip(blocks, begins, strict=True))
    if dense and len({block.dtype for block in blocks}) == 1:
        values = [buffer[: load.nbytes].view(blocks[0].dtype)]
    else:
        values = [block.of(buffer.view(block.dtype)).flatten().float() for block in blocks]
    ends: list[Tensor] = []
    for value in values:
        ends += [*torch.aminmax(value)]
    return torch.stack(ends)


def _overflown(entry: _Unchecked) -> Target | None:
    """The first slot that holds NaN or infinity; None where none does."""
    load = entry.load
    if not may_overflow(entry.staged, entry.layout, load.targets[0].dtype):
        return None
    finite = entry.arena.finite()
    bad = (
        target
        for slot, target in enumerate(load.targets)
        if not finite[slot] and slot not in entry.differing
    )
    return next(bad, None)


def _built(group: Group, empty: Sequence[Target], laid: _Laid, differing: set[int]) -> Built:
    ranks = sum(layout.rank for layout in laid.layouts.values())
    count, rank = len(group.targets), laid.rank
    own = [slot for slot in range(count) if slot not in differing]
    targets = group.targets if len(own) == count else tuple(group.targets[slot] for slot in own)
    alike = GroupDeltas(targets, ranks, rank, _of_slots(laid.factors, own))
    others = range(count, count + len(empty))
    zero = GroupDeltas(tuple(empty), 0, rank, _of_slots(laid.factors, others))
    return Built(
        deltas=[deltas for deltas in (alike, zero) if deltas.targets],
        rest=[group.targets[slot] for slot in sorted(differing)],
    )


def _of_slots(factors: Pending[SlotFactors], slots: Sequence[int]) -> Pending[SlotFactors]:
    """The factors of some slots."""

    def chosen(both: SlotFactors) -> SlotFactors:
        downs, ups = ([own[slot] for slot in slots] for own in both)
        return downs, ups

    return factors.then(chosen)
