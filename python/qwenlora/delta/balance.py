"""Powers of two that keep small factors out of a dtype's subnormal numbers.

Below its smallest normal number a dtype has the fewer bits, the smaller a value is. float16's is
6.1e-5, and values of a LoRA's `up`, times its scale and strength, are often smaller. The product
`up @ down` stays the same where one factor is multiplied by a power of two, and the other, or the
alpha, by its inverse: no bit of a normal number changes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MOST",
    "RankPeaks",
    "balanced",
    "exponent_of",
    "is_narrow",
    "loses_small_values",
    "moved",
]


ROOM = 7
"""Bits between the smallest normal number and the largest value of a factor.

Every value down to 2^-7 of the largest then has all its bits, and the others are wrong by at most
2^-18 of the largest (float16): less than rounding costs, even where one value stands alone above
12288 that are subnormal.
"""
MOST = 63
"""Largest exponent: the inverses of two still leave an alpha a normal float32."""


def exponent_of(peak: float, dtype: torch.dtype, *, largest: float | None = None) -> int:
    """The powers of two that values must move up by before they are rounded to a dtype.

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
    if not is_narrow(dtype) or peak == 0 or not math.isfinite(peak):
        return 0
    highest = (
        _exponent(torch.finfo(dtype).max) - 1 - _exponent(peak if largest is None else largest)
    )
    return max(0, min(_lowest(dtype) - _exponent(peak), highest, MOST))


@dataclass(frozen=True)
class RankPeaks:
    """The peaks of a pair's vectors, which decide the power of two that moves between them.

    Attributes:
        up: (..., r) float32, the largest magnitude of each column of `up`, scale included. Of parts
            that share a rank, the smallest one's that loses values: the others have room above.
        largest: (..., r) float32, the same of all parts, lossless ones included.
        down: (..., r) float32, that of each row of `down`.
        loses: (..., r) bool, whether rounding to the dtype changes a subnormal value of the column.
    """

    up: Tensor
    largest: Tensor
    down: Tensor
    loses: Tensor

    @classmethod
    def of(cls, down: Tensor, up: Tensor, dtype: torch.dtype) -> RankPeaks:
        """Look at a pair.

        Args:
            down: (..., r, in) float32.
            up: (..., out, r) float32, scale included.
            dtype: What both will be rounded to.
        """
        size = up.abs()
        small = (size < torch.finfo(dtype).tiny) & (up.to(dtype).to(up.dtype) != up)
        peak = size.amax(-2)
        return cls(peak, peak, down.abs().amax(-1), small.any(-2))

    def beside(self, other: RankPeaks) -> RankPeaks:
        """Join the peaks of two pairs with the same ranks: other rows of `up`, an equal `down`."""
        loses = torch.logical_or(self.loses, other.loses)
        peaks = [torch.where(own.loses, own.up, math.inf) for own in (self, other)]
        largest = torch.maximum(self.largest, other.largest)
        up = torch.where(loses, torch.minimum(*peaks), largest)
        return RankPeaks(up, largest, other.down, loses)

    def exponents(self, dtype: torch.dtype) -> Tensor:
        """(..., r) int32: `up` is multiplied by two to this power, and `down` divided by it.

        `down` gives what it can spare. Where that is not enough, both are made equally large, which
        loses least in all. It is a function of magnitudes alone, so it is the same on every device,
        in every order of reading and for every way of composing.
        """
        peaks = (self.up, self.largest, self.down)
        up, largest, down = (torch.frexp(peak).exponent - 1 for peak in peaks)
        highest = _exponent(torch.finfo(dtype).max) - 1 - largest
        wanted = torch.minimum(_lowest(dtype) - up, highest).clamp(max=MOST)
        least = torch.maximum(down - _lowest(dtype), torch.div(down - up, 2, rounding_mode="floor"))
        exponents = torch.minimum(wanted, least).clamp(min=0)
        has_magnitude = (self.up > 0) & (self.down > 0)
        finite = torch.isfinite(self.largest) & torch.isfinite(self.down)
        return torch.where(has_magnitude & finite & self.loses, exponents, 0).to(torch.int32)


def balanced(
    down: Tensor, up: Tensor, dtype: torch.dtype, *, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """A pair in a dtype, rank by rank out of its subnormal numbers.

    Args:
        down: (r, in) float32.
        up: (out, r) float32, scale included.
        dtype: What both are rounded to.
        parts: Equal parts of the rows that may be of very different sizes, as q, k and v are.
    """
    if not is_narrow(dtype) or not up.numel() or not down.numel():
        return down.to(dtype), up.to(dtype)
    peaks = [RankPeaks.of(down, own, dtype) for own in up.chunk(parts)]
    exponents = functools.reduce(RankPeaks.beside, peaks).exponents(dtype)
    return moved(down, -exponents.unsqueeze(-1), dtype), moved(up, exponents.unsqueeze(-2), dtype)


def moved(values: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Values times powers of two, rounded once to a dtype.

    Args:
        values: float32.
        exponents: int32 from -`MOST` to `MOST`, of a shape that broadcasts.
        dtype: Of the result.
    """
    # Made of its bits: exact on every device, whatever torch's default dtype is.
    factor = ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)
    return (values * factor).to(dtype)


def loses_small_values(values: Tensor, dtype: torch.dtype) -> bool:
    """Tell if rounding to a dtype changes any value that is subnormal in it.

    Where it changes none there is nothing to gain, and the values stay where they are.

    Args:
        values: In any floating dtype.
        dtype: What they will be rounded to.
    """
    if not is_narrow(dtype):
        return False
    wide = values.to(torch.float32) if values.itemsize == 1 else values
    small = wide[wide.abs() < torch.finfo(dtype).tiny]
    return not torch.equal(small.to(dtype).to(small.dtype), small)


def is_narrow(dtype: torch.dtype) -> bool:
    """Tell if a dtype has fewer exponents than float32."""
    return torch.finfo(dtype).tiny > torch.finfo(torch.float32).tiny


def _lowest(dtype: torch.dtype) -> int:
    """Exponent of the least peak that has `ROOM`."""
    return _exponent(torch.finfo(dtype).tiny) + ROOM


def _exponent(value: float) -> int:
    """The e of 2^e <= value < 2^(e + 1)."""
    return math.frexp(value)[1] - 1
