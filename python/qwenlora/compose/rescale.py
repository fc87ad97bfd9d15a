"""A change of strengths alone: the same deltas, scaled anew where they lie.

Only `up` holds the strength, so only the LoRAs' own elements of it are written; base tensors, ranks
and pointers stay. In float16 a power of two may lie in `down`, another one at another strength:
there both are written. Everything needed is at hand before the first write, and an error writes the
old strengths again: bit for bit what was there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenlora import cache
from qwenlora.delta.balance import is_narrow
from qwenlora.group.allocation import rest_from
from qwenlora.group.arena import write_branch_downs, write_branch_ups
from qwenlora.group.host_arena import rewrite_packed
from qwenlora.group.load import Staged, loads_of
from qwenlora.group.place import factor_runs, may_overflow, parts_of
from qwenlora.group.transfer import HostTransfer, transfer_to
from qwenlora.model.target import factors_of
from qwenlora.packing.factor import in_fragments
from qwenlora.packing.layout import LowRankSide
from qwenlora.slots.branch import BRANCH_DOWN, BRANCH_UP

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from qwenlora.group.arena import Part
    from qwenlora.group.group import Group
    from qwenlora.group.load import Load
    from qwenlora.group.partition import Partition
    from qwenlora.group.place import PlacedGroup, ShareLayout
    from qwenlora.group.transfer import Transfer
    from qwenlora.lora_set import LoraSet
    from qwenlora.spec import LoraSpec, Progress

__all__ = ["PlacedStack", "Rescaling", "prepare_rescaling"]


@dataclass(frozen=True, eq=False)
class PlacedStack:
    """A composition that consists of groups alone.

    Attributes:
        planned: What was planned.
        groups: How the groups lie in their slots.
        load_bytes: Most bytes of a load.
    """

    planned: Partition
    groups: Sequence[PlacedGroup]
    load_bytes: int


@dataclass(frozen=True, eq=False)
class _Write:
    """One load to be scaled anew in its group's arena of `up`, and of `down` where that changes."""

    group: Group
    arena: Tensor
    downs: Tensor | None
    load: Load
    staged: Staged
    old: ShareLayout
    new: ShareLayout
    threads: int | None

    @property
    def crosses(self) -> bool:
        """True where its deltas are in host memory, and its slots are not."""
        return self.staged.on_host and self.arena.device.type != "cpu"

    def run(self, layout: ShareLayout, transfer: Transfer) -> None:
        buffer = transfer.bring(self.staged, keep=False)
        for part in parts_of(self.load, buffer, layout):
            self._write(part.balanced(self.arena.dtype))
        transfer.used()

    def _write(self, part: Part) -> None:
        if self.group.packed:
            self._rewrite(part)
            return
        if self.downs is not None:
            write_branch_downs(self.downs, part)
        write_branch_ups(self.arena, part, row_order=self.group.row_order)

    def _rewrite(self, part: Part) -> None:
        base_rank = self.group.targets[0].row.base_rank
        for side, arena in ((LowRankSide.DOWN, self.downs), (LowRankSide.UP, self.arena)):
            if arena is not None:
                rewrite_packed(side, arena, part, base_rank=base_rank, threads=self.threads)


class Rescaling:
    """A change of strengths: one `Change` of all slots that the LoRAs lie in.

    Attributes:
        placed: How the groups lie in their slots with the new strengths.
    """

    def __init__(
        self, placed: PlacedStack, writes: Sequence[_Write], *, progress: Progress | None
    ) -> None:
        self.placed = placed
        self._writes = writes
        self._progress = progress
        self._transfers: dict[torch.device, Transfer] = {}
        for device in {write.arena.device for write in writes}:
            crossing = [w.load.nbytes for w in writes if w.crosses and w.arena.device == device]
            transfer = transfer_to(device, max(crossing)) if crossing else HostTransfer()
            # All memory that writing takes is had before the first write.
            transfer.reserve()
            self._transfers[device] = transfer

    def make(self) -> None:
        """Write the new strengths."""
        done = 0
        for write in self._writes:
            done = self._tell(done, len(write.load.slots))
            write.run(write.new, self._transfers[write.arena.device])

    def unmake(self) -> None:
        """Write the old strengths."""
        for write in self._writes:
            write.run(write.old, self._transfers[write.arena.device])

    def close(self) -> None:
        """Let go of what writing took."""
        for transfer in self._transfers.values():
            transfer.close()

    def _tell(self, done: int, slots: int) -> int:
        total = sum(len(own.group.targets) * len(own.layouts) for own in self.placed.groups)
        for at in range(done, done + slots):
            if self._progress is not None:
                self._progress("write", at, total)
        return done + slots


def prepare_rescaling(placed: PlacedStack, planned: Partition, wanted: LoraSet) -> Rescaling | None:
    """Prepare a change of strengths.

    Args:
        placed: What is in the slots, as the last composition left it.
        planned: What is wanted, planned.
        wanted: What is wanted.

    Returns:
        The writes; None where something else differs, where deltas would have to be read, or values
        may leave their range.
    """
    if placed.planned is not planned:
        return None
    groups = [_scaled(own, wanted.specs) for own in placed.groups]
    writes: list[_Write] = []
    for old, new in zip(placed.groups, groups, strict=True):
        found = _writes(old, new, wanted, placed.load_bytes)
        if found is None:
            return None
        writes += found
    scaled = replace(placed, groups=groups)
    return Rescaling(scaled, writes, progress=wanted.options.progress)


def _scaled(placed: PlacedGroup, specs: Sequence[LoraSpec]) -> PlacedGroup:
    group = placed.group
    layouts = {
        share.lora: replace(
            placed.layouts[share.lora], runs=factor_runs(group, share, specs[share.lora])
        )
        for share in group.shares
    }
    return replace(placed, layouts=layouts)


def _writes(
    old: PlacedGroup, new: PlacedGroup, wanted: LoraSet, load_bytes: int
) -> list[_Write] | None:
    group = old.group
    dtype = group.targets[0].dtype
    arena = _arena_of(old, LowRankSide.UP)
    downs = _arena_of(old, LowRankSide.DOWN) if is_narrow(dtype) else None
    if arena is None or (is_narrow(dtype) and downs is None):
        return None
    writes = []
    for load in loads_of(group, load_bytes):
        lora = load.share.lora
        before, after = old.layouts[lora], new.layouts[lora]
        if before == after:
            continue
        key = (wanted.sources[lora].identity, load.key)
        staged = cache.on_device.get((key, load.device)) or cache.pieces.get(key)
        if not isinstance(staged, Staged) or may_overflow(staged, after, dtype):
            return None
        threads = wanted.options.threads
        writes.append(_Write(group, arena, downs, load, staged, before, after, threads))
    return writes


_BESIDE = {LowRankSide.DOWN: BRANCH_DOWN, LowRankSide.UP: BRANCH_UP}
"""The names of a side branch's factors."""


def _arena_of(placed: PlacedGroup, side: LowRankSide) -> Tensor | None:
    """The arena that one factor of the slots is a view of, if it is."""
    targets = placed.group.targets
    packed = placed.group.packed
    slots = [slot for slot in range(len(targets)) if slot not in placed.differing]
    if packed:
        found: list[Tensor | None] = [*factors_of([targets[slot] for slot in slots], side)]
    else:
        found = [targets[slot].module._buffers.get(_BESIDE[side]) for slot in slots]
    own = {slot: factor for slot, factor in zip(slots, found, strict=True) if factor is not None}
    if len(own) < len(slots):
        return None
    first = next(iter(own.values()), None)
    return None if first is None else _around(own, first, len(targets), packed=packed)


def _around(own: Mapping[int, Tensor], first: Tensor, count: int, *, packed: bool) -> Tensor | None:
    """All `count` slots' factor in one tensor, where those known lie one after the other in it."""
    step = first.nbytes
    begin = first.data_ptr() - step * next(iter(own))
    # One slot alone may lie anywhere.
    if len(own) < min(2, count) or any(
        factor.shape != first.shape or factor.data_ptr() != begin + step * slot
        for slot, factor in own.items()
    ):
        return None
    flat = rest_from(begin, begin + step * count, first)
    if flat is None:
        return None
    rows, rank = first.shape
    # A `down` beside a layer is (R, in): there these are its ranks and its columns.
    arena = flat[: count * rows * rank].view(count, rows, rank)
    return in_fragments(arena) if packed else arena
