"""Deltas of whole groups of slots: read, moved, packed and checked together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qwenlora.arena import Arena, Part, arena_of
from qwenlora.deltas import GroupDeltas, non_finite
from qwenlora.layout import TILE, LowRankSide, round_up
from qwenlora.plan import SlotKind
from qwenlora.staging import Load, Loader, Staged, loads_of
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
    extremes: Tensor
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

    def __post_init__(self) -> None:
        limit = self.options.staging_bytes // STAGES
        self._loads = [loads_of(group, limit) for group in self.groups]
        pinned = any(group.targets[0].device.type == "cuda" for group in self.groups)
        self._loader = Loader(
            [load for own in self._loads for load in own],
            self.sources,
            self.fetchers,
            self.options,
            pinned=pinned,
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
        if not unchecked:
            return
        flat = torch.cat([entry.extremes.flatten() for entry in unchecked]).cpu()
        found = torch.split(flat, [entry.extremes.numel() for entry in unchecked])
        for entry, values in zip(unchecked, found, strict=True):
            entry.staged.extremes = values.view(entry.extremes.shape)
            _require_finite(entry, entry.staged.extremes)

    def close(self) -> None:
        """Stop reading and let buffers go."""
        self._loader.close()
        for transfer in self._transfers.values():
            transfer.close()

    def _layouts(
        self, group: Group, first: Sequence[tuple[Load, Staged]]
    ) -> tuple[dict[int, _Layout], int]:
        packed = group.targets[0].kind is SlotKind.SVDQ
        layouts, end = {}, 0
        for load, staged in first:
            stack = load.stack
            # What the first slot with a delta shares, the others share, or they are set apart.
            slot = next((i for i, zero in enumerate(staged.zero) if not zero), 0)
            sharing = staged.sharing[slot]
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
        buffer = transfer.bring(staged)
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
            for slot, sharing, zero in zip(load.slots, staged.sharing, staged.zero, strict=True)
            if zero or sharing != layout.sharing
        }
        extremes = _extremes(tensors) if staged.extremes is None else staged.extremes
        self._unchecked.append(_Checked(load, layout, staged, extremes, differing))
        transfer.used()
        self._loader.release(load, staged, transfer.host_is_free())
        return differing

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


STAGES = 4
"""Loads that the staging memory holds: those in device buffers, and what packing takes beside."""
_DOWN = LowRankSide.DOWN


def _extremes(tensors: Sequence[Tensor]) -> Tensor:
    """(blocks, slots, 2) float32: least and greatest value; NaN where there is one."""
    flat = [tensor.flatten(1) for tensor in tensors]
    found = [torch.stack((t.amin(dim=1), t.amax(dim=1)), dim=1) for t in flat]
    return torch.stack(found).to(torch.float32)


def _require_finite(entry: _Checked, extremes: Tensor) -> None:
    """Round the extremes as all values are rounded: both steps keep the order of values."""
    load, layout = entry.load, entry.layout
    dtype = load.group.targets[0].dtype
    factors = torch.tensor(
        [1.0 if b.side is _DOWN else layout.factors[b.member] for b in load.blocks]
    )
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
