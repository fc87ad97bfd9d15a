"""Deltas of whole groups of slots: read, moved, packed and checked together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qwenlora import cache
from qwenlora.arena import Arena, Part, arena_of
from qwenlora.deltas import GroupDeltas, non_finite
from qwenlora.layout import TILE, LowRankSide, round_up
from qwenlora.memory import is_free
from qwenlora.plan import SlotKind
from qwenlora.staging import Findings, Load, Loader, Staged, loads_of
from qwenlora.transfer import Transfer, transfer_to

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.bulk import Group, Stack
    from qwenlora.source import LoraSource, TensorFetcher
    from qwenlora.spec import ComposeOptions, LoraSpec
    from qwenlora.targets import Target

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


@dataclass(frozen=True)
class _Layout:
    """Where one LoRA's ranks lie in a group's arena."""

    sharing: tuple[int, ...]
    starts: tuple[int, ...]
    rank: int
    rank_begin: int
    factors: tuple[float, ...]


@dataclass
class _Checked:
    """A load of which nobody knows yet whether its values stay finite."""

    load: Load
    layout: _Layout
    staged: Staged
    extremes: Tensor | None
    differing: set[int]


@dataclass
class GroupBuilder:
    """Builds the groups of one composition, in the order in which they were announced.

    Attributes:
        groups: All that will be built.
        specs: The LoRAs of the stack.
        sources: Their plans and files.
        fetchers: Read their tensors.
        options: How to compose.
    """

    groups: Sequence[Group]
    specs: Sequence[LoraSpec]
    sources: Sequence[LoraSource]
    fetchers: Sequence[TensorFetcher]
    options: ComposeOptions
    _loads: list[list[Load]] = field(init=False)
    _loader: Loader = field(init=False)
    _transfers: dict[torch.device, Transfer] = field(init=False, default_factory=dict)
    _unchecked: list[_Checked] = field(init=False, default_factory=list)
    _device_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        limit = self.options.staging_bytes // STAGES
        self._loads = [loads_of(group, limit) for group in self.groups]
        devices = {group.targets[0].device for group in self.groups}
        device = next((device for device in devices if device.type == "cuda"), None)
        self._device_bytes = 0 if device is None else self._device_limit(device)
        self._loader = Loader(
            [load for own in self._loads for load in own],
            self.sources,
            self.fetchers,
            self.options,
            pinned=device is not None,
        )

    def build(self, group: Group, *, empty: Sequence[Target], tell: Callable[[int], None]) -> Built:
        """Build one group.

        Args:
            group: The next one.
            empty: More slots of the same path, which get as many ranks, all zero.
            tell: Is told how many slots are built next.
        """
        index = next(i for i, own in enumerate(self.groups) if own is group)
        loads = self._loads[index]
        first = loads[: len(group.stacks)]
        taken = {id(load): self._loader.take(load) for load in first}
        layouts, rank = self._layouts(group, [(load, taken[id(load)]) for load in first])
        targets = (*group.targets, *empty)
        arena = arena_of(targets, rank, row_order=group.row_order)
        if empty:
            arena.clear()
        differing: set[int] = set()
        if not loads:
            tell(len(targets))
        for done, load in enumerate(loads):
            begun, end = (len(targets) * at // len(loads) for at in (done, done + 1))
            tell(end - begun)
            staged = taken.pop(id(load), None) or self._loader.take(load)
            differing |= self._write(arena, load, staged, layouts[load.stack.lora])
        return _built(group, empty, arena, layouts.values(), differing, rank)

    def check(self) -> None:
        """Check everything built since the last time, with one device synchronisation.

        Raises:
            NonFiniteError: A delta holds NaN or infinity.
        """
        unchecked, self._unchecked = self._unchecked, []
        by_device: dict[torch.device, list[tuple[Findings, Tensor]]] = defaultdict(list)
        for entry in unchecked:
            if entry.extremes is not None:
                found = (entry.staged.findings, entry.extremes)
                by_device[entry.extremes.device].append(found)
        for own in by_device.values():
            flat = torch.cat([extremes.flatten() for _, extremes in own]).cpu()
            sizes = [extremes.numel() for _, extremes in own]
            for (findings, extremes), values in zip(own, torch.split(flat, sizes), strict=True):
                findings.extremes = values.view(extremes.shape)
                findings.peaks = tuple(findings.extremes.abs().amax(dim=(1, 2)).tolist())
        for entry in unchecked:
            _require_finite(entry)

    def close(self) -> None:
        """Stop reading and let buffers go."""
        self._loader.close()
        for transfer in self._transfers.values():
            transfer.close()

    def _device_limit(self, device: torch.device) -> int:
        """Most bytes that the cache on the device may hold; 0 where this stack would not fit."""
        total = sum(load.nbytes for own in self._loads for load in own)
        limit = self.options.device_cache_bytes
        if limit is None:
            more = total - cache.on_device.nbytes
            limit = total if is_free(device, more + DEVICE_RESERVE) else 0
        return limit if total <= limit else 0

    def _layouts(
        self, group: Group, first: Sequence[tuple[Load, Staged]]
    ) -> tuple[dict[int, _Layout], int]:
        packed = group.targets[0].kind is SlotKind.SVDQ
        layouts, end = {}, 0
        for load, staged in first:
            stack = load.stack
            # What the first slot with a delta shares, the others share, or they are set apart.
            findings = staged.findings
            slot = next((i for i, zero in enumerate(findings.zero) if not zero), 0)
            sharing = findings.sharing[slot]
            starts, rank = stack.starts(sharing)
            layouts[stack.lora] = _Layout(sharing, starts, rank, end, self._factors(stack))
            end += round_up(rank, TILE) if packed else rank
        return layouts, end

    def _factors(self, stack: Stack) -> tuple[float, ...]:
        strength = self.specs[stack.lora].strength
        # In float64, rounded once to float32, as numbers that hold such a value.
        factors = torch.tensor([m.scale for m in stack.members], dtype=torch.float64) * strength
        return tuple(factors.to(torch.float32).tolist())

    def _write(self, arena: Arena, load: Load, staged: Staged, layout: _Layout) -> set[int]:
        """Write one load; the slots in it that differ from the others."""
        device = load.group.targets[0].device
        transfer = self._transfer(device, load)
        buffer = transfer.bring(staged, keep=self._keeps(device))
        tensors = [block.of(buffer) for block in load.blocks]
        sides = [block.side for block in load.blocks]
        arena.write(
            Part(
                slots=load.slots,
                members=load.stack.members,
                downs=[t for t, side in zip(tensors, sides, strict=True) if side is _DOWN],
                ups=[t for t, side in zip(tensors, sides, strict=True) if side is not _DOWN],
                factors=layout.factors,
                starts=layout.starts,
                rank=layout.rank,
                rank_begin=layout.rank_begin,
            )
        )
        differing = {
            slot
            for slot, sharing, zero in zip(
                load.slots, staged.findings.sharing, staged.findings.zero, strict=True
            )
            if zero or sharing != layout.sharing
        }
        extremes = _extremes(tensors) if staged.findings.extremes is None else None
        self._unchecked.append(_Checked(load, layout, staged, extremes, differing))
        self._loader.release(load, staged, transfer.used())
        key = self._loader.key(load)
        if key is not None and staged.on_host and self._keeps(device):
            kept = Staged(buffer, staged.findings)
            cache.on_device.put((key, device), kept, limit_bytes=self._device_bytes)
        return differing

    def _keeps(self, device: torch.device) -> bool:
        """Whether what goes to this device stays there."""
        return device.type == "cuda" and self._device_bytes > 0

    def _transfer(self, device: torch.device, load: Load) -> Transfer:
        if device not in self._transfers:
            largest = max(
                load.nbytes
                for own in self._loads
                for load in own
                if load.group.targets[0].device == device
            )
            self._transfers[device] = transfer_to(device, largest)
        return self._transfers[device]


DEVICE_RESERVE = 8 << 30
"""Device memory that must stay free beside deltas kept there: for activations and the decoder."""
STAGES = 4
"""Loads that the staging memory holds: those in device buffers, and what packing takes beside."""
_DOWN = LowRankSide.DOWN


def _extremes(tensors: Sequence[Tensor]) -> Tensor:
    """(blocks, slots, 2) float32: least and greatest value; NaN where there is one."""
    flat = [tensor.flatten(1) for tensor in tensors]
    found = [torch.stack((t.amin(dim=1), t.amax(dim=1)), dim=1) for t in flat]
    return torch.stack(found).to(torch.float32)


def _require_finite(entry: _Checked) -> None:
    load, layout, findings = entry.load, entry.layout, entry.staged.findings
    dtype = load.group.targets[0].dtype
    scales = [1.0 if b.side is _DOWN else layout.factors[b.member] for b in load.blocks]
    # Rounding may reach the next number, but not twice the number.
    limit = torch.finfo(dtype).max / 2
    if all(p * abs(f) < limit for p, f in zip(findings.peaks, scales, strict=True)):
        return
    # The extremes are rounded as all values are: both steps keep the order of values.
    extremes, factors = findings.extremes, torch.tensor(scales)
    if extremes is None:
        raise RuntimeError("a load was not looked at before it was checked")
    # (blocks, slots, 2) x (blocks, 1, 1)
    finite = torch.isfinite((extremes * factors.view(-1, 1, 1)).to(dtype)).flatten(2).all(2).all(0)
    for slot, ok in zip(load.slots, finite.tolist(), strict=True):
        if not ok and slot not in entry.differing:
            target = load.group.targets[slot]
            raise non_finite(target)


def _built(
    group: Group,
    empty: Sequence[Target],
    arena: Arena,
    layouts: Iterable[_Layout],
    differing: set[int],
    rank: int,
) -> Built:
    ranks = sum(layout.rank for layout in layouts)
    downs, ups = arena.factors()
    own = [slot for slot in range(len(group.targets)) if slot not in differing]
    count = len(group.targets)
    alike = GroupDeltas(
        targets=tuple(group.targets[slot] for slot in own),
        rank=ranks,
        rank_added=rank,
        downs=[downs[slot] for slot in own],
        ups=[ups[slot] for slot in own],
    )
    zero = GroupDeltas(tuple(empty), 0, rank, downs[count:], ups[count:])
    return Built(
        deltas=[deltas for deltas in (alike, zero) if deltas.targets],
        rest=[group.targets[slot] for slot in sorted(differing)],
    )
