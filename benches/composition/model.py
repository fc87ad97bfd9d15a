"""Models whose low-rank branches have the real sizes, built without a checkpoint."""

from __future__ import annotations

import copy
import enum
from dataclasses import replace

import torch
from torch import Tensor, nn

from composition.shapes import LINEARS, MODULATIONS
from qwenlora import emulation
from qwenlora.emulation.lite_layers import lite_layers

_POOL = 1 << 22


class Weights(enum.Enum):
    """What the layers hold beside their low-rank branches, which composition does not touch."""

    LEAN = "lean"
    """Empty quantized weights: 60 blocks take 2 GB."""

    FULL = "full"
    """Quantized weights of real size, never filled: 60 blocks take 12 GB."""


class Values:
    """Normal bfloat16 values for tensors of any size, taken from one pool at random offsets."""

    def __init__(self, seed: int, device: str) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(_POOL, generator=self._generator).bfloat16().to(device)

    def fill(self, tensor: Tensor) -> Tensor:
        """Fill a contiguous tensor; two tensors get the same values with odds of 1 to 4 million."""
        flat = tensor.view(-1)
        begin = int(torch.randint(_POOL, (), generator=self._generator))
        done = 0
        while done < len(flat):
            count = min(len(flat) - done, _POOL - begin)
            flat[done : done + count].copy_(self._pool[begin : begin + count])
            done, begin = done + count, 0
        return tensor


def build_model(blocks: int, base_rank: int, device: str, weights: Weights) -> nn.Module:
    """A bfloat16 transformer of real width with random base branches, on a device."""
    config = emulation.EmulatedConfig(
        num_layers=blocks,
        rank=base_rank,
        precision=emulation.Precision.W4A4,
        dtype=torch.bfloat16,
    )
    # One block is made, and copied without its values.
    model = emulation.EmulatedQwenImageTransformer(replace(config, num_layers=1))
    if weights is Weights.LEAN:
        for module in model.modules():
            if isinstance(module, (emulation.SVDQW4A4Linear, emulation.AWQW4A16Linear)):
                module.qweight = nn.Parameter(module.qweight[:0].clone(), requires_grad=False)
    model = model.to("meta")
    copies = (copy.deepcopy(model.transformer_blocks[0]) for _ in range(blocks - 1))
    model.transformer_blocks.extend(copies)
    model.config = config
    model = model.to_empty(device=device).eval().requires_grad_(False)
    values = Values(base_rank, device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, emulation.SVDQW4A4Linear):
                values.fill(module.proj_down)
                values.fill(module.proj_up)
    return model


def build_lite_model(blocks: int, base_rank: int, device: str, weights: Weights) -> nn.Module:
    """The same as diffusers builds it: query, key and value apart, and a rank in each layer."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        dense = QwenImageTransformer2DModel(num_layers=1).to(torch.bfloat16)
    layers = lite_layers(emulation.Precision.W4A4)
    common = {"precision": "int4", "group_size": 64}
    paths = [f"transformer_blocks.0.{name}" for name in LINEARS]
    modulations = [f"transformer_blocks.0.{name}" for name in MODULATIONS]
    config = {
        "svdq_w4a4": {**common, "rank": base_rank, "targets": paths},
        "awq_w4a16": {**common, "targets": modulations},
    }
    layers.replace_with_nunchaku_linear(dense, config, torch.bfloat16)
    if weights is Weights.LEAN:
        for path in paths + modulations:
            layer = dense.get_submodule(path)
            layer.qweight = nn.Parameter(layer.qweight[:0].clone(), requires_grad=False)
    dense = nn.Module.to(dense, "meta")
    copies = (copy.deepcopy(dense.transformer_blocks[0]) for _ in range(blocks - 1))
    dense.transformer_blocks.extend(copies)
    model = dense.to_empty(device=device).eval().requires_grad_(False)
    values = Values(base_rank, device)
    for module in model.modules():
        if isinstance(module, layers.SVDQW4A4Linear):
            values.fill(module.proj_down.data)
            values.fill(module.proj_up.data)
    return model
