"""Emulated transformers with random weights, made without a dense model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwenlora.emulation.awq import SCALE_PLANES, AWQW4A16Linear
from qwenlora.emulation.dense import random_smooth
from qwenlora.emulation.linear import SVDQW4A4Linear
from qwenlora.emulation.precision import Precision
from qwenlora.emulation.transformer import EmulatedQwenImageTransformer
from qwenlora.packing import pack
from qwenlora.packing.layout import MODULATION_PLANES

if TYPE_CHECKING:
    from qwenlora.emulation.config import EmulatedConfig

_UNIFORM_INT4_DEVIATION = math.sqrt((16**2 - 1) / 12)
_MODULATION_SIZE = 0.3
_LOW_RANK_SIZE = 0.3
_BIAS_SIZE = 0.02


def random_transformer(config: EmulatedConfig, seed: int = 0) -> EmulatedQwenImageTransformer:
    """Make a model of random weights whose activations stay of ordinary size.

    The quantized values themselves are drawn, so that no SVD and no quantization is needed and
    wide models are cheap, too.

    Args:
        config: Sizes and precision.
        seed: The same seed and config give the same model.

    Returns:
        A new model on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    model = EmulatedQwenImageTransformer(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SVDQW4A4Linear):
                _fill_svdq(module, generator)
            elif isinstance(module, AWQW4A16Linear):
                _fill_awq(module, generator)
            else:
                _fill_plain(module, generator)
    return model.eval()


def _fill_svdq(layer: SVDQW4A4Linear, generator: torch.Generator) -> None:
    size = 1 / math.sqrt(layer.in_features)
    if layer.precision is Precision.EXACT:
        _fill_normal(layer.qweight, size, generator)
    else:
        _fill_bytes(layer.qweight, generator)
        layer.wscales.fill_(size / _UNIFORM_INT4_DEVIATION)
    if layer.bias is not None:
        _fill_normal(layer.bias, _BIAS_SIZE, generator)
    smooth = pack.pack_vector(random_smooth(layer.in_features, generator))
    layer.smooth_factor.copy_(smooth)
    layer.smooth_factor_orig.copy_(smooth)
    # Packing only permutes, so that random packed factors are random factors.
    _fill_normal(layer.proj_down, size, generator)
    _fill_normal(layer.proj_up, _LOW_RANK_SIZE / math.sqrt(layer.rank), generator)


def _fill_awq(layer: AWQW4A16Linear, generator: torch.Generator) -> None:
    size = _MODULATION_SIZE / math.sqrt(layer.in_features)
    if layer.precision is Precision.EXACT:
        _fill_normal(layer.qweight, size, generator)
    else:
        _fill_bytes(layer.qweight, generator)
        layer.wscales.fill_(size / _UNIFORM_INT4_DEVIATION)
        layer.wzeros.copy_(layer.wscales.float() * -7.5)
    if layer.bias is not None:
        noise = _MODULATION_SIZE * torch.randn(layer.out_features, generator=generator)
        planes = noise.view(-1, MODULATION_PLANES)  # (C, 6)
        planes[:, SCALE_PLANES] += 1
        layer.bias.copy_(noise)


def _fill_plain(module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, nn.Linear):
        _fill_normal(module.weight, 1 / math.sqrt(module.in_features), generator)
        _fill_normal(module.bias, _BIAS_SIZE, generator)
    elif isinstance(module, nn.RMSNorm):
        module.weight.copy_(1 + 0.1 * torch.randn(module.weight.shape, generator=generator))


def _fill_normal(tensor: torch.Tensor, size: float, generator: torch.Generator) -> None:
    tensor.copy_(size * torch.randn(tensor.shape, generator=generator))


def _fill_bytes(packed: torch.Tensor, generator: torch.Generator) -> None:
    values = torch.randint(0, 256, (packed.nbytes,), generator=generator, dtype=torch.uint8)
    packed.copy_(values.view(packed.dtype).view(packed.shape))
