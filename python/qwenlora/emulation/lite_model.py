"""diffusers' Qwen-Image transformer as its own quantizer builds it, on a CPU."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwenlora.emulation.awq import AWQW4A16Linear
from qwenlora.emulation.dense import random_smooth
from qwenlora.emulation.linear import SVDQW4A4Linear
from qwenlora.emulation.lite_layers import lite_layers
from qwenlora.packing.layout import RowOrder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qwenlora.emulation.precision import Precision

__all__ = ["lite_transformer"]


_SVDQ = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)
_AWQ = ("img_mod.1", "txt_mod.1")


def lite_transformer(
    dense: nn.Module,
    *,
    rank: int,
    precision: Precision,
    dtype: torch.dtype,
    seed: int = 0,
) -> Any:
    """Quantize a dense diffusers `QwenImageTransformer2DModel` as diffusers loads one.

    The classes are diffusers' own, of the model and of the layers. Blocks are stock: query, key and
    value are apart, modulations have planar rows, and every linear is called as a module.

    Args:
        dense: The dense model; it is only read.
        rank: Rank of the base low-rank branches, a multiple of 16.
        precision: See `Precision`.
        dtype: Dtype of activations and plain weights.
        seed: Chooses the smooth factors, which differ from 1.

    Returns:
        A new model on the CPU.

    Raises:
        ImportError: diffusers is not installed, or has no such layers.
    """
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(dense)
    # Past the model's own `to`, which warns of what another dtype may do.
    nn.Module.to(model, "cpu", dtype)
    weights = dict(dense.state_dict())
    blocks: Any = model.transformer_blocks
    svdq, awq = _paths(len(blocks), _SVDQ), _paths(len(blocks), _AWQ)
    common = {"precision": "int4", "group_size": 64}
    config = {
        "svdq_w4a4": {**common, "rank": rank, "targets": svdq},
        "awq_w4a16": {**common, "targets": awq},
    }
    lite_layers(precision).replace_with_nunchaku_linear(model, config, dtype)
    for path in svdq:
        weight, bias = weights[f"{path}.weight"], weights.get(f"{path}.bias")
        layer = SVDQW4A4Linear.from_dense(
            weight,
            bias,
            rank=rank,
            precision=precision,
            dtype=dtype,
            smooth=random_smooth(weight.shape[1], generator),
            generator=generator,
        )
        fill(model.get_submodule(path), layer)
    for path in awq:
        linear = AWQW4A16Linear.from_dense(
            weights[f"{path}.weight"],
            weights.get(f"{path}.bias"),
            precision=precision,
            dtype=dtype,
            row_order=RowOrder.PLANAR,
        )
        fill(model.get_submodule(path), linear)
    return model.eval()


def _paths(blocks: int, names: Iterable[str]) -> list[str]:
    return [f"transformer_blocks.{block}.{name}" for block in range(blocks) for name in names]


def fill(layer: nn.Module, values: nn.Module) -> None:
    """Give a layer the tensors of a stand-in of Nunchaku's, which lie alike."""
    for name, parameter in values.named_parameters():
        if name in layer._parameters:
            layer._parameters[name] = nn.Parameter(parameter.data, requires_grad=False)
