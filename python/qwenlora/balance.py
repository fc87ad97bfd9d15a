"""Powers of two that keep small factors out of a dtype's subnormal numbers.

Below its smallest normal number a dtype has the fewer bits, the smaller a value is. float16's is
6.1e-5, and values of a LoRA's `up`, times its scale and strength, are often smaller. The product
`up @ down` stays the same where one factor is multiplied by a power of two, and the other, or the
alpha, by its inverse: no bit of a normal number changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["exponent_beside", "exponent_of", "loses_small_values"]

ROOM = 7
"""Bits between the smallest normal number and the largest value of a factor.

Every value down to 2^-7 of the largest then has all its bits, and the others are wrong by at most
2^-18 of the largest (float16): less than rounding costs, even where one value stands alone above
12288 that are subnormal.
"""
MOST = 63
"""Largest exponent: the inverses of two still leave an alpha a normal float32."""


def exponent_of(peak: float, dtype: torch.dtype, *, largest: float | None = None) -> int:
    """How far up values must move before they are rounded to a dtype.

    It is a function of magnitudes alone, so it is the same on every device and in every order of
    reading. Nothing overflows by it.

    Args:
        peak: The largest magnitude of the values that matter.
        dtype: What they will be rounded to.
        largest: The largest magnitude of all, where that is another one.

    Returns:
        The exponent of two, 0 to `MOST`. It is 0 where the largest value has `ROOM`, is zero or is
        not finite, and for a dtype that has float32's exponents: products are formed in float32.
    """
    if not _is_narrow(dtype) or peak == 0 or not math.isfinite(peak):
        return 0
    highest = (
        _exponent(torch.finfo(dtype).max) - 1 - _exponent(peak if largest is None else largest)
    )
    return max(0, min(_lowest(dtype) - _exponent(peak), highest, MOST))


def exponent_beside(up_peak: float, down_peak: float, dtype: torch.dtype) -> int:
    """How far `up` moves up where `down` moves down as far: there is no alpha to take the inverse.

    `down` gives what it can spare. Where that is not enough, both are made equally large, which
    loses least in all.

    Args:
        up_peak: The largest magnitude of `up`, scale included.
        down_peak: That of `down`.
        dtype: What both will be rounded to.

    Returns:
        The exponent of two that `up` is multiplied by and `down` divided by; 0 or more.
    """
    wanted = exponent_of(up_peak, dtype)
    if wanted == 0 or down_peak == 0 or not math.isfinite(down_peak):
        return 0
    between = _exponent(down_peak) - _exponent(up_peak)
    spare = _exponent(down_peak) - _lowest(dtype)
    return max(0, min(wanted, max(spare, (between + 1) // 2)))


def loses_small_values(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding to a dtype changes any value that is subnormal in it.

    Where it changes none there is nothing to gain, and the values stay where they are.

    Args:
        values: In any floating dtype.
        dtype: What they will be rounded to.
    """
    if not _is_narrow(dtype):
        return False
    wide = values.to(torch.float32) if values.itemsize == 1 else values
    small = wide[wide.abs() < torch.finfo(dtype).tiny]
    return not torch.equal(small.to(dtype).to(small.dtype), small)


def _is_narrow(dtype: torch.dtype) -> bool:
    """Whether a dtype has fewer exponents than float32."""
    return torch.finfo(dtype).tiny > torch.finfo(torch.float32).tiny


def _lowest(dtype: torch.dtype) -> int:
    """Exponent of the least peak that has `ROOM`."""
    return _exponent(torch.finfo(dtype).tiny) + ROOM


def _exponent(value: float) -> int:
    """The e of 2^e <= value < 2^(e + 1)."""
    return math.frexp(value)[1] - 1
