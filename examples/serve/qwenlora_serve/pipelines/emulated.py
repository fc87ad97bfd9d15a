"""A tiny Qwen-Image with random weights: diffusers' pipeline around the emulated transformer."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from qwenlora import emulation

from .studio import Studio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..order import Order

__all__ = ["CONFIG", "load"]

CONFIG = emulation.EmulatedConfig(
    num_layers=4,
    heads=4,
    head_dim=64,
    axes_dims_rope=(16, 24, 24),
    joint_attention_dim=96,
    precision=emulation.Precision.EXACT,
    dtype=torch.float32,
)
"""Sizes of the transformer."""

_WORDS = 8
_SIDE = 32


def load() -> Studio:
    """Make the model, the same one each time."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=emulation.random_transformer(CONFIG, seed=0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return Studio(pipeline, _inputs, side=_SIDE)


def _inputs(order: Order) -> Mapping[str, Any]:
    """Embeddings that a prompt's digest is the seed of: there is no text encoder."""
    digest = hashlib.sha256(order.prompt.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    embeds = torch.randn(1, _WORDS, CONFIG.joint_attention_dim, generator=generator)
    # One forward for each step.
    mask = torch.ones(1, _WORDS, dtype=torch.long)
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "true_cfg_scale": 1.0}
