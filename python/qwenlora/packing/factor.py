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
from qwenlora.packing.layout import RANK_MULTIPLE, TILE, LowRankSide, round_up

if TYPE_CHECKING:
    from typing import Any

__all__ = ["pack_factor", "unpack_factor"]


def pack_factor(logical: torch.Tensor, side: LowRankSide) -> torch.Tensor:
    """Pack one factor; see `qwenlora.packing.pack.pack_lowrank`."""
    axis = 0 if side is LowRankSide.DOWN else 1
    if not _is_ours(logical) or logical.shape[1 - axis] % TILE:
        return pack.pack_lowrank(logical, side)
    rank, channels = logical.shape[axis], logical.shape[1 - axis]
    rank_padded = round_up(rank, RANK_MULTIPLE)
    packed = torch.empty((channels, rank_padded), dtype=logical.dtype)
    source = host_bytes(_flat(logical))
    member: tuple[Any, ...] = (source, rank, 0)
    if side is LowRankSide.UP:
        member = (source, None, 0, channels, rank, 0)
    column: Any = (side.value, rank_padded // TILE, [member])
    recipe = (host_bytes(packed), 1, channels, logical.itemsize, [column])
    _core.fill_packed([recipe], threads=1)
    return packed


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


def _is_ours(factor: torch.Tensor) -> bool:
    on_host = factor.device.type == "cpu" and factor.layout is torch.strided
    return on_host and factor.ndim == 2 and factor.itemsize in (2, 4) and factor.numel() > 0


def _flat(factor: torch.Tensor) -> torch.Tensor:
    """Its elements in order: of axes of size 1 a contiguous tensor may have any strides."""
    return factor.detach().contiguous().view(-1)
