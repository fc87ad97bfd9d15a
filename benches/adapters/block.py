"""The quantized layers of one Qwen-Image block: of Nunchaku's classes, or of the emulation's."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from qwenlora.emulation import AWQW4A16Linear, Precision, SVDQW4A4Linear, fused_gelu_mlp
from qwenlora.packing import pack

__all__ = ["BASE_RANK", "Block", "Layers", "Sizes"]

BASE_RANK = 32
DTYPE = torch.bfloat16


class Sizes:
    """Widths of a block, and how many tokens of each stream go through it."""

    def __init__(self, width: int, image: int, text: int) -> None:
        self.width = width
        self.tokens = {"img": image, "txt": text}


class FeedForward(nn.Module):
    """An MLP of Nunchaku's: both layers in one kernel."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        activation = nn.Module()
        activation.proj = first
        activation.approximate = "tanh"
        self.net = nn.ModuleList([activation, nn.Identity(), second])

    def forward(self, hidden_states: Tensor) -> Tensor:
        first: Any = self.net[0].proj
        second: Any = self.net[2]
        return fused_gelu_mlp(hidden_states, first, second)


def _nunchaku_mlp(first: nn.Module, second: nn.Module) -> nn.Module:
    """Nunchaku's own MLP around two layers that are there."""
    feed_forward = importlib.import_module("diffusers.models.attention").FeedForward
    own = importlib.import_module("nunchaku.models.attention").NunchakuFeedForward
    with torch.device("meta"):
        mlp = own(feed_forward(dim=64, dim_out=64, activation_fn="gelu-approximate"))
    mlp.net[0].proj, mlp.net[2] = first, second
    return mlp


class Block(nn.Module):
    """Attention, MLPs and modulations of one block, under their paths."""

    def __init__(self, sizes: Sizes, device: torch.device, *, on_kernels: bool) -> None:
        super().__init__()
        width = sizes.width
        self._device = device
        self._on_kernels = on_kernels
        self.attn = nn.Module()
        self.attn.to_qkv = self._svdq(width, 3 * width)
        self.attn.add_qkv_proj = self._svdq(width, 3 * width)
        self.attn.to_out = nn.ModuleList([self._svdq(width, width)])
        self.attn.to_add_out = self._svdq(width, width)
        mlp = _nunchaku_mlp if on_kernels else FeedForward
        for stream in ("img", "txt"):
            first = self._svdq(width, 4 * width)
            second = self._svdq(4 * width, width, act_unsigned=True)
            setattr(self, f"{stream}_mlp", mlp(first, second))
            setattr(self, f"{stream}_mod", nn.Sequential(nn.SiLU(), self._awq(width, 6 * width)))

    def _svdq(self, inputs: int, outputs: int, **settings: Any) -> nn.Module:
        if self._on_kernels:
            kind = importlib.import_module("nunchaku.models.linear").SVDQW4A4Linear
            layer = kind(inputs, outputs, rank=BASE_RANK, device=self._device, **settings)
        else:
            layer = SVDQW4A4Linear(
                inputs,
                outputs,
                BASE_RANK,
                precision=Precision.W4A4,
                device=self._device,
                **settings,
            )
        return _filled_svdq(layer, self._device)

    def _awq(self, inputs: int, outputs: int) -> nn.Module:
        if self._on_kernels:
            kind = importlib.import_module("nunchaku.models.linear").AWQW4A16Linear
            layer = kind(inputs, outputs, device=self._device, torch_dtype=DTYPE)
        else:
            layer = AWQW4A16Linear(inputs, outputs, precision=Precision.W4A4, torch_dtype=DTYPE)
            layer.to(self._device)
        return _filled_awq(layer, self._device)

    def layers(self) -> dict[str, nn.Module]:
        """What is called, by path: an MLP as a whole."""
        paths = ("attn.to_qkv", "attn.add_qkv_proj", "attn.to_out.0", "attn.to_add_out")
        paths += ("img_mlp", "txt_mlp", "img_mod.1", "txt_mod.1")
        return {path: self.get_submodule(path) for path in paths}


class Layers(nn.Module):
    """A model of one block's layers."""

    def __init__(self, sizes: Sizes, device: torch.device, *, on_kernels: bool) -> None:
        super().__init__()
        block = Block(sizes, device, on_kernels=on_kernels)
        self.transformer_blocks = nn.ModuleList([block])
        generator = torch.Generator(device=device).manual_seed(3)
        self.inputs: dict[str, Tensor] = {}
        for path in block.layers():
            is_text = path.startswith("txt") or "add" in path
            tokens = sizes.tokens["txt" if is_text else "img"]
            shape = (1, sizes.width) if "_mod" in path else (1, tokens, sizes.width)
            own = torch.randn(shape, device=device, generator=generator)
            self.inputs[path] = own.to(DTYPE)

    def forward(self) -> dict[str, Tensor]:
        """Call every layer once."""
        layers = self.transformer_blocks[0].layers()  # type: ignore[operator]
        return {path: layer(self.inputs[path]) for path, layer in layers.items()}


def _filled_svdq(layer: Any, device: torch.device) -> nn.Module:
    inputs, outputs = layer.in_features, layer.out_features
    generator = torch.Generator(device=device).manual_seed(inputs + outputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    values = torch.randint(-7, 8, (outputs, inputs), device=device, generator=generator)
    scales = (0.5 + normal(outputs, inputs // 64).abs()) / (5 * math.sqrt(inputs))
    layer.qweight.data = pack.pack_svdq_qweight(values.to(torch.int8))
    layer.wscales.data = pack.pack_svdq_wscales(scales.to(DTYPE))
    layer.bias.data = pack.pack_vector((0.1 * normal(outputs)).to(DTYPE))
    layer.smooth_factor.data = pack.pack_vector(torch.exp(0.4 * normal(inputs)).to(DTYPE))
    layer.smooth_factor_orig.data = layer.smooth_factor.data.clone()
    down = (normal(BASE_RANK, inputs) / math.sqrt(inputs)).to(DTYPE)
    up = (normal(outputs, BASE_RANK) / 6).to(DTYPE)
    layer.proj_down.data = pack.pack_lowrank(down, pack.LowRankSide.DOWN)
    layer.proj_up.data = pack.pack_lowrank(up, pack.LowRankSide.UP)
    own: nn.Module = layer
    return own


def _filled_awq(layer: Any, device: torch.device) -> nn.Module:
    inputs, outputs = layer.in_features, layer.out_features
    generator = torch.Generator(device=device).manual_seed(5)
    values = torch.randint(0, 16, (outputs, inputs), device=device, generator=generator)
    scales = torch.full((inputs // 64, outputs), 1 / (5 * math.sqrt(inputs)), device=device)
    layer.qweight.data = pack.pack_awq_qweight(values.to(torch.uint8))
    layer.wscales.data = scales.to(DTYPE)
    layer.wzeros.data = (-7.5 * scales).to(DTYPE)
    layer.bias.data = torch.zeros(outputs, dtype=DTYPE, device=device)
    own: nn.Module = layer
    return own
