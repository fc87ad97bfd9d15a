"""Nunchaku's Qwen-Image on a GPU."""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline
from nunchaku import NunchakuQwenImageTransformer2DModel

from .studio import Studio

__all__ = ["load"]

_TRANSFORMER = "nunchaku-tech/nunchaku-qwen-image/svdq-int4_r32-qwen-image.safetensors"
_PIPELINE = "Qwen/Qwen-Image"
_SIDE = 1024


def load() -> Studio:
    """Load the model; needs its files, or the Hub, and 24 GB of device memory."""
    transformer = NunchakuQwenImageTransformer2DModel.from_pretrained(_TRANSFORMER)
    pipeline = QwenImagePipeline.from_pretrained(
        _PIPELINE, transformer=transformer, torch_dtype=torch.bfloat16
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.enable_model_cpu_offload()
    return Studio(pipeline, lambda order: {"prompt": order.prompt}, side=_SIDE)
