"""The demo's models: a small dense one of diffusers, and the emulated quantized one made of it."""

from __future__ import annotations

from typing import Any

import torch

from qwenlora.demo.extra import require
from qwenlora.emulation import EmulatedQwenImageTransformer, Precision

__all__ = ["BASE_RANK", "dense_model", "emulated_model", "forward"]

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
