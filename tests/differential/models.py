"""Random small models, and what is to be known of their layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.emulation import EmulatedConfig, Precision, random_transformer

if TYPE_CHECKING:
    import random

    from qwenlora.emulation.transformer import EmulatedQwenImageTransformer

FUSED = {"attn.to_qkv": "to_{}", "attn.add_qkv_proj": "add_{}_proj"}
"""Fused layers, and how their projections are called."""
HEADS = {128: (2, 64), 256: (4, 64)}
AXES = (16, 24, 24)
MOST_RANK = 1024


@dataclass(frozen=True)
class Layer:
    """A layer that a file may train, or a third of a fused one.

    Attributes:
        name: As files call it.
        slot: The layer's path.
        first: Its first row in that layer.
        rows: Its rows.
        columns: Its columns.
        is_norm: Whether it is a norm's weight.
        has_bias: Whether it has a bias.
    """

    name: str
    slot: str
    first: int
    rows: int
    columns: int
    is_norm: bool = False
    has_bias: bool = False


def random_model(draw: random.Random) -> EmulatedQwenImageTransformer:
    """A model of random size, dtype, precision and base rank, perhaps under block offload."""
    width = draw.choice([128, 256])
    heads, head_dim = HEADS[width]
    config = EmulatedConfig(
        num_layers=draw.choice([1, 2, 3]),
        heads=heads,
        head_dim=head_dim,
        axes_dims_rope=AXES,
        joint_attention_dim=96,
        rank=draw.choice([16, 32, 128, 912]),
        precision=draw.choice(list(Precision)),
        dtype=draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    )
    model = random_transformer(config, seed=draw.randrange(1000))
    if draw.random() < 0.3:
        model.set_offload(True, num_blocks_on_gpu=draw.randint(1, config.num_layers), device="cpu")
    return model


def layers_of(model: torch.nn.Module) -> list[Layer]:
    """All that a file may train, fused layers whole and in thirds."""
    found = []
    for path, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            found += _linear(path, module)
        elif _is_norm(path, module):
            size = module.weight.shape[0]
            found.append(Layer(path, path, 0, 1, size, is_norm=True))
    return found


def _linear(path: str, module: torch.nn.Module) -> list[Layer]:
    rows, columns = module.out_features, module.in_features
    bias = module.bias is not None
    whole = Layer(path, path, 0, rows, columns, has_bias=bias)
    for suffix, spelling in FUSED.items():
        if path.endswith(suffix):
            stem = path.removesuffix(suffix.rsplit(".", 1)[1])
            third = rows // 3
            parts = [
                Layer(stem + spelling.format(part), path, at * third, third, columns, False, bias)
                for at, part in enumerate("qkv")
            ]
            return [whole, *parts]
    return [whole]


def _is_norm(path: str, module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 1 and "norm" in path


def slots_of(model: torch.nn.Module) -> list[str]:
    """Paths of all layers that may hold a delta of their weight."""
    return list(dict.fromkeys(layer.slot for layer in layers_of(model) if not layer.is_norm))


def base_rank(model: EmulatedQwenImageTransformer, path: str) -> int:
    """Rank of the layer's own low-rank branch."""
    return model.config.rank if hasattr(model.get_submodule(path), "proj_down") else 0


def is_quantized(model: torch.nn.Module, path: str) -> bool:
    """Whether a layer stores 4-bit weights."""
    return getattr(model.get_submodule(path), "qweight", None) is not None
