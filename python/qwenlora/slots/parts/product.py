"""Parts that add a product of the input: a Kronecker product, a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.slots.parts.part import at

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.slots.parts.part import Held

__all__ = ["dense_change", "kron_change", "kron_product"]


def kron_change(part: Held, x: Tensor) -> Tensor:
    """Give rows * kron(w1, w2) (x * columns): (..., K) to (..., rows)."""
    w1, w2 = (at(x, part.tensors[name]) for name in ("w1", "w2"))
    x = x.to(w1.dtype)
    columns, rows = part.tensors.get("columns"), part.tensors.get("rows")
    product = kron_product(x if columns is None else x * at(x, columns), w1, w2)
    return product if rows is None else product * at(x, rows)


def dense_change(part: Held, x: Tensor) -> Tensor:
    """Give unscale * values x: (..., K) to (..., rows)."""
    values, unscale = (at(x, part.tensors[name]) for name in ("values", "unscale"))
    return torch.nn.functional.linear(x.to(values.dtype), values) * unscale


def kron_product(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """X kron(w1, w2)^T without forming the product: Y = w1 X w2^T per token.

    Args:
        x: (..., im il).
        w1: (ol, im).
        w2: (ok, il).

    Returns:
        (..., ol ok), row i ok + k of the product at i ok + k.
    """
    # (..., im il) -> (..., im, il)
    tokens = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])
    return torch.matmul(w1, torch.matmul(tokens, w2.mT)).flatten(-2)
