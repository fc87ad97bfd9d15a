"""LoRA files in the making, with the deltas that they stand for."""

from __future__ import annotations

import copy

import torch
from torch import nn

FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
}
"""The linears whose rows a fused one has, in order, by paths in a block."""


class File:
    """A LoRA file in the making, and the deltas that it stands for, by the dense model's paths."""

    def __init__(self, seed: int = 0) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.deltas: dict[str, torch.Tensor] = {}
        self.biases: dict[str, torch.Tensor] = {}
        self.norms: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, size: float = 0.3) -> torch.Tensor:
        return size * torch.randn(shape, generator=self._generator)

    def pair(self, path: str, out: int, inp: int, rank: int = 4) -> File:
        down, up = self.random(rank, inp), self.random(out, rank)
        self.put(path, lora_A=down, lora_B=up)
        return self._is(path, up @ down)

    def lokr(self, path: str, w1: tuple[int, int], w2: tuple[int, int]) -> File:
        first, second = self.random(*w1), self.random(*w2)
        for role, tensor in (("lokr_w1", first), ("lokr_w2", second)):
            self.tensors[f"transformer.{path}.{role}"] = tensor
        return self._is(path, torch.kron(first, second))

    def half_lokr(self, path: str, w1: tuple[int, int], w2: tuple[int, int], rank: int) -> File:
        """A LoKr whose second factor is a product; alpha equals the rank."""
        first = self.random(*w1)
        left, right = self.random(w2[0], rank), self.random(rank, w2[1])
        roles = {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right}
        for role, tensor in {**roles, "alpha": torch.tensor(float(rank))}.items():
            self.tensors[f"transformer.{path}.{role}"] = tensor
        return self._is(path, torch.kron(first, left @ right))

    def loha(self, path: str, out: int, inp: int, rank: int = 3) -> File:
        shapes = ((out, rank), (rank, inp)) * 2
        factors = [self.random(*shape, size=0.6) for shape in shapes]
        for role, tensor in zip(("w1_a", "w1_b", "w2_a", "w2_b"), factors, strict=True):
            self.tensors[f"transformer.{path}.hada_{role}"] = tensor
        self.tensors[f"transformer.{path}.alpha"] = torch.tensor(float(rank))
        return self._is(path, (factors[0] @ factors[1]) * (factors[2] @ factors[3]))

    def tucker(self, path: str, out: int, inp: int, rank: int = 4) -> File:
        down, mid, up = self.random(rank, inp), self.random(3, rank), self.random(out, 3)
        shaped = {"lora_down": down, "lora_mid": mid, "lora_up": up}
        for role, tensor in shaped.items():
            self.tensors[f"transformer.{path}.{role}.weight"] = tensor[:, :, None, None]
        return self._is(path, up @ mid @ down)

    def full(self, path: str, out: int, inp: int) -> File:
        # Of low rank: a quantized layer carries it whole.
        delta = self.random(out, 6) @ self.random(6, inp)
        self.tensors[f"transformer.{path}.diff"] = delta
        return self._is(path, delta)

    def bias(self, path: str, out: int) -> File:
        delta = self.random(out)
        self.tensors[f"transformer.{path}.diff_b"] = delta
        self.biases |= _apart(path, delta)
        return self

    def norm(self, path: str, channels: int) -> File:
        delta = self.random(channels)
        self.tensors[f"transformer.{path}.diff"] = delta
        self.norms[path] = delta
        return self

    def every_linear(self, dense: nn.Module, rank: int = 4) -> File:
        for path, module in dense.named_modules():
            if isinstance(module, nn.Linear):
                self.pair(path, module.out_features, module.in_features, rank)
        return self

    def merged(self, dense: nn.Module) -> nn.Module:
        """The dense model with the deltas in its weights."""
        merged = copy.deepcopy(dense)
        for path, delta in self.deltas.items():
            merged.get_submodule(path).weight += delta
        for path, delta in self.biases.items():
            merged.get_submodule(path).bias += delta
        for path, delta in self.norms.items():
            merged.get_submodule(path).weight += delta
        return merged

    def put(self, path: str, **tensors: torch.Tensor) -> None:
        for role, tensor in tensors.items():
            self.tensors[f"transformer.{path}.{role}.weight"] = tensor

    def _is(self, path: str, delta: torch.Tensor) -> File:
        self.deltas |= _apart(path, delta)
        return self


def _apart(path: str, delta: torch.Tensor) -> dict[str, torch.Tensor]:
    """The deltas of a fused module's parts; of any other module its own."""
    for name, parts in FUSED.items():
        block = path.removesuffix(f".{name}")
        if block != path:
            rows = delta.chunk(len(parts))
            return {f"{block}.{part}": own for part, own in zip(parts, rows, strict=True)}
    return {path: delta}
