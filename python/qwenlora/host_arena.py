"""Packed slots in host memory: filled by Rust, at the speed of memory."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from qwenlora import _core
from qwenlora.arena import Arena, BranchArena, PackedArena, Part, scaled_into
from qwenlora.layout import TILE, RowOrder, round_up
from qwenlora.plan import SlotKind

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.targets import Target

__all__ = ["HostPackedArena", "arena_of"]

Bytes: TypeAlias = "npt.NDArray[np.uint8]"


def arena_of(
    targets: Sequence[Target], rank: int, *, row_order: RowOrder, threads: int | None
) -> Arena:
    """Allocate an arena for slots of one kind, size, dtype and device.

    Args:
        targets: The slots.
        rank: Ranks to add to each.
        row_order: The order of the slots' output rows.
        threads: Threads that fill host memory; by default up to 16.
    """
    if targets[0].kind is not SlotKind.SVDQ:
        return BranchArena(targets, rank, row_order=row_order)
    if targets[0].device.type == "cpu":
        return HostPackedArena(targets, rank, threads=threads or min(16, os.cpu_count() or 1))
    return PackedArena(targets, rank)


class HostPackedArena(PackedArena):
    """Packed low-rank branches in host memory, pinned where the old ones are."""

    def __init__(self, targets: Sequence[Target], rank_added: int, *, threads: int) -> None:
        self._threads = threads
        super().__init__(targets, rank_added)

    def write(self, part: Part) -> None:
        """Pack one LoRA's deltas; its ranks are padded to 16 with zeros."""
        dtype = self._up.dtype
        downs = [_bytes(down.to(dtype)) for down in part.downs]
        ups = [_bytes(_scaled(up, f, dtype)) for up, f in zip(part.ups, part.factors, strict=True)]
        tiles = round_up(part.rank, TILE) // TILE
        begin = self._base_tiles + part.rank_begin // TILE
        around = (("keep", begin), ("keep", self._rank // TILE - begin - tiles))
        # Modules that share a `down` share its place.
        own = {start: index for index, start in reversed(list(enumerate(part.starts)))}
        recipes = []
        for at, slot in enumerate(part.slots):
            down_members = [
                (downs[index][at], part.members[index].rank, start) for start, index in own.items()
            ]
            up_members = [
                (up[at], member.row_begin, member.row_count, member.rank, start)
                for up, member, start in zip(ups, part.members, part.starts, strict=True)
            ]
            for arena, column in (
                (self._down, ("down", tiles, down_members)),
                (self._up, ("up", tiles, up_members)),
            ):
                dest = _bytes(arena[slot])
                columns = [around[0], column, around[1]]
                recipes.append((dest, arena.shape[1] * TILE, arena.itemsize, columns))
        _core.fill_packed(recipes, threads=self._threads)  # type: ignore[arg-type]

    def _allocate(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if like.is_pinned():
            return torch.empty(shape, dtype=like.dtype, pin_memory=True)
        # NumPy asks the system for huge pages: new memory is then touched four times as fast.
        raw = np.empty(math.prod(shape) * like.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(like.dtype).view(shape)

    def _copy_base(self, arena: Tensor, olds: list[Tensor]) -> None:
        added = arena.shape[2] - self._base_tiles
        recipes = []
        for slot, old in enumerate(olds):
            base = ("fragments", _bytes(old.detach()), old.shape[1] // TILE, 0, self._base_tiles)
            columns = [base, ("keep", added)]
            recipes.append((_bytes(arena[slot]), old.shape[0], old.itemsize, columns))
        _core.fill_packed(recipes, threads=self._threads)  # type: ignore[arg-type]


def _bytes(tensor: Tensor) -> Bytes:
    """A contiguous host tensor's memory; its first axis stays, where there is more than one."""
    return tensor.view(torch.uint8).numpy()


def _scaled(up: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    if factor == 1 and up.dtype == dtype:
        return up
    scaled = torch.empty(up.shape, dtype=dtype)
    scaled_into(scaled, up, factor)
    return scaled
