"""Packed slots in host memory: filled by Rust, at the speed of memory.

Scaling stays torch's. Elements of two bytes have 65,536 values, so their products with one factor
are a table, made by the same multiplication that would form them one by one. Rust looks up what it
packs, and memory is read once and written once. Elements of another size are formed by torch before
they are packed.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from qwenlora import _core, sizes
from qwenlora.group.arena import (
    BranchArena,
    PackedArena,
    added_finite,
    in_slots,
    scaled_into,
    write_packed_downs,
    write_packed_ups,
)
from qwenlora.model.target import factors_of
from qwenlora.packing.host_bytes import host_bytes, new_bytes
from qwenlora.packing.layout import FRAGMENT, TILE, LowRankSide, round_up
from qwenlora.work.pending import Pending
from qwenlora.work.threads import fillers_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, TypeAlias

    import numpy.typing as npt
    from torch import Tensor

    from qwenlora.group.arena import Arena, Part, SlotFactors
    from qwenlora.group.filler import Filler
    from qwenlora.model.target import Target
    from qwenlora.packing.layout import RowOrder

__all__ = ["HostFactor", "HostPackedArena", "arena_of", "rewrite_packed"]


_Bytes: TypeAlias = "npt.NDArray[np.uint8]"
_Column: TypeAlias = "tuple[Any, ...]"


def arena_of(targets: Sequence[Target], rank: int, *, row_order: RowOrder, filler: Filler) -> Arena:
    """Allocate an arena for slots of one kind, size, dtype and device.

    Args:
        targets: The slots.
        rank: Ranks to add to each.
        row_order: The order of the slots' output rows.
        filler: Fills host memory.
    """
    if targets[0].place is None:
        return BranchArena(targets, rank, row_order=row_order)
    if targets[0].device.type == "cpu":
        return HostPackedArena(targets, rank, filler=filler)
    return PackedArena(targets, rank)


class HostFactor:
    """One factor of many slots in host memory: (slots, C/16, R/16, 256), which a filler writes.

    Recipes get its memory to write to. Whoever reads it waits for the filler.
    """

    def __init__(self, olds: Sequence[Tensor], channels: int, rank: int, filler: Filler) -> None:
        """Allocate, pinned where the old tensors are.

        Args:
            olds: What the slots hold now: their base comes from there.
            channels: Rows of a slot's factor.
            rank: Ranks to hold, the base's included.
            filler: Fills the memory.
        """
        shape = (len(olds), channels // TILE, rank // TILE, FRAGMENT)
        first = olds[0]
        self._olds = olds
        self._filler = filler
        self._memory = (
            torch.empty(shape, dtype=first.dtype, pin_memory=True)
            if first.is_pinned()
            else _empty(shape, first.dtype)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of its elements."""
        return self._memory.dtype

    def recipe(self, slots: range, columns: Sequence[_Column]) -> tuple[Any, ...]:
        """The recipe from which `fill_packed` writes some slots."""
        return _recipe(self._memory, slots, columns)

    def base(self, slots: range, tiles: int) -> _Column:
        """The base of some slots, as a column of `tiles` fragments."""
        own = self._olds[slots.start : slots.stop]
        sources = [(host_bytes(old), old.shape[1] // TILE) for old in own]
        return ("fragments", sources, 0, tiles)

    def forget_olds(self) -> None:
        """Keep old tensors alive no longer: nothing will be copied from them."""
        self._olds = ()

    def wait(self) -> Tensor:
        """The memory, when all that was begun is there."""
        self._filler.wait()
        return self._memory

    def slots(self) -> Pending[Sequence[Tensor]]:
        """The packed factor (C, R) of each slot, when all that was begun is there."""
        own, wait = in_slots(self._memory), self._filler.wait

        def waited() -> Sequence[Tensor]:
            wait()
            return own

        return Pending(waited)


class HostPackedArena:
    """Packed low-rank branches in host memory, pinned where the old ones are.

    A slot's base is copied together with the first deltas that join it: new memory is then touched
    once. All of it is begun, and done when the filler says so.
    """

    def __init__(self, targets: Sequence[Target], rank_added: int, *, filler: Filler) -> None:
        row = targets[0].row
        rank = row.base_rank + rank_added
        channels = (row.in_features, row.out_features)
        self._factors = [
            HostFactor(factors_of(targets, side), size, rank, filler)
            for side, size in zip(LowRankSide, channels, strict=True)
        ]
        self._filler = filler
        self._slots = len(targets)
        self._base_tiles = row.base_rank // TILE
        self._added = rank_added // TILE
        self._bare = 0
        """The first slot without its base; those behind it have none, either."""

    def factors(self) -> Pending[SlotFactors]:
        """Packed (in, R) and (out, R) of every slot."""
        downs, ups = (factor.slots() for factor in self._factors)
        return Pending(lambda: (downs.wait(), ups.wait()))

    def finite(self) -> list[bool]:
        """Slot by slot, whether all that is not the base is finite."""
        down, up = (factor.wait() for factor in self._factors)
        return added_finite(down, up, self._base_tiles)

    def finish(self) -> None:
        """Begin to copy the base of slots that no deltas have joined."""
        self._copy_bases(self._slots, "keep")

    def clear(self) -> None:
        """Zero all that is not the base."""
        if self._bare:
            for factor in self._factors:
                factor.wait()[:, :, self._base_tiles :].zero_()
        self._copy_bases(self._slots, "zero")

    def write(self, part: Part) -> None:
        """Begin to pack one LoRA's deltas; its ranks are padded to 16 with zeros."""
        self._copy_bases(part.slots.start, "keep")
        part = part.balanced(self._factors[0].dtype)
        deltas = _Deltas(part, self._factors[0].dtype)
        begin = part.rank_begin // TILE
        before, after = ("keep", begin), ("keep", self._added - begin - deltas.tiles)
        for slots in deltas.spans(cut=self._bare):
            down, up = deltas.down_column(slots), deltas.up_column(slots, "up")
            self._fill(slots, [before, down, after], [before, up, after])

    def _copy_bases(self, stop: int, rest: str) -> None:
        """Copy the base of slots that have none, up to `stop`."""
        if self._bare < stop:
            added = [(rest, self._added)]
            self._fill(range(self._bare, stop), added, added)

    def _fill(self, slots: range, down: Sequence[_Column], up: Sequence[_Column]) -> None:
        """Fill slots, of which all have their base or none has."""
        recipes = []
        for factor, columns in zip(self._factors, (down, up), strict=True):
            base: _Column = ("keep", self._base_tiles)
            if slots.start >= self._bare:
                base = factor.base(slots, self._base_tiles)
            recipes.append(factor.recipe(slots, [base, *columns]))
        self._filler.fill(recipes)
        self._bare = max(self._bare, slots.stop)
        if self._bare == self._slots:
            for factor in self._factors:
                factor.forget_olds()


def rewrite_packed(
    side: LowRankSide, arena: Tensor, part: Part, *, base_rank: int, threads: int | None
) -> None:
    """Scale and pack one LoRA's factor anew, over what an arena has of it; all else stays.

    Args:
        side: Which factor.
        arena: (slots, C/16, R/16, 256) of that side, contiguous, on any device.
        part: The LoRA's deltas, with ranks that lie where they lay.
        base_rank: Ranks of the base.
        threads: Threads that fill host memory; by default up to 16.
    """
    base_tiles = base_rank // TILE
    if arena.device.type != "cpu":
        write = write_packed_downs if side is LowRankSide.DOWN else write_packed_ups
        write(arena, part, base_tiles=base_tiles)
        return
    deltas = _Deltas(part, arena.dtype)
    begin = base_tiles + part.rank_begin // TILE
    around = ("keep", begin), ("keep", arena.shape[2] - begin - deltas.tiles)
    for slots in deltas.spans():
        is_down = side is LowRankSide.DOWN
        own = deltas.down_column(slots) if is_down else deltas.up_column(slots, "up over")
        columns = [around[0], own, around[1]]
        _core.fill_packed([_recipe(arena, slots, columns)], threads=fillers_for(threads))


class _Deltas:
    """One LoRA's deltas as columns of recipes."""

    def __init__(self, part: Part, dtype: torch.dtype) -> None:
        self.tiles = round_up(part.rank, TILE) // TILE
        self._part = part
        self._ups = [_Up(up, f, dtype) for up, f in zip(part.ups, part.factors, strict=True)]
        self._dtype = dtype

    def spans(self, *, cut: int = 0) -> Iterator[range]:
        """The slots that are filled at a time; none begins before `cut` and ends behind it."""
        slots, downs = self._part.slots, self._part.downs
        formed = [down[0].nbytes for down in downs if down.dtype != self._dtype]
        formed += [up.values[0].nbytes for up in self._ups if up.is_formed]
        most = max(1, sizes.current().formed_bytes // sum(formed)) if formed else len(slots)
        cut = min(max(cut, slots.start), slots.stop)
        for own in (range(slots.start, cut), range(cut, slots.stop)):
            yield from (own[begin : begin + most] for begin in range(0, len(own), most))

    def down_column(self, slots: range) -> _Column:
        """Every `down`; modules that share one share its place."""
        part, own = self._part, self._own(slots)
        first = {start: at for at, start in reversed(list(enumerate(part.starts)))}
        members = [
            (host_bytes(_cast(part.downs[at][own], self._dtype)), part.members[at].rank, start)
            for start, at in first.items()
        ]
        return ("down", self.tiles, members)

    def up_column(self, slots: range, kind: str) -> _Column:
        """Every `up`, scaled."""
        part, own = self._part, self._own(slots)
        members = [
            (up.read(own), up.table, member.row_begin, member.row_count, member.rank, start)
            for up, member, start in zip(self._ups, part.members, part.starts, strict=True)
        ]
        return (kind, self.tiles, members)

    def _own(self, slots: range) -> slice:
        first = self._part.slots.start
        return slice(slots.start - first, slots.stop - first)


class _Up:
    """One module's `up` and what scales it."""

    def __init__(self, values: Tensor, factor: float, dtype: torch.dtype) -> None:
        self.values = values
        self.table: _Bytes | None = None
        self._factor = factor
        self._dtype = dtype
        as_it_is = factor == 1 and values.dtype == dtype
        tabled = not as_it_is and values.itemsize == dtype.itemsize == 2
        self.is_formed = not as_it_is and not tabled
        if tabled:
            self.table = _table(values.dtype, factor, dtype)

    def read(self, slots: slice) -> _Bytes:
        """The bytes that Rust reads for some slots."""
        values = self.values[slots]
        if self.is_formed:
            formed = _empty(values.shape, self._dtype)
            scaled_into(formed, values, self._factor)
            values = formed
        return host_bytes(values)


def _table(values: torch.dtype, factor: float, dtype: torch.dtype) -> _Bytes:
    """Every value of a dtype of two bytes, scaled; to be read only."""
    # As numbers 0 and -0 are one.
    return _tabled(values, factor.hex(), dtype)


@functools.lru_cache(maxsize=16)
def _tabled(values: torch.dtype, factor_hex: str, dtype: torch.dtype) -> _Bytes:
    factor = float.fromhex(factor_hex)
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(values)
    scaled = torch.empty(every.shape, dtype=dtype)
    # Halves are as much as torch gives to one thread: others would be woken for nothing.
    for own, half in zip(scaled.chunk(2), every.chunk(2), strict=True):
        scaled_into(own, half, factor)
    table = host_bytes(scaled)
    table.flags.writeable = False
    return table


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype == dtype else _empty(values.shape, dtype).copy_(values)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return new_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def _recipe(arena: Tensor, slots: range, columns: Sequence[_Column]) -> tuple[Any, ...]:
    own = arena[slots.start : slots.stop]
    return (host_bytes(own), len(slots), arena.shape[1] * TILE, arena.itemsize, columns)
