"""What the kinds of adapter mean: weights under them in float64, and outputs of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.files import BLOCK, FUSED
from qwenlora.packing.pack import interleave_modulation
from qwenlora.slots.find import find_targets
from qwenlora.weight.base_weight import BaseWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

__all__ = ["Expected"]


class Expected:
    """A block's layers in float64, without a LoRA and with one.

    Attributes:
        base: The layers' outputs by path, without one.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self._weights = {
            path.removeprefix(f"{BLOCK}."): BaseWeight.of(target)
            for path, target in find_targets(model, {}).items()
        }
        self._inputs = inputs
        self.base = {path: self._output(path, None) for path in inputs}

    def under(self, tensors: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
        """The layers' outputs by path, with a LoRA at this strength."""

        def changed(layer: str, weight: Tensor) -> Tensor:
            parts = FUSED.get(layer, (layer,))
            rows = weight.chunk(len(parts))
            own = [
                w + strength * (_adapted(w, _tensors_of(tensors, part), norms) - w)
                for part, w, norms in zip(parts, rows, self._norms(layer, len(parts)), strict=True)
            ]
            return torch.cat(own)

        return {path: self._output(path, changed) for path in self._inputs}

    def _norms(self, layer: str, parts: int) -> Iterator[Callable[[int], Tensor]]:
        """For each part of a layer its squared norms, of rows (axis 1) or columns (axis 0)."""
        weight = self._weights[layer]
        count = weight.rows_total // parts
        for part in range(parts):
            at = (part * count, count)
            yield lambda axis, at=at: (weight.row_norms if axis else weight.column_norms)(*at)  # type: ignore[misc]

    def _output(self, path: str, change: Callable[[str, Tensor], Tensor] | None) -> Tensor:
        x = self._inputs[path].double()
        if not path.endswith("_mlp"):
            output = self._layer(path, x, change)
            return interleave_modulation(output, dim=-1) if "_mod" in path else output
        hidden = self._layer(f"{path}.net.0.proj", x, change)
        return self._layer(f"{path}.net.2", F.gelu(hidden, approximate="tanh"), change)

    def _layer(
        self, name: str, x: Tensor, change: Callable[[str, Tensor], Tensor] | None
    ) -> Tensor:
        own = self._weights[name]
        weight = own.rows(0, own.rows_total).double()
        if change is not None:
            weight = change(name, weight)
        bias = own.true_bias()
        return F.linear(x, weight, None if bias is None else bias.double())


def _tensors_of(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """A module's tensors by role, as the file holds them."""
    dotted = f"diffusion_model.{BLOCK}.{module}."
    flat = f"lycoris_{BLOCK}.{module}".replace(".", "_") + "."
    found = {}
    for key, tensor in tensors.items():
        for prefix in (dotted, flat):
            if key.startswith(prefix):
                found[key.removeprefix(prefix)] = tensor
    return found


def _adapted(
    weight: Tensor, stored: Mapping[str, Tensor], norms: Callable[[int], Tensor]
) -> Tensor:
    """W' of W (N, K) float64, whose norms are of the weight before it was quantized."""
    own = {role: tensor.to(weight) for role, tensor in stored.items()}
    if "dora_scale" in own:
        axis = 1 if own["dora_scale"].shape[0] == len(weight) else 0
        delta = own["lora_B.weight"] @ own["lora_A.weight"]
        squared = norms(axis) + (2 * weight * delta + delta.square()).sum(dim=axis)
        return (weight + delta) * (own["dora_scale"] / squared.sqrt().unsqueeze(axis))
    if "lora_A.weight" in own:
        return weight + own["lora_B.weight"] @ own["lora_A.weight"]
    if "lokr_w1" in own:
        return weight + torch.kron(own["lokr_w1"], own["lokr_w2"])
    if "a1.weight" in own:
        turned = (weight @ own["a1.weight"]) @ own["a2.weight"]
        return weight + own["b1.weight"] @ own["b2.weight"] + turned
    if "on_input" in own:
        return weight * (1 + own["weight"])
    if "oft_R.weight" in own:
        return _turned_inputs(weight, own["oft_R.weight"])
    return _turned_rows(weight, own["oft_blocks"])


def _turned_inputs(weight: Tensor, triangles: Tensor) -> Tensor:
    """PEFT's: W R^T per block, R of the series of five terms."""
    count, elements = triangles.shape
    size = int((1 + (1 + 8 * elements) ** 0.5) / 2)
    skew = triangles.new_zeros(count, size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = triangles
    skew = skew - skew.mT
    square = skew @ skew
    turn = torch.eye(size).to(skew) + 2 * (skew + square + skew @ square) + square @ square
    split = weight.view(len(weight), count, size)
    return torch.einsum("rnj,nij->rni", split, turn).reshape(weight.shape)


def _turned_rows(weight: Tensor, blocks: Tensor) -> Tensor:
    """LyCORIS': R^T W per block of rows, or stages of a butterfly."""
    skew = blocks - blocks.mT
    eye = torch.eye(blocks.shape[-1]).to(skew)
    turns = (eye + skew) @ torch.linalg.inv(eye - skew)
    if blocks.ndim == 3:
        split = weight.view(blocks.shape[0], blocks.shape[1], -1)
        return torch.einsum("nji,njk->nik", turns, split).reshape(weight.shape)
    for stage, own in enumerate(turns):
        stride = 2**stage * blocks.shape[-1] // 2
        # (c, g, k, K) => (c, k, g, K), and back behind the blocks
        permuted = weight.view(-1, 2, stride, weight.shape[1]).transpose(1, 2)
        mixed = own @ permuted.reshape(own.shape[0], own.shape[1], -1)
        weight = mixed.view(-1, stride, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight
