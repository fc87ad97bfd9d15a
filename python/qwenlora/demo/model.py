"""The demo's models: a small dense one of diffusers, and emulated quantized ones.

The full demo quantizes the dense one; the light one draws weights of the same sizes itself.
"""

from __future__ import annotations

from typing import Any

import torch

from qwenlora.demo.extra import require
from qwenlora.emulation import (
    AWQW4A16Linear,
    EmulatedConfig,
    EmulatedQwenImageTransformer,
    Precision,
    SVDQW4A4Linear,
)
from qwenlora.emulation.dense import dense_layers

__all__ = [
    "BASE_RANK",
    "dense_model",
    "dense_sizes",
    "drawn_model",
    "emulated_model",
    "forward",
]

BASE_RANK = 32

_CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "axes_dims_rope": (16, 24, 24),
}
_SEED = 0


def dense_model() -> Any:
    """Make a `QwenImageTransformer2DModel`: 2 blocks, 256 wide, diffusers' own initialization."""
    model_class = require("diffusers", "QwenImageTransformer2DModel")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return model_class(**_CONFIG).eval()


def emulated_model(dense: Any) -> EmulatedQwenImageTransformer:
    """Quantize a dense model as Nunchaku does: int4, and bfloat16 for the rest."""
    return EmulatedQwenImageTransformer.from_diffusers(
        dense, rank=BASE_RANK, precision=Precision.W4A4, dtype=torch.bfloat16, seed=_SEED
    )


def drawn_model() -> EmulatedQwenImageTransformer:
    """Quantize weights of the same sizes, drawn as PyTorch initializes a linear layer."""
    frame = EmulatedQwenImageTransformer(
        EmulatedConfig.from_diffusers(
            _CONFIG, rank=BASE_RANK, precision=Precision.W4A4, dtype=torch.bfloat16
        )
    )
    generator = torch.Generator().manual_seed(_SEED)
    state = {}
    for name, (outputs, inputs) in dense_sizes(frame).items():
        reach = inputs**-0.5
        for parameter, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            drawn = 2 * torch.rand(shape, generator=generator) - 1
            state[f"{name}.{parameter}"] = reach * drawn
    for name, module in frame.named_modules():
        if isinstance(module, torch.nn.RMSNorm):
            state[f"{name}.weight"] = torch.ones(module.weight.shape)
    return EmulatedQwenImageTransformer.from_dense_state(
        state, _CONFIG, rank=BASE_RANK, precision=Precision.W4A4, dtype=torch.bfloat16, seed=_SEED
    )


def dense_sizes(model: EmulatedQwenImageTransformer) -> dict[str, tuple[int, int]]:
    """Output and input channels of the dense layers that a model's layers stand for, by name."""
    sizes: dict[str, tuple[int, int]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, (SVDQW4A4Linear, AWQW4A16Linear, torch.nn.Linear)):
            names = dense_layers(path)
            sizes |= dict.fromkeys(names, (layer.out_features // len(names), layer.in_features))
    return sizes


def forward(model: EmulatedQwenImageTransformer) -> torch.Tensor:
    """Run the whole model on frozen inputs: 16 image tokens, 7 text tokens; (1, 16, 64)."""
    generator = torch.Generator().manual_seed(_SEED)
    image = torch.randn(1, 16, model.config.in_channels, generator=generator)
    text = torch.randn(1, 7, model.config.joint_attention_dim, generator=generator)
    output = model(
        hidden_states=image.to(model.dtype),
        encoder_hidden_states=text.to(model.dtype),
        timestep=torch.tensor([0.7]),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )
    sample: torch.Tensor = output[0]
    return sample
