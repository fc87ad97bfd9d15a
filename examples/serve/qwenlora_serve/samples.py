"""LoRA files for the emulated model, to try the application with.

python -m qwenlora_serve.samples FOLDER [--count 4] [--rank 16]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from .pipelines.emulated import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["write_samples"]

_HIDDEN = 4 * CONFIG.channels
_SIZES = {
    **{
        f"attn.{name}": (CONFIG.channels, CONFIG.channels)
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    },
    "img_mlp.net.0.proj": (CONFIG.channels, _HIDDEN),
    "img_mlp.net.2": (_HIDDEN, CONFIG.channels),
}
"""Inputs and outputs of the linears that are trained."""
_SIZE = 0.5
"""Of a trained delta, beside the layer's own weights: large, so that pictures differ."""


def write_samples(folder: Path, *, count: int, rank: int) -> list[str]:
    """Write random LoRAs in diffusers' spelling: `sample-00.safetensors` and so on.

    Returns:
        Their names, without the ending.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"sample-{number:02}" for number in range(count)]
    for seed, name in enumerate(names):
        save_file(_tensors(seed, rank), folder / f"{name}.safetensors")
    return names


def _tensors(seed: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for block in range(CONFIG.num_layers):
        for path, (inputs, outputs) in _SIZES.items():
            key = f"transformer.transformer_blocks.{block}.{path}"
            down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            up = torch.randn(outputs, rank, generator=generator) / rank**0.5
            found[f"{key}.lora_A.weight"] = down.bfloat16()
            found[f"{key}.lora_B.weight"] = (_SIZE * up).bfloat16()
    return found


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write LoRA files for the emulated model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    for name in write_samples(args.folder, count=args.count, rank=args.rank):
        print(name)


if __name__ == "__main__":
    _main()
