"""Scale and strength, multiplied into a slot's deltas: the one place where a strength acts.

What is told apart is how precisely a delta is held. Pairs and products are stored in few bits, so
their factor is rounded once to float32. A matrix is float32 with its scale in it. Stored values
are float64 until they join the base's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.balance import balanced, exponent_of, is_narrow, loses_small_values
from qwenlora.delta.parts import PartKind, PartShape, ScaledPart
from qwenlora.delta.strength import factor_at, factors_at

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.delta.pieces import KronPair, LoraPair
    from qwenlora.model.target import Target

__all__ = [
    "ScaledPair",
    "scaled",
    "scaled_dense",
    "scaled_energy",
    "scaled_kron",
    "scaled_matrix",
    "scaled_values",
]


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


def scaled_kron(kron: KronPair, strength: float, target: Target) -> ScaledPart:
    """One Kronecker product ready to be written: strength and scale in `w1`.

    It is scaled in float32, then cast to the slot's dtype. So are factors on its rows or columns.
    """
    w1 = kron.w1.to(torch.float32) * factor_at(kron.scale, strength)
    w2 = kron.w2.to(torch.float32)
    # Of the two as of a pair of one rank: a power of two of one is a power of two of the other.
    down, up = balanced(w2.reshape(1, -1), w1.reshape(-1, 1), target.dtype)
    factors = {"w1": up.view(w1.shape), "w2": down.view(w2.shape)}
    of_sides = {"rows": kron.rows, "columns": kron.columns}
    has = [own is not None for own in of_sides.values()]
    factors |= {name: own.to(target.dtype) for name, own in of_sides.items() if own is not None}
    count = w1.shape[0] * w2.shape[0]
    sizes = (*w1.shape, *w2.shape, *map(int, has))
    shape = PartShape(PartKind.KRON, kron.row_begin, count, sizes)
    return ScaledPart(shape, {name: own.to(target.device) for name, own in factors.items()})


def scaled_dense(delta: Tensor, target: Target, *, row_begin: int = 0) -> ScaledPart:
    """A matrix ready to be written: a delta (rows, in) rounded to the slot's dtype.

    `values` are the delta times a power of two, which is 1 where the dtype loses no small values.
    """
    exponent = 0
    if loses_small_values(delta, target.dtype):
        exponent = exponent_of(float(delta.abs().max()), target.dtype)
    values = (delta * 2.0**exponent).to(target.dtype)
    unscale = torch.full((), 2.0**-exponent, dtype=torch.float32, device=target.device)
    shape = PartShape(PartKind.DENSE, row_begin, delta.shape[0], (delta.shape[1],))
    return ScaledPart(shape, {"values": values, "unscale": unscale})
