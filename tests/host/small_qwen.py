"""ComfyUI's own Qwen-Image made small, and its own sampling.

Sizes are those of `tests/conftest.py`, so that its LoRA drafts fit. Imports ComfyUI: only a fixture
that has started the host may import this module.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import nodes
import torch
from torch import nn

TEXT_WIDTH = 96
LATENT_CHANNELS = 16
CONFIG: dict[str, Any] = {
    "image_model": "qwen_image",
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (16, 24, 24),
}
_MODULATION_SIZE = 0.3
_BIAS_SIZE = 0.02

Conditioning = list[list[Any]]
"""A CONDITIONING of the host: pairs of an embedding (B, T, TEXT_WIDTH) and a dict."""


def small_qwen(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, **sizes: Any
) -> comfy.model_patcher.ModelPatcher:
    """Make a dense model of random weights under a real ModelPatcher.

    Args:
        seed: The same seed and sizes give the same weights.
        dtype: Dtype of weights and activations.
        **sizes: Overrides of `CONFIG`, e.g. `num_layers`.
    """
    model = copy.deepcopy(_made(seed, dtype, tuple(sizes.items())))
    return comfy.model_patcher.ModelPatcher(model, **devices())


@functools.cache
def _made(seed: int, dtype: torch.dtype, sizes: tuple[tuple[str, Any], ...]) -> nn.Module:
    """A model that nobody runs: each test has a copy of it."""
    config = comfy.supported_models.QwenImage({**CONFIG, **dict(sizes)})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    _fill(model.diffusion_model, torch.Generator().manual_seed(seed))
    return model


def devices() -> dict[str, torch.device]:
    """Load and offload device, chosen as the host's loaders choose them."""
    return {
        "load_device": comfy.model_management.get_torch_device(),
        "offload_device": comfy.model_management.unet_offload_device(),
    }


def conditioning(seed: int, *, batch: int = 1, tokens: int = 5, **options: Any) -> Conditioning:
    """Make a CONDITIONING of one random embedding; `options` are its dict."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, TEXT_WIDTH, generator=generator), options]]


def empty_latent(batch: int = 1, height: int = 8, width: int = 8) -> dict[str, torch.Tensor]:
    """Make a LATENT of zeros, 4-D as "Empty Latent Image" nodes give it; sampling makes it 5-D."""
    return {"samples": torch.zeros(batch, LATENT_CHANNELS, height, width)}


def ksample(
    model: comfy.model_patcher.ModelPatcher,
    *,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    latent: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
    steps: int = 3,
    cfg: float = 2.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    denoise: float = 1.0,
) -> torch.Tensor:
    """Do what the KSampler node does, in inference mode as the execution engine does it.

    Returns:
        (B, 16, 1, H, W) latents.
    """
    with torch.inference_mode():
        (sampled,) = nodes.common_ksampler(
            model,
            seed,
            steps,
            cfg,
            sampler,
            scheduler,
            conditioning(1) if positive is None else positive,
            conditioning(2) if negative is None else negative,
            empty_latent() if latent is None else latent,
            denoise=denoise,
        )
    return sampled["samples"]


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    # The host's layers are made without values: every parameter is set here.
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and "linear" not in name:
            parameter.copy_(1 + 0.1 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(_BIAS_SIZE * noise)
        else:
            size = _MODULATION_SIZE if "_mod." in name else 1.0
            parameter.copy_(size / math.sqrt(parameter.shape[1]) * noise)
