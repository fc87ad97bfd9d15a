"""Layouts of what the int4 kernels hand each other.

Rows come in blocks of 256: 8 warps of 2 tiles of 16 rows. Columns come in groups of 64 with one
scale. In a tile, lane `4 r + i` holds rows `r` and `r + 8`. The order of elements is

- of an activation: block, group, warp, tile, `r`, `i`, half of the group, half of the tile, and 8
  values of 4 bits
- of its scales: block, group, warp, tile, `r`, half of the tile
- of its product with `down`: block, 16 ranks, warp, tile, half of the ranks, half of the tile, one
  of 2, `r`, `i`
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256
"""Rows of one block."""
GROUP = 64
"""Columns of one scale."""


def padded(x: Tensor) -> Tensor:
    """(M, ...) with rows of zeros, up to whole blocks."""
    missing = -x.shape[0] % ROWS
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x


def pack_activation(values: Tensor) -> Tensor:
    """(M, K) integers of 4 bits, with a sign or without, to (M, K/2) uint8."""
    rows, columns = values.shape
    nibbles = (values.to(torch.uint8) & 15).view(
        rows // ROWS, 8, 2, 2, 8, columns // GROUP, 2, 4, 8
    )
    pairs = nibbles.permute(0, 5, 1, 2, 4, 7, 6, 3, 8).reshape(-1, 2)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).view(rows, columns // 2)


def pack_scales(scales: Tensor) -> Tensor:
    """(M, K/64) to (K/64, M)."""
    rows, groups = scales.shape
    split = scales.view(rows // ROWS, 8, 2, 2, 8, groups)
    return split.permute(0, 5, 1, 2, 4, 3).reshape(groups, rows)


def pack_low_rank(act: Tensor) -> Tensor:
    """(M, R) to the same shape."""
    rows, rank = act.shape
    split = act.view(rows // ROWS, 8, 2, 2, 8, rank // 16, 2, 4, 2)
    return split.permute(0, 5, 1, 2, 6, 3, 8, 4, 7).reshape(rows, rank)


def unpack_low_rank(packed: Tensor) -> Tensor:
    """The inverse of `pack_low_rank`."""
    rows, rank = packed.shape
    split = packed.view(rows // ROWS, rank // 16, 8, 2, 2, 2, 2, 8, 4)
    return split.permute(0, 2, 3, 5, 7, 1, 4, 8, 6).reshape(rows, rank)


def join_columns(parts: list[Tensor]) -> Tensor:
    """Packed activations, or low-rank ones, of slices of the columns: (M, ...) of all."""
    rows = parts[0].shape[0]
    return torch.cat([part.view(rows // ROWS, -1) for part in parts], dim=1).view(rows, -1)


def join_scales(parts: list[Tensor]) -> Tensor:
    """Packed scales of slices of the columns: (K/64, M) of all."""
    rows = parts[0].shape[1]
    return torch.cat([part.view(rows // ROWS, -1) for part in parts], dim=1).view(-1, rows)
