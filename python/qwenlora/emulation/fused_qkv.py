"""Nunchaku's kernel of a fused query, key and value that also normalizes and rotates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.emulation.contract import KernelContractError, check_tensor
from qwenlora.emulation.precision import Precision
from qwenlora.emulation.rope import rotate

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.emulation.arithmetic import SVDQArithmetic

HEAD_DIM = 128
"""The kernel handles heads of this width alone."""

EPSILON = 1e-6
"""Of the kernel's norms, whatever the model's own norms have."""

ROWS_PADDED = 256
"""Rows of an activation are padded to a multiple of this."""


def fused_qkv_norm_rotary(
    x: Tensor, qkv: SVDQArithmetic, norm_q: Tensor, norm_k: Tensor, rotation: Tensor | None
) -> Tensor:
    """Project to query, key and value, then normalize and rotate query and key.

    The layer is not called: its tensors are read.

    Args:
        x: (B, S, K), dtype of the layer.
        qkv: K → 3C: query, key and value one after the other.
        norm_q: (128,) weights of the query's norm.
        norm_k: (128,) weights of the key's norm.
        rotation: (B, S, 64) complex64; without it the kernel leaves out the norms, too.

    Returns:
        (B, S, 3C), dtype of `x`.

    Raises:
        KernelContractError: A tensor breaks what the kernel takes for granted. Among that: with
            more than one sample, S is a multiple of 256, since rows are padded at the end alone.
    """
    qkv.check(x)
    _check_heads(x, qkv.qweight.shape[0], norm_q, norm_k)
    if rotation is not None:
        _check_rotation(x, rotation)
    rows = x.reshape(-1, qkv.in_features)  # (M, K)
    product = qkv.product(*qkv.rounded(rows))  # (M, 3C) float32
    if qkv.precision is not Precision.EXACT:
        # The kernel's epilogue reads 16-bit values.
        product = product.to(x.dtype)
    if rotation is not None:
        product = norm_and_rotate(product, norm_q, norm_k, rotation.reshape(-1, HEAD_DIM // 2))
    return product.to(x.dtype).view(*x.shape[:-1], qkv.out_features)


def norm_and_rotate(product: Tensor, norm_q: Tensor, norm_k: Tensor, rotation: Tensor) -> Tensor:
    """Do what the kernel does to its product before it writes it.

    Args:
        product: (M, 3C), query, key and value one after the other.
        norm_q: (128,).
        norm_k: (128,).
        rotation: (M, 64) complex64.

    Returns:
        (M, 3C) float32; the value is as it was.
    """
    query, key, value = product.float().view(product.shape[0], 3, -1, HEAD_DIM).unbind(1)
    turned = [
        rotate(_normalized(part, weight), rotation)  # (M, heads, 128)
        for part, weight in ((query, norm_q), (key, norm_k))
    ]
    return torch.stack([*turned, value], dim=1).flatten(1)  # (M, 3C)


def _normalized(x: Tensor, weight: Tensor) -> Tensor:
    coefficient = (x.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt()  # (M, heads, 1)
    return x * (coefficient * weight.float())


def _check_heads(x: Tensor, outputs: int, norm_q: Tensor, norm_k: Tensor) -> None:
    if outputs % (3 * HEAD_DIM):
        raise KernelContractError(
            f"query, key and value must be heads of {HEAD_DIM} channels, got: {outputs} rows"
        )
    check_tensor("norm_q", norm_q, (HEAD_DIM,), x.dtype, x)
    check_tensor("norm_k", norm_k, (HEAD_DIM,), x.dtype, x)


def _check_rotation(x: Tensor, rotation: Tensor) -> None:
    batch, length = x.shape[:2]
    check_tensor("rotation", rotation, (batch, length, HEAD_DIM // 2), torch.complex64, x)
    if batch > 1 and length % ROWS_PADDED:
        raise KernelContractError(
            f"the tokens of each of {batch} samples must be a multiple of {ROWS_PADDED}, "
            f"got: {length}"
        )
