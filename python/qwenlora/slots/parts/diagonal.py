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
    """Give factor * (y - bias), or factor * y where the bias is scaled, too: (..., rows).

    One kernel goes over the output, and rounds once.
    """
    factor, bias = at(output, part.tensors["factor"]), part.tensors.get("bias")
    if bias is None:
        return output.to(factor.dtype) * factor
    taken = -(factor * at(output, bias))
    return torch.addcmul(taken, output.to(factor.dtype), factor)


def with_input_factor(part: Held, x: Tensor, total: Tensor) -> Tensor:
    """Give total + x * factor: (..., K)."""
    return torch.addcmul(total, x, at(x, part.tensors["factor"]).to(x.dtype))


def without_bias(part: Held, output: Tensor) -> Tensor:
    """Give y - bias in the part's dtype, or y where the part holds no bias.

    It is rounded once. That is an error of a small change's own size, as the factors are less one.
    """
    bias = part.tensors.get("bias")
    return output if bias is None else output.to(bias.dtype) - at(output, bias)
