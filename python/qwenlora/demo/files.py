"""The demo's LoRA files, written as the tools that people use write them.

Every LoRA is drawn about as large as the layers that it changes. Real ones are smaller; but a layer
gives bf16 values, and the rounding of a large output would hide a small delta.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors.torch import save_file

from qwenlora.demo import expected
from qwenlora.demo.extra import require
from qwenlora.packing.layout import MODULATION_PLANES

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "LoraFile",
    "Sizes",
    "WrongFile",
    "write_files",
    "write_plain_files",
    "write_wrong_files",
]

_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
_MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
_MODULATION = ("img_mod.1", "txt_mod.1")
_TOP_LEVEL = ("img_in", "time_text_embed.timestep_embedder.linear_1", "proj_out")

_PEFT_RANK, _PEFT_ALPHA = 16, 8
_LIGHTNING_RANK, _LIGHTNING_ALPHA = 64, 8
_KOHYA_RANK, _KOHYA_ALPHA = 32, 16

Sizes: TypeAlias = Mapping[str, tuple[int, int]]
"""Output and input channels by the name of the dense diffusers layer."""


@dataclass(frozen=True)
class LoraFile:
    """A file and what it means.

    Attributes:
        path: Where it is.
        wrote: What wrote it, or in whose manner it is written.
        facts: What is in it.
        example: One of its keys.
        deltas: Per dense layer its (out, in) float64 update at strength 1, scale included.
    """

    path: Path
    wrote: str
    facts: str
    example: str
    deltas: expected.Deltas


@dataclass(frozen=True)
class WrongFile:
    """A copy of a file, changed so that a right reader ends where a wrong one would with the file.

    Attributes:
        path: Where it is.
        mistake: What the wrong reader does.
        original: The file that it was made of.
    """

    path: Path
    mistake: str
    original: LoraFile


def write_files(dense: Any, sizes: Sizes, folder: Path) -> tuple[LoraFile, LoraFile, LoraFile]:
    """Write the three files of the full demo.

    Args:
        dense: The dense diffusers model; it is only read.
        sizes: Output and input channels of its layers.
        folder: Where to write them.

    Returns:
        PEFT's, the Lightning-like and the kohya-style file.
    """
    return (
        _write_peft(dense, folder / "peft.safetensors"),
        _write_lightning(sizes, folder / "lightning.safetensors"),
        _write_kohya(sizes, folder / "kohya.safetensors"),
    )


def write_plain_files(sizes: Sizes, folder: Path) -> tuple[LoraFile, LoraFile, LoraFile]:
    """Write the three files of the light demo, with safetensors alone.

    Args:
        sizes: Output and input channels of the dense layers.
        folder: Where to write them.

    Returns:
        The diffusers-like, the Lightning-like and the kohya-style file.
    """
    return (
        _write_diffusers(sizes, folder / "diffusers.safetensors"),
        _write_lightning(sizes, folder / "lightning.safetensors"),
        _write_kohya(sizes, folder / "kohya.safetensors"),
    )


def write_wrong_files(
    lightning: LoraFile, kohya: LoraFile, folder: Path
) -> tuple[WrongFile, WrongFile]:
    """Write what shows two common mistakes: the rows' order, and a missing alpha."""
    tensors = {
        key: _rows_unmoved(tensor) if key.endswith("_mod_1.lora_up.weight") else tensor
        for key, tensor in expected.read_tensors(kohya.path).items()
    }
    rows = folder / "wrong-row-order.safetensors"
    save_file(tensors, rows)
    tensors = {
        key: tensor
        for key, tensor in expected.read_tensors(lightning.path).items()
        if not key.endswith(".alpha")
    }
    alpha = folder / "missing-alpha.safetensors"
    save_file(tensors, alpha)
    return (
        WrongFile(rows, "modulation rows left in the file's order", kohya),
        WrongFile(alpha, "alpha of the Lightning file ignored", lightning),
    )


def _write_peft(dense: Any, path: Path) -> LoraFile:
    """Add a PEFT adapter to a copy of the model and save it with diffusers."""
    model = copy.deepcopy(dense)
    config = require("peft", "LoraConfig")(
        r=_PEFT_RANK,
        lora_alpha=_PEFT_ALPHA,
        rank_pattern={"to_v": 2 * _PEFT_RANK},
        alpha_pattern={"to_out.0": 4 * _PEFT_ALPHA},
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    )
    model.add_adapter(config)
    layer_class = require("peft.tuners.lora", "LoraLayer")
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, layer_class)
    }
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            drawn = _draw(up.shape[0], down.shape[1], down.shape[0], generator)
            down.copy_(drawn[0])
            up.copy_(drawn[1] / layer.scaling["default"])
    require("diffusers.loaders", "QwenImageLoraLoaderMixin").save_lora_weights(
        path.parent,
        transformer_lora_layers=require("peft", "get_peft_model_state_dict")(model),
        weight_name=path.name,
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    model.double()
    with torch.no_grad():
        deltas = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    return LoraFile(
        path=path,
        wrote="diffusers save_lora_weights, PEFT adapter",
        facts=f"{len(deltas)} layers, rank 16 and 32, float32, alpha 8 and 32 in the metadata",
        example=_example(path, "to_v"),
        deltas=deltas,
    )


def _write_diffusers(sizes: Sizes, path: Path) -> LoraFile:
    """Write PEFT's halves below `transformer.`, without alpha, as diffusers does."""
    names = _block_names(sizes, _ATTENTION)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in names:
        down, up = _draw(*sizes[name], _PEFT_RANK, generator)
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    save_file(tensors, path)
    return LoraFile(
        path=path,
        wrote="in the manner of diffusers",
        facts=f"{len(names)} layers, rank {_PEFT_RANK}, float32, no alpha",
        example=_example(path, "to_v"),
        deltas=expected.read_deltas(path, names),
    )


def _write_lightning(sizes: Sizes, path: Path) -> LoraFile:
    """Write bare diffusers names and an integer alpha, as Qwen-Image-Lightning does."""
    names = _block_names(sizes, _ATTENTION + _MLP)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name in names:
        down, up = _draw(*sizes[name], _LIGHTNING_RANK, generator)
        tensors[f"{name}.alpha"] = torch.tensor(_LIGHTNING_ALPHA)  # int64, 0-d
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up * (_LIGHTNING_RANK / _LIGHTNING_ALPHA)
    save_file(tensors, path)
    return LoraFile(
        path=path,
        wrote="in the manner of Qwen-Image-Lightning",
        facts=f"{len(names)} layers, rank 64, float32, alpha 8 as an integer",
        example=_example(path, "to_v"),
        deltas=expected.read_deltas(path, names),
    )


def _write_kohya(sizes: Sizes, path: Path) -> LoraFile:
    """Write flat names with alpha in the save dtype, as kohya's musubi-tuner does."""
    names = [*_block_names(sizes, _ATTENTION + _MLP + _MODULATION), *_TOP_LEVEL]
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in names:
        down, up = _draw(*sizes[name], _KOHYA_RANK, generator)
        flat = expected.flat_name(name)
        tensors[f"{flat}.alpha"] = torch.tensor(_KOHYA_ALPHA, dtype=torch.bfloat16)
        tensors[f"{flat}.lora_down.weight"] = down.to(torch.bfloat16)
        up = up * (_KOHYA_RANK / _KOHYA_ALPHA)
        tensors[f"{flat}.lora_up.weight"] = up.to(torch.bfloat16)
    metadata = {
        "ss_network_module": "networks.lora_qwen_image",
        "ss_network_dim": str(_KOHYA_RANK),
        "ss_network_alpha": str(float(_KOHYA_ALPHA)),
        "ss_base_model_version": "qwen_image",
    }
    save_file(tensors, path, metadata)
    return LoraFile(
        path=path,
        wrote="in the manner of kohya's musubi-tuner",
        facts=f"{len(names)} layers, modulations too, rank 32, bfloat16, alpha 16",
        example=_example(path, "img_mod"),
        deltas=expected.read_deltas(path, names),
    )


def _block_names(sizes: Sizes, members: Iterable[str]) -> list[str]:
    blocks = sorted({name.split(".")[1] for name in sizes if name.startswith("transformer_blocks")})
    return [f"transformer_blocks.{block}.{member}" for block in blocks for member in members]


def _draw(
    outputs: int, inputs: int, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw down (rank, in) and up (out, rank), so that inputs of size 1 give outputs of size 1."""
    down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    up = torch.randn(outputs, rank, generator=generator) / rank**0.5
    return down, up


def _rows_unmoved(up: torch.Tensor) -> torch.Tensor:
    """Order the rows so that a reader's reordering brings them back to the order of `up`.

    A right reader moves row j*C + c to c*6 + j; this is the inverse.
    """
    # (C, 6, r) => (6, C, r)
    moved = up.view(-1, MODULATION_PLANES, up.shape[1]).transpose(0, 1)
    return moved.reshape(up.shape)


def _example(path: Path, word: str) -> str:
    """The first key of the file that has this word and belongs to a down half."""
    keys = sorted(expected.read_tensors(path))
    return next(key for key in keys if word in key and ("lora_A" in key or "lora_down" in key))
