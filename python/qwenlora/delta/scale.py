"""Scale and strength, multiplied into a slot's deltas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora.delta.balance import balanced, exponent_of, is_narrow, loses_small_values
from qwenlora.packing.factor import pack_factor, unpack_factor
from qwenlora.packing.layout import FRAGMENT, TILE, LowRankSide, round_up
from qwenlora.plan.documents import SlotKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.delta.pieces import KronPair, LoraPair
    from qwenlora.model.target import Target

__all__ = [
    "KronShape",
    "ScaledDense",
    "ScaledKron",
    "ScaledPair",
    "logical_pairs",
    "scaled",
    "unpacked",
]


@dataclass(frozen=True)
class ScaledPair:
    """One delta ready to be written: strength and scale in `up`, both in the slot's dtype."""

    down: Tensor
    up: Tensor
    rank: int

    @property
    def rank_padded(self) -> int:
        """Ranks that it takes in a packed slot."""
        return round_up(self.rank, TILE)


def scaled(
    pair: LoraPair, strength: float, *, dtype: torch.dtype, device: torch.device
) -> ScaledPair:
    """Multiply strength and scale into `up` and cast to the slot's dtype.

    The factor is formed in float64 and rounded once to float32; value x factor is formed in
    float32 and rounded once to `dtype`. `down` is only cast. Where `dtype` would lose small values
    of `up`, a power of two moves to `down` (see `balance`).

    Args:
        pair: Logical or packed.
        strength: Factor on the whole delta.
        dtype: The slot's dtype.
        device: The slot's device.
    """
    # No zero is negative: where a rank has no values, all ways of composing leave the same bits.
    factor = (pair.scale * strength + 0.0).to(torch.float32)
    up = pair.up.to(device).to(torch.float32)
    factor = factor.to(device)
    if pair.packed:
        values = _scale_packed(up, factor)
    else:
        parts, rank = factor.shape
        # (out, R) -> (parts, out/parts, R); a single part covers every row order.
        values = (up.view(parts, -1, rank) * factor.unsqueeze(1)).view_as(up)
    # float8 casts through float32: torch has no direct cast to the half types on every device.
    down = pair.down.to(device)
    if is_narrow(dtype):
        return _balanced_pair(down.to(torch.float32), values, pair, dtype)
    if down.itemsize == 1:
        down = down.to(torch.float32)
    return ScaledPair(down=down.to(dtype), up=values.to(dtype), rank=pair.rank)


def _balanced_pair(down: Tensor, up: Tensor, pair: LoraPair, dtype: torch.dtype) -> ScaledPair:
    """Halves in float32, in the layout of `pair`, rounded to a dtype of few exponents."""
    parts = pair.scale.shape[0]
    if not pair.packed:
        down, up = balanced(down, up, dtype, parts=parts)
        return ScaledPair(down=down, up=up, rank=pair.rank)
    down, up = unpack_factor(down, LowRankSide.DOWN), unpack_factor(up, LowRankSide.UP)
    down, up = balanced(down, up, dtype, parts=parts)
    return ScaledPair(
        down=pack_factor(down, LowRankSide.DOWN),
        up=pack_factor(up, LowRankSide.UP),
        rank=pair.rank,
    )


def _scale_packed(up: Tensor, factor: Tensor) -> Tensor:
    """Scale packed (out, R) float32 by factors (parts, rank <= R)."""
    channels, rank_padded = up.shape
    parts, rank = factor.shape
    padded = factor.new_zeros((parts, rank_padded))
    padded[:, :rank] = factor
    # The factor of each element of a fragment row: a packed matrix of 16 equal rows per part.
    # (parts, R) -> (parts*16, R) => packed (parts, R/16, 256)
    rows = padded.repeat_interleave(TILE, dim=0)
    pattern = pack_factor(rows, LowRankSide.UP).view(parts, 1, rank_padded // TILE, FRAGMENT)
    # (C, R) nominal -> (parts, C/16/parts, R/16, 256)
    fragments = up.view(parts, channels // TILE // parts, rank_padded // TILE, FRAGMENT)
    return (fragments * pattern).view(channels, rank_padded)


def unpacked(pair: ScaledPair) -> tuple[Tensor, Tensor]:
    """Unpack a packed pair to logical (down (r, in), up (out, r)), padding cut off."""
    down = unpack_factor(pair.down, LowRankSide.DOWN)[: pair.rank]
    up = unpack_factor(pair.up, LowRankSide.UP)[:, : pair.rank]
    return down, up


def logical_pairs(pairs: Sequence[ScaledPair], target: Target) -> list[tuple[Tensor, Tensor]]:
    """Pairs as (down (r, in), up (out, r)), whatever the slot's layout."""
    packed = target.kind is SlotKind.SVDQ
    return [unpacked(pair) if packed else (pair.down, pair.up) for pair in pairs]


class KronShape(NamedTuple):
    """Where a Kronecker product lies in a layer, and its factors' sizes; ordered."""

    row_begin: int
    w1_rows: int
    w1_columns: int
    w2_rows: int
    w2_columns: int

    @property
    def elements(self) -> int:
        """Values in both factors."""
        return self.w1_rows * self.w1_columns + self.w2_rows * self.w2_columns


@dataclass(frozen=True)
class ScaledKron:
    """One Kronecker product ready to be written: strength and scale in `w1`."""

    w1: Tensor
    w2: Tensor
    row_begin: int

    @classmethod
    def of(cls, kron: KronPair, strength: float, target: Target) -> ScaledKron:
        """Scale in float32 and cast to the slot's dtype, on its device."""
        factor = torch.tensor(kron.scale * strength, dtype=torch.float32)
        w1 = kron.w1.to(torch.float32) * factor
        w2 = kron.w2.to(torch.float32)
        # Of the two as of a pair of one rank: a power of two of one is a power of two of the other.
        down, up = balanced(w2.reshape(1, -1), w1.reshape(-1, 1), target.dtype)
        w1, w2 = (
            half.view(whole.shape).to(target.device) for half, whole in ((up, w1), (down, w2))
        )
        return cls(w1, w2, kron.row_begin)

    @property
    def shape(self) -> KronShape:
        """Its place and sizes."""
        return KronShape(self.row_begin, *self.w1.shape, *self.w2.shape)


@dataclass(frozen=True)
class ScaledDense:
    """A dense delta ready to be written.

    Attributes:
        values: (out, in) in the slot's dtype: the delta times a power of two.
        exponent: Of that power; 0 where the dtype loses no small values.
    """

    values: Tensor
    exponent: int

    @classmethod
    def of(cls, delta: Tensor, target: Target) -> ScaledDense:
        """Round a delta (out, in) to the slot's dtype."""
        exponent = 0
        if loses_small_values(delta, target.dtype):
            exponent = exponent_of(float(delta.abs().max()), target.dtype)
        return cls((delta * 2.0**exponent).to(target.dtype), exponent)
