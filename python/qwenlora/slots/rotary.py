"""What Nunchaku's fused kernel does to query and key before it writes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.packing.rotation import unpack_rotations

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["norm_and_rotate"]


_HEAD = 128
"""Channels of a head: the kernel has no others."""
_EPSILON = 1e-6
"""Of the kernel's norms, whatever the model's own norms have."""


def norm_and_rotate(qkv: Tensor, norm_q: Tensor, norm_k: Tensor, rotation: Tensor) -> Tensor:
    """Norm and rotate query and key in float32, in place, rounded once.

    Each head of 128 channels is brought to a mean square of 1, times the norm's weight. Each pair
    of neighbouring channels (a, b) is turned to (a cos - b sin, a sin + b cos).

    Args:
        qkv: (B, S, 3C), query, key and value one after the other.
        norm_q: (128,) weights of the query's norm.
        norm_k: (128,) weights of the key's norm.
        rotation: Of the tokens, and maybe more behind them: packed (B, S', 128) float32 as the
            kernel takes it, or (B, S', 64) complex. B may be 1.

    Returns:
        `qkv`. The value is as it was.

    Raises:
        ValueError: The rotation is of another form.
    """
    sine, cosine = _angles(rotation, qkv.shape[1])
    parts = qkv.view(*qkv.shape[:-1], 3, -1, _HEAD)  # (B, S, 3, H, 128)
    for place, weight in enumerate((norm_q, norm_k)):
        part = parts.select(-3, place)  # (B, S, H, 128)
        part.copy_(_turned(_normed(part.float(), weight), sine, cosine))
    return qkv


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    size = (x.square().mean(dim=-1, keepdim=True) + _EPSILON).rsqrt()  # (B, S, H, 1)
    return x * (size * weight.to(x.device, torch.float32))


def _turned(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    first, second = x.view(*x.shape[:-1], -1, 2).unbind(-1)  # (B, S, H, 64) each
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.stack(turned, dim=-1).flatten(-2)


def _angles(rotation: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine of the first tokens, (B, S, 1, 64) float32 each."""
    pairs = _HEAD // 2
    if rotation.ndim == 3 and rotation.is_complex() and rotation.shape[2] == pairs:
        own = rotation[:, :length, None]
        return own.imag, own.real
    if rotation.ndim != 3 or rotation.dtype != torch.float32 or rotation.shape[2] != _HEAD:
        raise ValueError(
            f"rotations must be (B, S, {_HEAD}) float32 packed or (B, S, {pairs}) complex, got:"
            f" {tuple(rotation.shape)} {rotation.dtype}"
        )
    sine, cosine = unpack_rotations(rotation)[:, :length, None].unbind(-1)
    return sine, cosine
