"""Slices of what the int4 kernels hand each other; the layouts are the product's."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenlora.packing.activation import (
    GROUP,
    ROWS,
    pack_activation,
    pack_low_rank_activation,
    pack_scales,
    padded,
    unpack_low_rank_activation,
)

__all__ = [
    "GROUP",
    "ROWS",
    "join_columns",
    "join_scales",
    "pack_activation",
    "pack_low_rank",
    "pack_scales",
    "padded",
    "unpack_low_rank",
]

pack_low_rank = pack_low_rank_activation
unpack_low_rank = unpack_low_rank_activation


def join_columns(parts: list[Tensor]) -> Tensor:
    """Packed activations, or low-rank ones, of slices of the columns: (M, ...) of all."""
    rows = parts[0].shape[0]
    return torch.cat([part.view(rows // ROWS, -1) for part in parts], dim=1).view(rows, -1)


def join_scales(parts: list[Tensor]) -> Tensor:
    """Packed scales of slices of the columns: (K/64, M) of all."""
    rows = parts[0].shape[1]
    return torch.cat([part.view(rows // ROWS, -1) for part in parts], dim=1).view(-1, rows)
