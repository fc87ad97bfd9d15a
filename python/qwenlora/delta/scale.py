"""Scale and strength, multiplied into a slot's deltas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora.delta.balance import balanced, exponent_of, is_narrow, loses_small_values

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.delta.pieces import KronPair, LoraPair
    from qwenlora.model.target import Target

__all__ = [
    "KronShape",
    "ScaledDense",
    "ScaledKron",
    "ScaledPair",
    "scaled",
]


@dataclass(frozen=True)
class ScaledPair:
    """One delta ready to be written, in the slot's dtype: strength and scale are in `up`.

    Attributes:
        down: (r, in).
        up: (out, r), rows in the slot's own order.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Ranks of the pair."""
        return int(self.down.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.down.nbytes + self.up.nbytes


def scaled(
    pair: LoraPair, strength: float, *, dtype: torch.dtype, device: torch.device
) -> ScaledPair:
    """Multiply strength and scale into `up` and cast to the slot's dtype.

    The factor is formed in float64 and rounded once to float32; value x factor is formed in
    float32 and rounded once to `dtype`. `down` is only cast. Where `dtype` would lose small values
    of `up`, a power of two moves to `down` (see `balance`).

    Args:
        pair: The delta without strength.
        strength: Factor on the whole delta.
        dtype: The slot's dtype.
        device: The slot's device.
    """
    # No zero is negative: where a rank has no values, all ways of composing leave the same bits.
    factor = (pair.scale * strength + 0.0).to(torch.float32)
    up = pair.up.to(device).to(torch.float32)
    factor = factor.to(device)
    parts, rank = factor.shape
    # (out, R) -> (parts, out/parts, R); a single part covers every row order.
    values = (up.view(parts, -1, rank) * factor.unsqueeze(1)).view_as(up)
    # float8 casts through float32: torch has no direct cast to the half types on every device.
    down = pair.down.to(device)
    if is_narrow(dtype):
        return ScaledPair(*balanced(down.to(torch.float32), values, dtype, parts=parts))
    if down.itemsize == 1:
        down = down.to(torch.float32)
    return ScaledPair(down=down.to(dtype), up=values.to(dtype))


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
