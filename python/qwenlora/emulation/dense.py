"""Conversion of a dense Qwen-Image state dict into quantized leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qwenlora.emulation.awq import AWQW4A16Linear
from qwenlora.emulation.linear import SVDQW4A4Linear

if TYPE_CHECKING:
    from collections.abc import Mapping

FUSED_MEMBERS: Mapping[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Last path component of a fused layer, and the dense layers whose rows it stacks, in order."""


class _Weights:
    """A state dict that knows which of its entries were asked for."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state
        self._left = set(state)

    def take(self, name: str) -> torch.Tensor:
        if name not in self._state:
            raise ValueError(f"weight is missing: `{name}`")
        self._left.discard(name)
        return self._state[name].detach()

    def take_rows(self, layers: list[str], parameter: str) -> torch.Tensor:
        return torch.cat([self.take(f"{layer}.{parameter}") for layer in layers])

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"weights do not belong to the model: {sorted(self._left)}")


@torch.no_grad()
def load_dense_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], generator: torch.Generator
) -> None:
    """Set every parameter of an emulated transformer from dense weights.

    Smooth factors are drawn from 1/2, 1 and 2: a stand-in that left them at 1 would hide code that
    wrongly corrects a LoRA for them, and powers of two cost no precision.

    Args:
        model: The emulated transformer; its parameters are overwritten.
        state: Weights under diffusers' names.
        generator: CPU generator of the smooth factors and of the low-rank splits.

    Raises:
        ValueError: A weight is missing, left over, or of the wrong shape.
    """
    weights = _Weights(state)
    for path, module in model.named_modules():
        if isinstance(module, SVDQW4A4Linear):
            layers = dense_layers(path)
            module.load_dense(
                weights.take_rows(layers, "weight"),
                weights.take_rows(layers, "bias"),
                smooth=random_smooth(module.in_features, generator),
                generator=generator,
            )
        elif isinstance(module, AWQW4A16Linear):
            module.load_dense(weights.take(f"{path}.weight"), weights.take(f"{path}.bias"))
        else:
            _copy_plain(path, module, weights)
    weights.finish()


def random_smooth(channels: int, generator: torch.Generator) -> torch.Tensor:
    """Draw (channels,) float32 smooth factors from 1/2, 1 and 2."""
    return torch.exp2(torch.randint(-1, 2, (channels,), generator=generator).float())


def dense_layers(path: str) -> list[str]:
    """The dense layers whose rows a layer stacks, in order; of most it is one, of the same name."""
    parent, _, name = path.rpartition(".")
    if name not in FUSED_MEMBERS:
        return [path]
    return [f"{parent}.{member}" for member in FUSED_MEMBERS[name]]


def _copy_plain(path: str, module: nn.Module, weights: _Weights) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        dense = weights.take(f"{path}.{name}")
        if dense.shape != parameter.shape:
            raise ValueError(
                f"`{path}.{name}` must have shape {tuple(parameter.shape)}, "
                f"got: {tuple(dense.shape)}"
            )
        parameter.copy_(dense)
