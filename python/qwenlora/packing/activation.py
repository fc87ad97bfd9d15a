"""Layouts of what the int4 kernels hand each other between two layers.

Rows come in blocks of 256: 8 warps of 2 tiles of 16 rows. Columns come in groups of 64 with one
scale. In a tile, lane `4 r + i` holds rows `r` and `r + 8`. The order of elements is

- of an activation: block, group, warp, tile, `r`, `i`, half of the group, half of the tile, and 8
  values of 4 bits
- of its scales: block, group, warp, tile, `r`, half of the tile
- of its product with `down`: block, 16 ranks, warp, tile, half of the ranks, half of the tile, one
  of 2, `r`, `i`

Blocks lie behind each other, whatever the shapes say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenlora.packing.layout import round_up

__all__ = [
    "GROUP",
    "ROWS",
    "pack_activation",
    "pack_low_rank_activation",
    "pack_scales",
    "padded",
    "unpack_activation",
    "unpack_low_rank_activation",
    "unpack_scales",
]

ROWS = 256
"""Rows of one block."""
GROUP = 64
"""Columns of one scale."""


def padded(x: Tensor) -> Tensor:
    """(M, ...) with rows of zeros behind it, up to whole blocks."""
    missing = round_up(x.shape[0], ROWS) - x.shape[0]
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x


def pack_activation(values: Tensor) -> Tensor:
    """(M, K) integers of 4 bits, with a sign or without, to (M, K/2) uint8; whole blocks."""
    rows, columns = values.shape
    # (block, warp, tile, half of the tile, r, group, half of the group, i, 8 values)
    nibbles = (values.to(torch.uint8) & 15).view(
        rows // ROWS, 8, 2, 2, 8, columns // GROUP, 2, 4, 8
    )
    # => (block, group, warp, tile, r, i, half of the group, half of the tile, 8 values)
    pairs = nibbles.permute(0, 5, 1, 2, 4, 7, 6, 3, 8).reshape(-1, 2)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).view(rows, columns // 2)


def unpack_activation(packed: Tensor) -> Tensor:
    """The inverse of `pack_activation`, values without a sign: (M, K/2) to (M, K) uint8."""
    rows, halved = packed.shape
    flat = packed.reshape(-1)
    nibbles = torch.stack([flat & 15, flat >> 4], dim=-1)
    # (block, group, warp, tile, r, i, half of the group, half of the tile, 8 values)
    split = nibbles.view(rows // ROWS, 2 * halved // GROUP, 8, 2, 8, 4, 2, 2, 8)
    # => (block, warp, tile, half of the tile, r, group, half of the group, i, 8 values)
    return split.permute(0, 2, 3, 7, 4, 1, 6, 5, 8).reshape(rows, 2 * halved)


def pack_scales(scales: Tensor) -> Tensor:
    """(M, K/64) to (K/64, M); whole blocks."""
    rows, groups = scales.shape
    # (block, warp, tile, half of the tile, r, group) => (block, group, warp, tile, r, half)
    split = scales.view(rows // ROWS, 8, 2, 2, 8, groups)
    return split.permute(0, 5, 1, 2, 4, 3).reshape(groups, rows)


def unpack_scales(packed: Tensor) -> Tensor:
    """The inverse of `pack_scales`: (K/64, M) to (M, K/64)."""
    groups, rows = packed.shape
    # (block, group, warp, tile, r, half of the tile) => (block, warp, tile, half, r, group)
    split = packed.reshape(rows // ROWS, groups, 8, 2, 8, 2)
    return split.permute(0, 2, 3, 5, 4, 1).reshape(rows, groups)


def pack_low_rank_activation(act: Tensor) -> Tensor:
    """(M, R) to the same shape; whole blocks."""
    rows, rank = act.shape
    # (block, warp, tile, half of the tile, r, 16 ranks, half of the ranks, i, one of 2)
    split = act.view(rows // ROWS, 8, 2, 2, 8, rank // 16, 2, 4, 2)
    # => (block, 16 ranks, warp, tile, half of the ranks, half of the tile, one of 2, r, i)
    return split.permute(0, 5, 1, 2, 6, 3, 8, 4, 7).reshape(rows, rank)


def unpack_low_rank_activation(packed: Tensor) -> Tensor:
    """The inverse of `pack_low_rank_activation`."""
    rows, rank = packed.shape
    # (block, 16 ranks, warp, tile, half of the ranks, half of the tile, one of 2, r, i)
    split = packed.reshape(rows // ROWS, rank // 16, 8, 2, 2, 2, 2, 8, 4)
    # => (block, warp, tile, half of the tile, r, 16 ranks, half of the ranks, i, one of 2)
    return split.permute(0, 2, 3, 5, 7, 1, 4, 8, 6).reshape(rows, rank)
