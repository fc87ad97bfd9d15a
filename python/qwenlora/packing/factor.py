"""Low-rank factors into the packed layout and back, the quickest way on their device.

Bit for bit as `qwenlora.packing.pack` defines: on a GPU by its copies, in host memory by Rust,
which is ten times as fast there as torch's permutations. One thread does it: factors come between
products of torch's, after which its threads spin for a while on the other cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.packing import pack
from qwenlora.packing.host_bytes import host_bytes
from qwenlora.packing.layout import FRAGMENT, RANK_MULTIPLE, TILE, LowRankSide, round_up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["in_fragments", "join_factors", "pack_factor", "unpack_factor"]


def pack_factor(logical: torch.Tensor, side: LowRankSide) -> torch.Tensor:
    """Pack one factor; see `qwenlora.packing.pack.pack_lowrank`."""
    axis = 0 if side is LowRankSide.DOWN else 1
    if not _is_ours(logical) or logical.shape[1 - axis] % TILE:
        return pack.pack_lowrank(logical, side)
    rank_padded = round_up(logical.shape[axis], RANK_MULTIPLE)
    packed = torch.empty((logical.shape[1 - axis], rank_padded), dtype=logical.dtype)
    _fill(packed, [_column(logical, side)])
    return packed


def join_factors(
    joined: torch.Tensor,
    base: torch.Tensor,
    factors: Sequence[torch.Tensor],
    side: LowRankSide,
    *,
    base_rank: int,
) -> None:
    """Fill a packed factor: the first ranks of a packed one, logical ones behind it, then zeros.

    Args:
        joined: (channels, R) packed, contiguous: all of it is written.
        base: (channels, r) packed, of the same dtype and on the same device.
        factors: Logical, of the same dtype and on the same device. Each begins at a whole fragment.
        side: Which factor all of these are.
        base_rank: Ranks of `base` that are taken, a multiple of 16.
    """
    if all(map(_is_ours, (joined, base, *factors))):
        columns = [_column(factor, side) for factor in factors]
        rest = (joined.shape[1] - base_rank) // TILE - sum(tiles for _, tiles, _ in columns)
        source = (host_bytes(_flat(base)), base.shape[1] // TILE)
        _fill(joined, [("fragments", [source], 0, base_rank // TILE), *columns, ("zero", rest)])
        return
    tiles, end = joined.shape[0] // TILE, base_rank // TILE
    # (C, R) nominal -> (C/16, R/16, 256)
    fragments = joined.view(tiles, -1, FRAGMENT)
    fragments[:, :end].copy_(base.detach().view(tiles, -1, FRAGMENT)[:, :end])
    for factor in factors:
        packed = pack_factor(factor, side).view(tiles, -1, FRAGMENT)
        begin, end = end, end + packed.shape[1]
        fragments[:, begin:end].copy_(packed)
    fragments[:, end:].zero_()


def unpack_factor(packed: torch.Tensor, side: LowRankSide) -> torch.Tensor:
    """Unpack one factor; see `qwenlora.packing.pack.unpack_lowrank`."""
    if not _is_ours(packed) or any(size % TILE for size in packed.shape):
        return pack.unpack_lowrank(packed, side)
    channels, rank = packed.shape
    shape = (rank, channels) if side is LowRankSide.DOWN else (channels, rank)
    logical = torch.empty(shape, dtype=packed.dtype)
    _core.unpack_factor(
        host_bytes(_flat(packed)),
        host_bytes(logical),
        side=side.value,
        channels=channels,
        element_bytes=packed.itemsize,
        threads=1,
    )
    return logical


def in_fragments(packed: torch.Tensor) -> torch.Tensor:
    """View packed factors by their fragments.

    Args:
        packed: (slots, C, R) in name, contiguous.

    Returns:
        (slots, C/16, R/16, 256), the same memory.
    """
    slots, channels, rank = packed.shape
    return packed.view(slots, channels // TILE, rank // TILE, FRAGMENT)


def _column(logical: torch.Tensor, side: LowRankSide) -> tuple[str, int, list[Any]]:
    """One logical factor as a column of a recipe, padded to whole fragments."""
    source = host_bytes(_flat(logical))
    if side is LowRankSide.DOWN:
        rank = logical.shape[0]
        member: tuple[Any, ...] = (source, rank, 0)
    else:
        channels, rank = logical.shape
        member = (source, None, 0, channels, rank, 0)
    return (side.value, round_up(rank, RANK_MULTIPLE) // TILE, [member])


def _fill(packed: torch.Tensor, columns: list[Any]) -> None:
    recipe = (host_bytes(packed), 1, packed.shape[0], packed.itemsize, columns)
    _core.fill_packed([recipe], threads=1)


def _is_ours(factor: torch.Tensor) -> bool:
    on_host = factor.device.type == "cpu" and factor.layout is torch.strided
    return on_host and factor.ndim == 2 and factor.itemsize in (2, 4) and factor.numel() > 0


def _flat(factor: torch.Tensor) -> torch.Tensor:
    """Its elements in order: of axes of size 1 a contiguous tensor may have any strides."""
    return factor.detach().contiguous().view(-1)
