"""GLoRA: a low-rank pair of its own, and one that the base weight is multiplied by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.adapter import wide
from qwenlora.delta.factors import Factors
from qwenlora.delta.finite import damaged, is_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.adapters.weight import Weight

__all__ = ["glora"]


def glora(
    tensors: Mapping[str, Tensor],
    weight: Weight,
    *,
    module: str,
    row_begin: int,
    row_count: int,
) -> Factors:
    """The pair of rank 2r that equals b1 b2 + W a1 a2, without the scale.

    In today's layout a1 (K, r), a2 (r, K), b1 (rows, r), b2 (r, K). Older files have the roles of 1
    and 2 exchanged: the delta is b2 b1 + W a2 a1 there. The longer axis of a1 tells (LyCORIS,
    `modules/glora.py`).

    Args:
        tensors: `glora_a1`, `glora_a2`, `glora_b1` and `glora_b2`, flattened to matrices.
        weight: The layer's weight.
        module: Its name, for errors.
        row_begin: First logical row that it changes.
        row_count: How many.

    Returns:
        `up` [b1, W a1] and `down` [b2; a2], in float32, or in float64 where they are stored so.

    Raises:
        NonFiniteError: A value, or W a1, is NaN or infinite.
    """
    if not all(map(is_finite, tensors.values())):
        raise damaged(module, "its glora")
    a1, a2, b1, b2 = (wide(tensors[f"glora_{name}"]) for name in ("a1", "a2", "b1", "b2"))
    if a1.shape[0] < a1.shape[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    product = weight.times(a1.to(torch.float32), row_begin, row_count).to(b1)
    if not is_finite(product):
        raise damaged(module, "its glora or its weight")
    return Factors(down=torch.cat([b2, a2.to(b2)]), up=torch.cat([b1, product], dim=1))
