"""New tensors of one path over many slots: one allocation a factor, written for all slots at once.

A slot's tensors lie in its arena, each with its own storage there: a deep copy, a move or a
save of one takes its elements alone (see `allocation`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from qwenlora.delta.balance import RankPeaks, is_narrow, moved
from qwenlora.group.allocation import evenly, rest_from, split
from qwenlora.group.group import in_spans
from qwenlora.model.target import factors_of
from qwenlora.packing.host_bytes import zero_bytes
from qwenlora.packing.layout import (
    FRAGMENT,
    MODULATION_PLANES,
    TILE,
    LowRankSide,
    RowOrder,
    round_up,
)
from qwenlora.work.pending import Pending

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeAlias

    from torch import Tensor

    from qwenlora.group.group import Member
    from qwenlora.model.target import Target

__all__ = [
    "Arena",
    "BranchArena",
    "PackedArena",
    "Part",
    "SlotFactors",
    "added_finite",
    "in_slots",
    "scaled_into",
    "write_branch_downs",
    "write_branch_ups",
    "write_packed_downs",
    "write_packed_ups",
]


SlotFactors: TypeAlias = "tuple[Sequence[Tensor], Sequence[Tensor]]"
"""Every slot's `down`, and every slot's `up`."""
_APART_BYTES = 64 << 20
"""Tensors that lie apart are copied about this much at a time."""


@dataclass(frozen=True)
class Part:
    """One LoRA's deltas in some slots of an arena, unscaled, as the file stores them.

    Attributes:
        slots: Which slots.
        members: Its modules.
        downs: (slots, rank, in) of each module, on the arena's device.
        ups: (slots, rows, rank) of each module.
        factors: Scale times strength of each module.
        starts: Where each module's ranks begin, from `rank_begin` on; equal where they are shared.
        rank: Ranks of all.
        rank_begin: First of the arena's added ranks that the LoRA takes.
    """

    slots: range
    members: Sequence[Member]
    downs: Sequence[Tensor]
    ups: Sequence[Tensor]
    factors: Sequence[float]
    starts: Sequence[int]
    rank: int
    rank_begin: int

    @property
    def span(self) -> slice:
        """The slots as a slice."""
        return slice(self.slots.start, self.slots.stop)

    def balanced(self, dtype: torch.dtype) -> Part:
        """The same product, each rank out of a dtype's subnormal numbers (see `balance`).

        Where that may change something, `up` comes scaled, both halves in `dtype`, and the factors
        are 1. The host is asked for what it can tell at once, a device for nothing.
        """
        if not is_narrow(dtype):
            return self
        exponents = self._exponents(dtype)
        if exponents.device.type == "cpu" and not exponents.any():
            return self
        downs, ups = [], []
        for member, start, down, up, factor in self._halves():
            own = exponents[:, start : start + member.rank]
            downs.append(moved(down.float(), -own.unsqueeze(-1), dtype))
            ups.append(moved(up.float() * factor, own.unsqueeze(-2), dtype))
        return replace(self, downs=downs, ups=ups, factors=(1.0,) * len(ups))

    def _exponents(self, dtype: torch.dtype) -> Tensor:
        """(slots, rank) int32, of ranks that modules share over the rows of all."""
        found: dict[int, RankPeaks] = {}
        for _, start, down, up, factor in self._halves():
            peaks = RankPeaks.of(down.float(), up.float() * factor, dtype)
            found[start] = peaks.beside(found[start]) if start in found else peaks
        first = self.downs[0]
        exponents = torch.zeros(
            (len(self.slots), self.rank), dtype=torch.int32, device=first.device
        )
        for start, peaks in found.items():
            own = peaks.exponents(dtype)
            exponents[:, start : start + own.shape[1]] = own
        return exponents

    def _halves(self) -> Iterator[tuple[Member, int, Tensor, Tensor, float]]:
        return zip(self.members, self.starts, self.downs, self.ups, self.factors, strict=True)


class Arena(Protocol):
    """New tensors of many slots."""

    def clear(self) -> None:
        """Zero all added ranks: where not every one of them will be written in every slot."""

    def write(self, part: Part) -> None:
        """Write one LoRA's deltas in some slots."""

    def factors(self) -> Pending[SlotFactors]:
        """The tensors as their layers hold them, once all that was written by then is there."""

    def finish(self) -> None:
        """All deltas are written."""

    def finite(self) -> list[bool]:
        """Slot by slot, whether all that was written is finite; waits until it is there."""


class PackedArena:
    """Packed low-rank branches on a device: the base's fragments, then the LoRAs'.

    Memory of a factor is (slots, C/16, R/16, 256).
    """

    def __init__(self, targets: Sequence[Target], rank_added: int) -> None:
        row = targets[0].row
        self._rank = row.base_rank + rank_added
        self._base_tiles = row.base_rank // TILE
        self._down = self._with_base(targets, LowRankSide.DOWN, row.in_features)
        self._up = self._with_base(targets, LowRankSide.UP, row.out_features)

    def factors(self) -> Pending[SlotFactors]:
        """Packed (in, R) and (out, R) of every slot."""
        return Pending.ready((in_slots(self._down), in_slots(self._up)))

    def finite(self) -> list[bool]:
        """Slot by slot, whether all that is not the base is finite."""
        return added_finite(self._down, self._up, self._base_tiles)

    def finish(self) -> None:
        """Nothing is left to do."""

    def clear(self) -> None:
        """Zero all that is not the base."""
        self._down[:, :, self._base_tiles :].zero_()
        self._up[:, :, self._base_tiles :].zero_()

    def write(self, part: Part) -> None:
        """Pack one LoRA's deltas; its ranks are padded to 16 with zeros."""
        part = part.balanced(self._down.dtype)
        write_packed_downs(self._down, part, base_tiles=self._base_tiles)
        write_packed_ups(self._up, part, base_tiles=self._base_tiles)

    def _with_base(self, targets: Sequence[Target], side: LowRankSide, channels: int) -> Tensor:
        olds = factors_of(targets, side)
        shape = (len(targets), channels // TILE, self._rank // TILE, FRAGMENT)
        arena = torch.empty(shape, dtype=olds[0].dtype, device=olds[0].device)
        _copy_base(arena[:, :, : self._base_tiles], olds)
        return arena


def in_slots(arena: Tensor) -> Sequence[Tensor]:
    """The packed factor (C, R) of each slot of (slots, C/16, R/16, 256)."""
    slots, _, rank_tiles, _ = arena.shape
    # (slots, C/16, R/16, 256) -> (slots, C, R) in name
    return split(arena.view(slots, -1, rank_tiles * TILE))


def added_finite(down: Tensor, up: Tensor, base_tiles: int) -> list[bool]:
    """Slot by slot, whether all that is not the base is finite in (slots, C/16, R/16, 256)."""
    return _finite(down[:, :, base_tiles:], up[:, :, base_tiles:])


def write_packed_downs(arena: Tensor, part: Part, *, base_tiles: int) -> None:
    """Pack one LoRA's `down` into (slots, C/16, R/16, 256)."""
    down = _tiles_of(part, arena, base_tiles)
    if _in_tiles(part):
        _pack_downs(down, part)
    else:
        _pack_down(down, _joined_down(down, part))


def write_packed_ups(arena: Tensor, part: Part, *, base_tiles: int) -> None:
    """Scale and pack one LoRA's `up` into (slots, C/16, R/16, 256); it alone holds the strength."""
    up = _tiles_of(part, arena, base_tiles)
    if _in_tiles(part):
        _pack_ups(up, part)
    else:
        _pack_up(up, _joined_up(up, part), 1.0)


def _tiles_of(part: Part, arena: Tensor, base_tiles: int) -> Tensor:
    begin = base_tiles + part.rank_begin // TILE
    return arena[part.span, :, begin : begin + round_up(part.rank, TILE) // TILE]


def _copy_base(dest: Tensor, olds: list[Tensor]) -> None:
    """Copy the base's fragments (slots, C/16, base/16, 256) out of each slot's old tensor."""
    slots, tiles, base_tiles, _ = dest.shape
    first = olds[0]
    old_tiles = first.shape[1] // TILE
    rest, step = None, evenly(olds)
    if step is not None:
        begin, last = first.data_ptr(), olds[-1]
        rest = rest_from(begin, last.data_ptr() + last.nbytes, first)
    if step is not None and rest is not None:
        # Old tensors of one arena: (slots, C/16, R/16, 256)
        strides = (step, old_tiles * FRAGMENT, FRAGMENT, 1)
        source = rest.as_strided((slots, tiles, base_tiles, FRAGMENT), strides)
        # Words of eight bytes: kernels that walk strides move one element at a time.
        dest.view(torch.int64).copy_(source.view(torch.int64))
        return
    if all(old.shape == first.shape for old in olds) and old_tiles == base_tiles:
        _copy_apart(dest, olds)
        return
    for slot, old in enumerate(olds):
        fragments = old.detach().view(tiles, old.shape[1] // TILE, FRAGMENT)
        dest[slot].copy_(fragments[:, :base_tiles])


def _copy_apart(dest: Tensor, olds: list[Tensor]) -> None:
    """Copy whole tensors (C, base) that lie apart: many to one buffer, and from there at once."""
    for span in in_spans(len(olds), olds[0].nbytes, _APART_BYTES):
        own = slice(span.start, span.stop)
        # (slots*C, base) in name -> (slots, C/16, base/16, 256)
        joined = torch.cat(olds[own]).view(dest[own].shape)
        dest[own].view(torch.int64).copy_(joined.view(torch.int64))


def _in_tiles(part: Part) -> bool:
    """Tell if every module's ranks and rows are whole fragments."""
    sizes = [*part.starts, *(m.rank for m in part.members)]
    sizes += [size for m in part.members for size in (m.row_begin, m.row_count)]
    return not any(size % TILE for size in sizes)


def _pack_downs(dest: Tensor, part: Part) -> None:
    """Pack each distinct `down` into its fragments (slots, C/16, R/16, 256)."""
    written = set()
    for member, start, down in zip(part.members, part.starts, part.downs, strict=True):
        if start not in written:
            written.add(start)
            _pack_down(dest[:, :, start // TILE : (start + member.rank) // TILE], down)


def _pack_down(dest: Tensor, down: Tensor) -> None:
    """Pack (slots, R, C) into fragments (slots, C/16, R/16, 256)."""
    slots, rank, channels = down.shape
    if down.dtype == dest.dtype and down.itemsize == 2:
        # Two channels of a pair move as one word.
        dest, down, pair = dest.view(torch.int32), down.view(torch.int32), 1
    else:
        pair = 2
    columns = channels // 2 * pair
    # (slots, R, C) -> (slots, R/16, n2, n8, C/16, k2, k4, k_pair)
    shape = (slots, rank // TILE, 2, 8, channels // TILE, 2, 4, pair)
    strides = (rank * columns, TILE * columns, 8 * columns, columns, 8 * pair, 4 * pair, pair, 1)
    source = down.as_strided(shape, strides)
    # (slots, C/16, R/16, n8, k4, n2, k2, k_pair)
    #     => (slots, R/16, n2, n8, C/16, k2, k4, k_pair)
    slot, channel_tile, rank_tile, _ = dest.stride()
    strides = (slot, rank_tile, 2 * pair, 16 * pair, channel_tile, pair, 4 * pair, 1)
    dest.as_strided(shape, strides).copy_(source)


def _pack_ups(dest: Tensor, part: Part) -> None:
    """Scale and pack each `up` into its rows and ranks of (slots, C/16, R/16, 256)."""
    rows = dest.shape[1] * TILE
    if any((m.row_count, m.rank) != (rows, part.rank) for m in part.members):
        dest.zero_()
    for member, start, up, factor in zip(
        part.members, part.starts, part.ups, part.factors, strict=True
    ):
        first = member.row_begin // TILE
        own = dest[
            :,
            first : first + member.row_count // TILE,
            start // TILE : (start + member.rank) // TILE,
        ]
        _pack_up(own, up, factor)


def _pack_up(dest: Tensor, up: Tensor, factor: float) -> None:
    """Scale and pack (slots, C, R) into fragments (slots, C/16, R/16, 256)."""
    slots, channels, rank = up.shape
    # (slots, C, R) -> (slots, C/16, n2, n8, R/16, k2, k4, k_pair)
    shape = (slots, channels // TILE, 2, 8, rank // TILE, 2, 4, 2)
    strides = (channels * rank, TILE * rank, 8 * rank, rank, TILE, 8, 2, 1)
    source = up.as_strided(shape, strides)
    # (slots, C/16, R/16, n8, k4, n2, k2, k_pair)
    #     => (slots, C/16, n2, n8, R/16, k2, k4, k_pair)
    slot, channel_tile, rank_tile, _ = dest.stride()
    strides = (slot, channel_tile, 4, 32, rank_tile, 2, 8, 1)
    scaled_into(dest.as_strided(shape, strides), source, factor)


def _joined_down(fragments: Tensor, part: Part) -> Tensor:
    """A LoRA's modules joined as the fused layer would, padded to whole fragments."""
    slots, channels, ranks, _ = fragments.shape
    joined = fragments.new_zeros((slots, ranks * TILE, channels * TILE))
    _join_downs(joined, part, rank_begin=0)
    return joined


def _joined_up(fragments: Tensor, part: Part) -> Tensor:
    slots, rows, ranks, _ = fragments.shape
    joined = fragments.new_zeros((slots, rows * TILE, ranks * TILE))
    _join_ups(joined, part, rank_begin=0)
    return joined


def _join_downs(down: Tensor, part: Part, *, rank_begin: int) -> None:
    """Write a LoRA's modules into logical (slots, R, in)."""
    for member, start, own in zip(part.members, part.starts, part.downs, strict=True):
        begin = rank_begin + start
        down[:, begin : begin + member.rank].copy_(own)


def _join_ups(up: Tensor, part: Part, *, rank_begin: int) -> None:
    """Scale and write a LoRA's modules into logical (slots, out, R)."""
    for member, start, own, factor in zip(
        part.members, part.starts, part.ups, part.factors, strict=True
    ):
        ranks = slice(rank_begin + start, rank_begin + start + member.rank)
        rows = slice(member.row_begin, member.row_begin + member.row_count)
        scaled_into(up[:, rows, ranks], own, factor)


def scaled_into(dest: Tensor, values: Tensor, factor: float) -> None:
    """Form value x factor in float32, rounded once to the destination's dtype.

    A product of 16-bit values and a number is formed in float32 and rounded to their own dtype. So
    they are multiplied directly only where that is the destination's dtype.
    """
    if values.dtype not in (dest.dtype, torch.float32):
        values = values.to(torch.float32)
    torch.mul(values, factor, out=dest)


class BranchArena:
    """Side branches: (slots, R, in) and (slots, out, R), rows in the layers' own order."""

    def __init__(self, targets: Sequence[Target], rank: int, *, row_order: RowOrder) -> None:
        first = targets[0]
        pinned = any(p.is_pinned() for p in first.module.parameters(recurse=False))
        self._row_order = row_order

        def zeros(*shape: int) -> Tensor:
            if first.device.type == "cpu" and not pinned:
                raw = zero_bytes(math.prod(shape) * first.dtype.itemsize)
                return raw.view(first.dtype).view(shape)
            return torch.zeros(shape, dtype=first.dtype, device=first.device, pin_memory=pinned)

        self._down = zeros(len(targets), rank, first.row.in_features)
        self._up = zeros(len(targets), first.row.out_features, rank)

    def factors(self) -> Pending[SlotFactors]:
        """(R, in) and (out, R) of every slot."""
        return Pending.ready((split(self._down), split(self._up)))

    def finite(self) -> list[bool]:
        """Slot by slot, whether all of it is finite."""
        return _finite(self._down, self._up)

    def finish(self) -> None:
        """Nothing is left to do."""

    def clear(self) -> None:
        """Do nothing: both factors are allocated as zeros."""

    def write(self, part: Part) -> None:
        """Write one LoRA's deltas."""
        part = part.balanced(self._down.dtype)
        write_branch_downs(self._down, part)
        write_branch_ups(self._up, part, row_order=self._row_order)


def write_branch_downs(arena: Tensor, part: Part) -> None:
    """Write one LoRA's `down` into (slots, R, in)."""
    _join_downs(arena[part.span], part, rank_begin=part.rank_begin)


def write_branch_ups(arena: Tensor, part: Part, *, row_order: RowOrder) -> None:
    """Scale and write one LoRA's `up` into (slots, out, R), rows in the layer's own order."""
    up = arena[part.span]
    if row_order is RowOrder.PLANAR:
        _join_ups(up, part, rank_begin=part.rank_begin)
        return
    # (slots, C*planes, R) -> (slots, C, planes, R) => (slots, planes, C, R)
    planes = _split(up, (-1, MODULATION_PLANES)).transpose(1, 2)
    for member, start, own, factor in zip(
        part.members, part.starts, part.ups, part.factors, strict=True
    ):
        begin = part.rank_begin + start
        # (slots, planes*C, R) -> (slots, planes, C, R)
        source = _split(own, (MODULATION_PLANES, -1))
        scaled_into(planes[..., begin : begin + member.rank], source, factor)


def _finite(*factors: Tensor) -> list[bool]:
    """Slot by slot; extremes propagate NaN, and are one pass over memory."""
    ends = [end.float() for f in factors for end in (f.flatten(1).amin(1), f.flatten(1).amax(1))]
    found: list[bool] = torch.isfinite(torch.stack(ends)).all(dim=0).tolist()
    return found


def _split(rows: Tensor, sizes: tuple[int, int]) -> Tensor:
    # (slots, out, R) -> (slots, *sizes, R)
    return rows.view(rows.shape[0], *sizes, rows.shape[2])
