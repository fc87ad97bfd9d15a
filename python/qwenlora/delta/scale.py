"""Scale and strength, multiplied into a slot's deltas: the one place where a strength acts.

What is told apart is how precisely a delta is held. Pairs and products are stored in few bits, so
their factor is rounded once to float32. A matrix is float32 with its scale in it. Stored values
are float64 until they join the base's.
"""

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
    "factor_at",
    "factors_at",
    "scaled",
    "scaled_energy",
    "scaled_matrix",
    "scaled_values",
]


def factors_at(scales: Tensor, strength: float) -> Tensor:
    """Each scale times the strength, in float64 and rounded once to float32.

    A product of zero is not negative: where a rank has no values, all ways of composing leave the
    same bits.

    Args:
        scales: Float64, on the host, of any shape.
        strength: Factor on the whole delta.
    """
    return (scales * strength + 0.0).to(torch.float32)


def factor_at(scale: float, strength: float) -> float:
    """One scale times the strength; see `factors_at`."""
    return float(factors_at(torch.tensor(scale, dtype=torch.float64), strength))


def scaled_matrix(delta: Tensor, strength: float) -> Tensor:
    """A float32 matrix, scale included, times the strength, in float32."""
    return delta * factor_at(1.0, strength)


def scaled_values(delta: Tensor, strength: float) -> Tensor:
    """Float64 deltas of stored values, scale included, times the strength, in float64."""
    return delta * strength


def scaled_energy(energy: float, factor: float) -> float:
    """The squared Frobenius norm of a delta of this one times a factor."""
    return energy * factor**2


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

    The factor is that of `factors_at`; value x factor is formed in float32 and rounded once to
    `dtype`. `down` is only cast. Where `dtype` would lose small values
    of `up`, a power of two moves to `down` (see `balance`).

    Args:
        pair: The delta without strength.
        strength: Factor on the whole delta.
        dtype: The slot's dtype.
        device: The slot's device.
    """
    up = pair.up.to(device).to(torch.float32)
    factor = factors_at(pair.scale, strength).to(device)
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
    """A Kronecker product's first row in a layer and its factors' sizes; ordered."""

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
        w1 = kron.w1.to(torch.float32) * factor_at(kron.scale, strength)
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
