"""Z-Image of the released sizes, and a LoRA of all its linears, without a checkpoint."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from composition.model import Values
from qwenlora import emulation
from qwenlora.emulation import Precision, ZImageForm
from qwenlora.emulation.lite_layers import lite_layers
from qwenlora.emulation.z_image_layers import FusedAttention

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WIDTH, TIME = 3840, 256
HIDDEN = WIDTH * 8 // 3
LAYERS, REFINERS = 30, 2
FORMS = (ZImageForm.FUSED, ZImageForm.STOCK)
"""Nunchaku's since 1.1, and diffusers'."""

QUANTIZED = {
    "attention.to_q": (WIDTH, WIDTH),
    "attention.to_k": (WIDTH, WIDTH),
    "attention.to_v": (WIDTH, WIDTH),
    "attention.to_out.0": (WIDTH, WIDTH),
    "feed_forward.w1": (HIDDEN, WIDTH),
    "feed_forward.w2": (WIDTH, HIDDEN),
    "feed_forward.w3": (HIDDEN, WIDTH),
}
MODULATION = {"adaLN_modulation.0": (4 * WIDTH, TIME)}
"""(out, in) of a block's linears, as a LoRA trains them."""


def blocks(layers: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Every block's path, and its linears; those of captions have no modulation."""
    refiners = min(REFINERS, layers)
    for name, count in (("layers", layers), ("noise_refiner", refiners)):
        for index in range(count):
            yield f"{name}.{index}", QUANTIZED | MODULATION
    for index in range(refiners):
        yield f"context_refiner.{index}", QUANTIZED


def build_z_image(form: ZImageForm, layers: int, base_rank: int, device: str) -> nn.Module:
    """A bfloat16 transformer with random values, on a device; `FUSED` or `STOCK`."""
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        dense: Any = ZImageTransformer2DModel(
            n_layers=layers, n_refiner_layers=min(REFINERS, layers)
        )
    model = nn.Module.to(dense, torch.bfloat16)
    paths = [path for path, _ in blocks(layers)]
    if form is ZImageForm.STOCK:
        targets = [f"{path}.{name}" for path in paths for name in QUANTIZED]
        config = {"precision": "int4", "group_size": 64, "rank": base_rank, "targets": targets}
        layer = lite_layers(Precision.W4A4)
        layer.replace_with_nunchaku_linear(model, {"svdq_w4a4": config}, torch.bfloat16)
    else:
        for path in paths:
            _fuse(model.get_submodule(path), base_rank)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    values = Values(base_rank, device)
    for own in model.parameters():
        if own.dtype == torch.bfloat16:
            values.fill(own.data)
    return model


def _fuse(block: Any, base_rank: int) -> None:
    """What Nunchaku makes of a block."""
    from diffusers.models.attention import FeedForward

    def svdq(inp: int, out: int) -> emulation.SVDQW4A4Linear:
        return emulation.SVDQW4A4Linear(
            inp, out, base_rank, bias=False, precision=Precision.W4A4, device="meta"
        )

    block.attention = FusedAttention(block.attention, svdq(WIDTH, 3 * WIDTH), svdq(WIDTH, WIDTH))
    with torch.device("meta"):
        mlp: Any = FeedForward(WIDTH, activation_fn="swiglu", inner_dim=HIDDEN, bias=False)
    mlp.net[0].proj, mlp.net[2] = svdq(WIDTH, 2 * HIDDEN), svdq(HIDDEN, WIDTH)
    block.feed_forward = mlp


def write_z_image_lora(path: Path, layers: int, rank: int, *, seed: int = 0) -> Path:
    """Write a LoRA of all linears of all blocks, as trainers write it."""
    values, tensors = Values(seed, "cpu"), {}
    for block, linears in blocks(layers):
        for name, (out, inp) in linears.items():
            stem = f"diffusion_model.{block}.{name}"
            for half, shape in (("lora_A", (rank, inp)), ("lora_B", (out, rank))):
                tensor = values.fill(torch.empty(shape, dtype=torch.bfloat16))
                tensors[f"{stem}.{half}.weight"] = tensor / math.sqrt(shape[1])
            tensors[f"{stem}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)
    return path
