"""The meaning of a LoRA file: its dense float64 deltas, straight from its tensors.

Nothing of the engine is used here: no plan, no pieces, no packing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Deltas", "flat_name", "read_deltas", "read_tensors", "weighted_sum"]

Deltas: TypeAlias = Mapping[str, torch.Tensor]
"""Updates (out, in) float64 by the name of the dense diffusers layer, rows in diffusers' order."""


def flat_name(name: str) -> str:
    """The name of a layer in a kohya-style file."""
    return "lora_unet_" + name.replace(".", "_")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a file, as copies: no handle on the file is left open."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}


def read_deltas(path: Path, names: Iterable[str]) -> Deltas:
    """Compute scale * up @ down of a file's layers.

    The scale is alpha / rank where the layer has an alpha, and 1 where it has none.

    Args:
        path: The file.
        names: The dense layers that it changes, in dots. Its keys are flat or in dots, with
            `lora_down` and `lora_up`; or below `transformer.`, with `lora_A` and `lora_B`.

    Raises:
        KeyError: A layer is not in the file.
    """
    tensors = read_tensors(path)
    deltas = {}
    for name in names:
        if f"transformer.{name}.lora_A.weight" in tensors:
            stem, halves = f"transformer.{name}", ("lora_A", "lora_B")
        else:
            stem = name if f"{name}.lora_down.weight" in tensors else flat_name(name)
            halves = ("lora_down", "lora_up")
        # (r, in) and (out, r)
        down, up = (tensors[f"{stem}.{half}.weight"].double() for half in halves)
        alpha = tensors.get(f"{stem}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        deltas[name] = scale * (up @ down)
    return deltas


def weighted_sum(stack: Iterable[tuple[Deltas, float]]) -> Deltas:
    """Add up the deltas of a stack, each times its strength."""
    total: dict[str, torch.Tensor] = {}
    for deltas, strength in stack:
        for name, delta in deltas.items():
            term = strength * delta
            total[name] = total[name] + term if name in total else term
    return total
