"""A module's pair rounded to the file's dtype: small halves move up first, which alpha undoes.

Alpha is stored apart as float32, and every reader multiplies by it. So a power of two costs nothing
there, where float16 would lose small values of a half to its subnormal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.balance import exponent_of, loses_small_values

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.merge.combine import Joined

__all__ = ["Rounded", "round_pair", "value_dtype"]

ALPHA_DTYPE = torch.float32
"""An alpha's dtype. Unlike bfloat16 it holds every rank, times any power of two moved to it."""


@dataclass(frozen=True)
class Rounded:
    """A pair ready to be written: alpha / rank x up @ down.

    Attributes:
        down: (r, in).
        up: (out, r).
        alpha: A scalar.
    """

    down: Tensor
    up: Tensor
    alpha: Tensor


def round_pair(joined: Joined, dtype: torch.dtype) -> Rounded:
    """Round both halves of a pair to a dtype.

    Alpha is the rank, unless the dtype would lose small values of a half.
    """
    up, down = _wide(joined.up), _wide(joined.down)
    exponents = _exponents(up, down, dtype)
    halves = [
        (half * 2.0**exponent if exponent else half).to(dtype)
        for half, exponent in zip((up, down), exponents, strict=True)
    ]
    alpha = torch.tensor(joined.rank * 2.0 ** -sum(exponents), dtype=ALPHA_DTYPE)
    return Rounded(down=halves[1], up=halves[0], alpha=alpha)


def value_dtype(values: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a delta of stored values is written: it has no alpha.

    Returns:
        `dtype`; float32 where that would lose small values.
    """
    peak = float(values.abs().max())
    is_small = exponent_of(peak, dtype) > 0 and loses_small_values(values, dtype)
    return torch.float32 if is_small else dtype


def _exponents(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Find the power of two by which each half moves up.

    A rank may have a small column of `up` and a large row of `down`, where another has the
    opposite. So what matters is how large the products are, and how much the other half makes of an
    error in this one.
    """
    is_lossy = [loses_small_values(half, dtype) for half in (up, down)]
    if not any(is_lossy):
        return 0, 0
    # (r,) float64: of each rank the largest magnitudes
    ups, downs = up.abs().amax(dim=0).double(), down.abs().amax(dim=1).double()
    product = float((ups * downs).max())

    def exponent(own: Tensor, other: Tensor) -> int:
        # A rank that is zero in this half has no error that the other could make large.
        factor = float(other[own != 0].max())
        peak = product / factor if factor else 0.0
        return exponent_of(peak, dtype, largest=float(own.max()))

    return (
        exponent(ups, downs) if is_lossy[0] else 0,
        exponent(downs, ups) if is_lossy[1] else 0,
    )


def _wide(half: Tensor) -> Tensor:
    """A half in a dtype that products with powers of two are exact in."""
    return half if half.dtype == torch.float64 else half.to(torch.float32)
