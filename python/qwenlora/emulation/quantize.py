"""4-bit quantization in groups of 64 input channels, as the kernels and the converters do it."""

from __future__ import annotations

import enum

import torch

GROUP_SIZE = 64
"""Input channels that share one scale."""


class IntegerRange(enum.Enum):
    """Range of a 4-bit activation: (least, greatest, value of the group's largest magnitude)."""

    SIGNED = (-8, 7, 7)
    UNSIGNED = (0, 15, 15)


def quantize_activation(
    x: torch.Tensor, integer_range: IntegerRange
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize smoothed activations row by row.

    The stored scale is rounded to the activation's dtype, while the values are divided by the
    unrounded one: that is what the kernels do.

    Args:
        x: (M, K), K a multiple of 64, any float dtype.
        integer_range: Signed for most layers, unsigned behind GELU.

    Returns:
        values: (M, K) int8.
        scales: (M, K/64), dtype of `x`.
    """
    least, greatest, peak = integer_range.value
    groups = _grouped(x)  # (M, K/64, 64)
    scales = groups.abs().amax(dim=-1) * (1.0 / peak)  # (M, K/64)
    # times the reciprocal, like the kernels: a quotient can fall on the other side of a step
    values = (groups * _nonzero(scales).reciprocal()[..., None]).round().clamp(least, greatest)
    return values.to(torch.int8).flatten(-2), scales.to(x.dtype)


def quantize_weight(
    weight: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the residual weight of an SVDQ layer: signed, symmetric.

    Args:
        weight: (N, K), K a multiple of 64, any float dtype.
        scale_dtype: Dtype that the scales are stored in.

    Returns:
        values: (N, K) int8 in [-7, 7].
        scales: (N, K/64) in `scale_dtype`.
    """
    groups = _grouped(weight)  # (N, K/64, 64)
    scales = (groups.abs().amax(dim=-1) / 7).to(scale_dtype)  # (N, K/64)
    values = (groups / _nonzero(scales.float())[..., None]).round().clamp(-7, 7)
    return values.to(torch.int8).flatten(-2), scales


def quantize_weight_with_zeros(
    weight: torch.Tensor, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize the weight of an AWQ layer: unsigned, with a zero per group.

    Args:
        weight: (N, K), K a multiple of 64, any float dtype.
        scale_dtype: Dtype that scales and zeros are stored in.

    Returns:
        values: (N, K) uint8 in [0, 15].
        scales: (N, K/64) in `scale_dtype`.
        zeros: (N, K/64) in `scale_dtype`; the weight is values * scale + zero.
    """
    groups = _grouped(weight)  # (N, K/64, 64)
    zeros = groups.amin(dim=-1).to(scale_dtype)  # (N, K/64)
    scales = ((groups.amax(dim=-1) - zeros.float()) / 15).to(scale_dtype)  # (N, K/64)
    steps = (groups - zeros.float()[..., None]) / _nonzero(scales.float())[..., None]
    values = steps.round().clamp(0, 15)
    return values.to(torch.uint8).flatten(-2), scales, zeros


def dequantize(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """Return values * scale [+ zero] in float32.

    Args:
        values: (M, K) integers.
        scales: (M, K/64).
        zeros: (M, K/64) or None.

    Returns:
        (M, K) float32.
    """
    groups = _grouped(values)  # (M, K/64, 64)
    groups = groups * scales.float()[..., None]
    if zeros is not None:
        groups = groups + zeros.float()[..., None]
    return groups.flatten(-2)


def _grouped(x: torch.Tensor) -> torch.Tensor:
    # (M, K) -> (M, K/64, 64); float32, since 16-bit quotients would round a value across a step
    return x.float().reshape(x.shape[0], -1, GROUP_SIZE)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    # A group of zeros has scale 0; dividing by 1 instead keeps its zeros.
    return torch.where(scales == 0, 1.0, scales)
