"""A layer behind GELU that takes its activation in 4 bits without a sign, run by itself.

Nunchaku quantizes that activation inside the kernel of the layer before. Here PyTorch does, in the
layout that the layer's own kernel takes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from qwenlora.model.subclass import plain_class
from qwenlora.model.values import base_value
from qwenlora.packing.activation import (
    GROUP,
    ROWS,
    pack_activation,
    pack_low_rank_activation,
    pack_scales,
    padded,
)
from qwenlora.packing.layout import UNSIGNED_SHIFT, LowRankSide
from qwenlora.packing.pack import pack_vector, unpack_lowrank, unpack_vector
from qwenlora.slots.beside import add_side_branch, layer_output
from qwenlora.slots.branch_layout import CENTRE_BIAS, CENTRE_SUMS, LAYOUT
from qwenlora.weight.base_weight import BaseWeight

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qwenlora.model.target import Target
    from qwenlora.slots.branch_layout import BranchLayout

__all__ = ["centre_tensors", "quantize_unsigned", "takes_unsigned", "unsigned_output"]


_PIECE = 2 * ROWS
"""Tokens that are quantized at a time: what is held meanwhile is small, and stays in caches."""
_HIGHEST = 15
"""The largest value of 4 bits without a sign."""


def takes_unsigned(layer: nn.Module) -> bool:
    """Tell if a layer multiplies 4-bit activations without a sign."""
    weight = layer._parameters.get("qweight")
    is_packed = weight is not None and weight.dtype is torch.int8
    return is_packed and bool(getattr(layer, "act_unsigned", False))


def unsigned_output(layer: Any, x: Tensor) -> Tensor:
    """What the layer puts out with its branch, for what GELU gives it: (..., K) to (..., N)."""
    layout: BranchLayout | None = layer.__dict__.get(LAYOUT)
    rows = x.reshape(-1, x.shape[-1])
    if layout is not None and layout.runs_layer:
        raw, changed = partial(_run, layer), partial(_run_centred, layer)
        output = layer_output(layer, layout, rows, raw=raw, changed=changed)
    else:
        output = _run(layer, rows)
    output = add_side_branch(layer, (rows,), {}, output)
    return output.view(*x.shape[:-1], output.shape[-1])


def _run(layer: Any, x: Tensor) -> Tensor:
    """The layer itself, of an input that is not below the shift: (M, K) to (M, N)."""
    smooth = unpack_vector(layer.smooth_factor)
    down = unpack_lowrank(layer.proj_down, LowRankSide.DOWN)
    low_rank = pack_low_rank_activation(padded(torch.nn.functional.linear(x, down)).float())
    pieces = [quantize_unsigned(piece, smooth) for piece in torch.split(padded(x), _PIECE)]
    # Blocks of rows lie behind each other, whatever the shapes say.
    values = torch.cat([values.flatten() for values, _ in pieces])
    scales = torch.cat([scales.flatten() for _, scales in pieces])
    rows, columns = low_rank.shape[0], x.shape[1]
    output = torch.empty((x.shape[0], layer.out_features), dtype=x.dtype, device=x.device)
    packed = (values.view(rows, columns // 2), scales.view(columns // GROUP, rows))
    product: Tensor = layer.forward_quant(*packed, low_rank, output)
    return product


def quantize_unsigned(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """What the fused kernel does behind GELU.

    The kernel rounds the shifted and the smoothed value to 16 bits, takes each group's scale and
    multiplies by its reciprocal in float32, and stores the scale in 16 bits.

    Args:
        x: (M, K) in whole blocks, of 16 bits, not below the shift.
        smooth: (K,) of the same dtype.

    Returns:
        values: (M, K/2) uint8 packed.
        scales: (K/64, M) packed, of the dtype of `x`.
    """
    smoothed = ((x + UNSIGNED_SHIFT) / smooth).float().view(x.shape[0], -1, GROUP)
    scales = smoothed.abs().amax(dim=-1) * (1 / _HIGHEST)
    steps = torch.where(scales == 0, 1.0, scales).reciprocal()[..., None]
    values = (smoothed * steps).round().clamp(0, _HIGHEST).to(torch.uint8).view(x.shape)
    return pack_activation(values), pack_scales(scales.to(x.dtype))


def _run_centred(layer: Any, x: Tensor) -> Tensor:
    """The layer itself, of any input: (M, K) to (M, N).

    Of each token and group the middle of the smoothed values is taken off. What is left has both
    signs, and is the input of the layer's own quantizer and product. The middles go through the
    sums of the weight's groups.
    """
    sums, more = (layer._buffers[name] for name in (CENTRE_SUMS, CENTRE_BIAS))
    smooth = unpack_vector(layer.smooth_factor).view(-1, GROUP)
    grouped = x.view(x.shape[0], -1, GROUP)
    low, high = torch.aminmax((grouped / smooth).float(), dim=-1)
    middle = ((low + high) / 2).to(x.dtype)  # (M, K/64)
    centred = torch.addcmul(grouped, middle[..., None], smooth, value=-1).view_as(x)
    # The kernels take three axes.
    signed = _signed(layer, more)
    output: Tensor = plain_class(type(layer)).forward(signed, centred[None])[0]  # type: ignore[attr-defined]
    return torch.addmm(output, middle, sums.mT)


def _signed(layer: nn.Module, more: Tensor) -> nn.Module:
    """The same layer, of the same tensors, for signed activations that are not shifted."""
    kind = plain_class(type(layer))
    view: nn.Module = object.__new__(kind)
    view.__dict__.update(layer.__dict__)
    stored = layer._parameters["bias"]
    if stored is not None:
        bias = (stored.float() + more.float()).to(stored.dtype)
        view.__dict__["_parameters"] = {**layer._parameters, "bias": bias}
    view.__dict__["act_unsigned"] = False
    return view


def centre_tensors(target: Target) -> dict[str, Tensor]:
    """What the layer takes to run on inputs of any sign, by buffer name.

    Returns:
        The sums of W * smooth over groups of columns (N, K/64), and what the stored bias makes up
        for (N,) packed, both in the slot's dtype.
    """
    weight = BaseWeight.of(target)
    module: Any = target.module
    smooth = unpack_vector(module.smooth_factor).to(weight.device).float()
    count = weight.rows_total
    sums = torch.cat(
        [
            (rows * smooth).view(len(rows), -1, GROUP).sum(dim=-1)
            for _, rows in weight.panels(0, count)
        ]
    )
    tensors = {CENTRE_SUMS: sums}
    bias = weight.true_bias()
    stored = base_value(module, "bias")
    if bias is not None and stored is not None:
        more = bias - unpack_vector(stored.detach()).to(bias.device).float()
        tensors[CENTRE_BIAS] = pack_vector(more)
    return {name: own.to(target.device, target.dtype) for name, own in tensors.items()}
