"""Numbers and names of Nunchaku's packed layouts; imports nothing heavy."""

from __future__ import annotations

import enum

__all__ = [
    "CHANNEL_MULTIPLE",
    "E2M1",
    "FRAGMENT",
    "MAX_RANK",
    "MODULATION_PLANES",
    "MODULATION_SCALES",
    "RANK_MULTIPLE",
    "TILE",
    "UNSIGNED_SHIFT",
    "LowRankSide",
    "RowOrder",
    "round_up",
]


TILE = 16
"""Side of one low-rank fragment: 16 channels by 16 ranks."""
FRAGMENT = TILE * TILE
"""Elements of one low-rank fragment, contiguous in memory."""
CHANNEL_MULTIPLE = TILE
"""The channels of every packed layer are a multiple of this."""
RANK_MULTIPLE = TILE
"""Every rank the kernels see is a multiple of this: they loop over whole fragments."""
MAX_RANK = 1024
"""Largest rank of one layer, base branch included.

The kernels hold one scale per 16 ranks in an array of 64 entries and index it without a check, so
a larger rank reads past that array and yields garbage without any error.
"""
MODULATION_PLANES = 6
"""Planes of a modulation layer's output: shift, scale and gate, for attention and for the MLP."""
MODULATION_SCALES = (1, 4)
"""The planes that scale: of a layer of interleaved rows the bias holds the 1 of `1 + scale`."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float by the three low bits of its code; the highest bit is the sign."""
UNSIGNED_SHIFT = 0.171875
"""What the fused MLP adds to its hidden activation, which is then quantized without a sign.

GELU never falls below -0.17.
"""


class LowRankSide(enum.Enum):
    """Which factor of a low-rank branch a tensor is; the two are packed differently."""

    DOWN = "down"
    """Logical shape (rank, in_features): reads the activation."""

    UP = "up"
    """Logical shape (out_features, rank): writes the output."""


class RowOrder(enum.Enum):
    """The order of a layer's output rows."""

    PLANAR = "planar"
    """As in LoRA files and in diffusers: plane by plane."""

    INTERLEAVED = "interleaved"
    """As Nunchaku's modulation layers give them: row `plane * channels + channel` is at
    `channel * planes + plane`."""


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
