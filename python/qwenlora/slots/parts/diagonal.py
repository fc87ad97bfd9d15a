"""Parts that scale rows of a layer's output, or channels of its input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.slots.parts.part import at

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.slots.parts.part import Held

__all__ = ["factor_change", "input_factor_change", "without_bias"]


def factor_change(part: Held, output: Tensor) -> Tensor:
    """Give factor * (y - bias), or factor * y where the bias is scaled, too: (..., rows)."""
    return without_bias(part, output) * at(output, part.tensors["factor"])


def input_factor_change(part: Held, x: Tensor) -> Tensor:
    """Give x * factor: (..., K)."""
    factor = at(x, part.tensors["factor"])
    return x.to(factor.dtype) * factor


def without_bias(part: Held, output: Tensor) -> Tensor:
    """Give y - bias in the part's dtype, or y where the part holds no bias.

    It is rounded once. That is an error of a small change's own size, as the factors are less one.
    """
    bias = part.tensors.get("bias")
    return output if bias is None else output.to(bias.dtype) - at(output, bias)
