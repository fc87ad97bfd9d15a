"""ComfyUI's own Z-Image made small.

Imports ComfyUI: only a fixture that has started the host may import this module.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch
from torch import nn

from . import small_qwen
from .small_qwen import Conditioning, devices

TEXT_WIDTH = 128
LATENT_CHANNELS = 16
CONFIG: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": LATENT_CHANNELS,
    "cap_feat_dim": TEXT_WIDTH,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "dim": 384,
    "n_heads": 3,
    "n_kv_heads": 3,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_BIAS_SIZE = 0.02


def small_z_image(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, **sizes: Any
) -> comfy.model_patcher.ModelPatcher:
    """Make a dense model of random weights under a real ModelPatcher.

    Args:
        seed: The same seed and sizes give the same weights.
        dtype: Dtype of weights and activations.
        **sizes: Overrides of `CONFIG`, e.g. `n_layers`.
    """
    config = comfy.supported_models.ZImage({**CONFIG, **sizes})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    _fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return comfy.model_patcher.ModelPatcher(model, **devices())


def conditioning(seed: int, *, batch: int = 1, tokens: int = 5) -> Conditioning:
    """Make a CONDITIONING of one random embedding."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, TEXT_WIDTH, generator=generator), {}]]


def ksample(model: comfy.model_patcher.ModelPatcher, **job: Any) -> torch.Tensor:
    """Do what the KSampler node does; see `small_qwen.ksample`. Few steps, of one condition.

    Returns:
        (B, 16, H, W) latents.
    """
    conditions = {"positive": conditioning(1), "negative": conditioning(2)}
    return small_qwen.ksample(model, **{**conditions, "steps": 2, "cfg": 1.0, **job})


def forward(model: comfy.model_patcher.ModelPatcher, *, batch: int = 1) -> torch.Tensor:
    """Run the transformer once, as ComfyUI's model calls it: (B, 16, 8, 8)."""
    transformer = model.model.diffusion_model
    dtype = transformer.dtype
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, LATENT_CHANNELS, 8, 8, generator=generator).to(dtype)
    context = torch.randn(batch, 5, TEXT_WIDTH, generator=generator).to(dtype)
    options = model.model_options["transformer_options"]
    time = torch.full((batch,), 0.3)
    with torch.inference_mode():
        return transformer(
            x, time, context=context, num_tokens=5, control=None, transformer_options=options
        )


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    # The host's layers are made without values: every parameter is set here. Modulation is as large
    # as other layers, so that the gates are open.
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.1 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(_BIAS_SIZE * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter.shape[1]))
