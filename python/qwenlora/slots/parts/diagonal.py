"""Parts that scale rows of a layer's output, or channels of its input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.slots.parts.part import at

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.slots.parts.part import Held

__all__ = ["factor_change", "with_input_factor", "without_bias"]


def factor_change(part: Held, output: Tensor) -> Tensor:
    """Give factor * (y - bias): (..., rows).

    One kernel goes over the output, and rounds once.
    """
    factor, bias = (at(output, part.tensors[name]) for name in ("factor", "bias"))
    taken = -(factor * bias)
    return torch.addcmul(taken, output.to(factor.dtype), factor)


def with_input_factor(part: Held, x: Tensor, total: Tensor) -> Tensor:
    """Give total + x * factor: (..., K)."""
    return torch.addcmul(total, x, at(x, part.tensors["factor"]).to(x.dtype))


def without_bias(part: Held, output: Tensor) -> Tensor:
    """Give y - bias in the part's dtype.

    It is rounded once. That is an error of a small change's own size, as the factors are less one.
    """
    bias = at(output, part.tensors["bias"])
    return output.to(bias.dtype) - bias
