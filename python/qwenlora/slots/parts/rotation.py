"""Parts that rotate blocks of a layer's output or input.

Blocks are kept without the identity. So 16 bits round the change alone, and what is added to the
output is as exact as the output itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.butterfly import butterfly_stage
from qwenlora.slots.parts.diagonal import without_bias
from qwenlora.slots.parts.part import at

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.slots.parts.part import Held

__all__ = ["butterfly_change", "rotation_change", "with_input_rotation"]


def rotation_change(part: Held, output: Tensor) -> Tensor:
    """Give blocks[k] (y - bias)_k for each block k of rows: (..., rows)."""
    blocks = at(output, part.tensors["blocks"])
    return blockwise(without_bias(part, output), blocks.mT)


def with_input_rotation(part: Held, x: Tensor, total: Tensor) -> Tensor:
    """Give total + x', where x'_k = x_k blocks[k] for each block k of inputs: (..., K)."""
    blocks = at(x, part.tensors["blocks"])
    return total + blockwise(x.to(blocks.dtype), blocks).to(total.dtype)


def butterfly_change(part: Held, output: Tensor) -> Tensor:
    """Give strength * (z_m * (1 + rescale) - z_0), where z_0 is y - bias: (..., rows).

    The difference z_i - z_0 is what is carried from stage to stage: it is small, so it is rounded
    finely.
    """
    stages, rescale, strength = (
        at(output, part.tensors[name]) for name in ("stages", "rescale", "strength")
    )
    begin = without_bias(part, output)
    change = torch.zeros_like(begin)
    for index in range(stages.shape[0]):
        change = change + butterfly_stage(begin + change, stages[index], index)
    return (change + (begin + change) * rescale) * strength


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """Give x_k blocks[k] for each block k: (..., n b), (n, b, b) to (..., n b)."""
    count, size = blocks.shape[:2]
    # (..., n b) -> (M, n, b) -> (n, M, b), where M may be 0
    by_block = x.reshape(math.prod(x.shape[:-1]), count, size).transpose(0, 1)
    # (n, M, b) -> (M, n, b) -> (..., n b)
    return torch.bmm(by_block, blocks).transpose(0, 1).reshape(x.shape)
