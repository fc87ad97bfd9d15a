"""4-bit floats in groups of 16 input channels, as Nunchaku's nvfp4 kernels have them.

A weight is value * group scale * tensor scale * channel scale. Values are e2m1 (0, 0.5, 1, 1.5, 2,
3, 4, 6 and their negatives), group scales e4m3, channel scales of the activation's dtype.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora.packing import pack
from qwenlora.packing.layout import E2M1

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GROUP",
    "SCALE",
    "PackedWeight",
    "packed_weight",
    "rounded_activation",
    "unpacked_weight",
]

GROUP = 16
"""Input channels that share one scale."""
SCALE = torch.float8_e4m3fn
"""Dtype of the scales of groups."""
_MAX_SCALE = 448.0
_PEAK = E2M1[-1]
"""The largest value: a group's largest magnitude becomes it."""


class PackedWeight(NamedTuple):
    """A weight as an nvfp4 layer stores it.

    Attributes:
        qweight: (N, K/2) int8 packed.
        wscales: (K/16, N) float8_e4m3fn packed.
        wcscales: (N,) in packed vector order.
        wtscale: One factor on all values.
    """

    qweight: Tensor
    wscales: Tensor
    wcscales: Tensor
    wtscale: float


def packed_weight(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Quantize and pack.

    Args:
        weight: (N, K) float32, N a multiple of 128 and K of 64.
        dtype: Dtype of the channel scales.
    """
    wtscale = float(weight.abs().max()) / (_PEAK * _MAX_SCALE) or 1.0
    rows = weight.abs().amax(dim=1) / (_PEAK * _MAX_SCALE * wtscale)  # (N,) at most 1
    channel = torch.where(rows == 0, 1.0, rows).to(dtype)
    groups = _grouped(weight / (wtscale * channel.float()[:, None]))  # (N, K/16, 16)
    scales = (groups.abs().amax(dim=-1) / _PEAK).clamp(max=_MAX_SCALE).to(SCALE)  # (N, K/16)
    codes = _codes(groups / _nonzero(scales.float())[..., None]).flatten(1)  # (N, K)
    # The nibble of a negative value is its magnitude's with the highest bit, of two's complement.
    signed = torch.where(codes >= len(E2M1), codes - 2 * len(E2M1), codes).to(torch.int8)
    return PackedWeight(
        pack.pack_svdq_qweight(signed),
        pack.pack_svdq_micro_scales(scales),
        pack.pack_vector(channel),
        wtscale,
    )


def unpacked_weight(qweight: Tensor, wscales: Tensor, wtscale: float | None) -> Tensor:
    """(N, K) float32: the values of a packed weight, without its channel scales."""
    codes = pack.unpack_svdq_qweight(qweight).long() & 15  # (N, K)
    scales = pack.unpack_svdq_micro_scales(wscales).float()  # (N, K/16)
    values = _grouped(_table(codes.device)[codes]) * scales[..., None]
    return values.flatten(1) * (1.0 if wtscale is None else wtscale)


def rounded_activation(x: Tensor) -> Tensor:
    """Round smoothed activations to what the kernel multiplies with.

    Scales are rounded to 8 bits, while values are divided by the unrounded ones: so do the kernels.

    Args:
        x: (M, K), K a multiple of 16, any float dtype.

    Returns:
        (M, K) float32.
    """
    groups = _grouped(x.float())  # (M, K/16, 16)
    scales = (groups.abs().amax(dim=-1) * (1.0 / _PEAK)).clamp(max=_MAX_SCALE)  # (M, K/16)
    codes = _codes(groups * _nonzero(scales).reciprocal()[..., None])
    rounded = _table(x.device)[codes] * scales.to(SCALE).float()[..., None]
    return rounded.flatten(-2)


def _codes(values: Tensor) -> Tensor:
    """The nearest e2m1 code of each value, of two equally near ones the even one; int64."""
    magnitudes = values.abs()
    codes = torch.zeros_like(magnitudes, dtype=torch.int64)
    for lower, (below, above) in enumerate(pairwise(E2M1)):
        middle = (below + above) / 2
        codes += magnitudes > middle if lower % 2 == 0 else magnitudes >= middle
    return torch.where(values < 0, codes + len(E2M1), codes)


def _table(device: torch.device) -> Tensor:
    """(16,) float32: the value of each code."""
    return torch.tensor([*E2M1, *(-value for value in E2M1)], device=device)


def _grouped(x: Tensor) -> Tensor:
    # (M, K) -> (M, K/16, 16)
    return x.reshape(x.shape[0], -1, GROUP)


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)
