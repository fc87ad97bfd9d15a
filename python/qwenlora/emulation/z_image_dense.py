"""A dense Z-Image transformer that is tiny, and in which every layer counts."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["tiny_z_image"]

WIDTH = 384
"""The least: heads have 128 channels, and W4A4 takes 8/3 of it in multiples of 128."""

HEADS = 3
_BIAS_SIZE = 0.1
_MODULATION_SIZE = 2.0
"""Makes gates that are neither shut nor saturated."""


def tiny_z_image(
    *,
    layers: int = 2,
    refiners: int = 1,
    caption_channels: int = 128,
    axes_lens: Sequence[int] = (256, 64, 64),
    seed: int = 0,
) -> Any:
    """Make a dense diffusers `ZImageTransformer2DModel` with random weights.

    Norms and modulations are random, too, so that each layer shows in the output.

    Args:
        layers: Blocks after the refiners.
        refiners: Blocks of each of both refiners.
        caption_channels: Channels of a caption's token.
        axes_lens: Positions along frames and captions, height and width.
        seed: The same seed gives the same model.

    Returns:
        A float32 model on the CPU of 384 channels and 3 heads, without gradients.

    Raises:
        ImportError: diffusers is not installed, or has no Z-Image.
    """
    diffusers: Any = importlib.import_module("diffusers")
    model = diffusers.ZImageTransformer2DModel(
        dim=WIDTH,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=caption_channels,
        axes_dims=[32, 48, 48],
        axes_lens=list(axes_lens),
    )
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        _fill(name, module, generator)
    with torch.no_grad():
        for token in (model.x_pad_token, model.cap_pad_token):
            token.normal_(generator=generator)
    model.eval().requires_grad_(False)
    return model


@torch.no_grad()
def _fill(name: str, module: nn.Module, generator: torch.Generator) -> None:
    if isinstance(module, nn.Linear):
        size = _MODULATION_SIZE if "adaLN_modulation" in name else 1.0
        module.weight.normal_(std=size / math.sqrt(module.in_features), generator=generator)
        if module.bias is not None:
            module.bias.normal_(std=_BIAS_SIZE, generator=generator)
    elif type(module).__name__ == "RMSNorm":
        # diffusers' own class in some versions, PyTorch's in others
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        weight.normal_(1.0, 0.1, generator=generator)
