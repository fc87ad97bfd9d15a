"""The layout in which Nunchaku's fused kernels take rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ROTATION_ROWS", "pack_rotations", "unpack_rotations"]


ROTATION_ROWS = 16
"""Tokens of one tile."""
_PAIRS = 4
"""Pairs of channels of one tile."""


def unpack_rotations(packed: Tensor) -> Tensor:
    """Read packed rotations.

    Args:
        packed: (B, S, D) float32, S a multiple of 16: sine and cosine of each pair of channels, in
            tiles of 16 tokens by 4 pairs.

    Returns:
        (B, S, D/2, 2): sine and cosine.
    """
    batch, length, channels = packed.shape
    columns = channels // (2 * _PAIRS)
    tiles = packed.reshape(batch, length // ROTATION_ROWS, columns, 8, _PAIRS, 2, 2)
    # (B, S/16, D/8, 8, 4, 2, 2) => (B, S/16, 2, 8, D/8, 4, 2): both halves of 16 tokens first
    return tiles.permute(0, 1, 5, 3, 2, 4, 6).reshape(batch, length, channels // 2, 2)


def pack_rotations(rotations: Tensor) -> Tensor:
    """The inverse of `unpack_rotations`.

    Args:
        rotations: (B, S, D/2, 2) float32, S a multiple of 16: sine and cosine.

    Returns:
        (B, S, D) float32.
    """
    batch, length, pairs, _ = rotations.shape
    tiles = rotations.reshape(batch, length // ROTATION_ROWS, 2, 8, pairs // _PAIRS, _PAIRS, 2)
    # (B, S/16, 2, 8, D/8, 4, 2) => (B, S/16, D/8, 8, 4, 2, 2): columns of tiles before their rows
    return tiles.permute(0, 1, 4, 3, 5, 2, 6).reshape(batch, length, 2 * pairs)
