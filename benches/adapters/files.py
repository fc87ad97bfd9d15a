"""State dicts of every kind of adapter on all layers of a block, of sizes as training gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwenlora.slots.find import find_targets
from qwenlora.weight.base_weight import BaseWeight

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["BLOCK", "FILES", "FUSED", "Modules", "modules_of", "state_dict"]

BLOCK = "transformer_blocks.0"
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
RELATIVE = 0.1
"""Norm of a delta over its weight's."""
TURN = 0.02
"""Standard deviation of what a skew block holds."""


class Module:
    """One module of a block, and the norms of its weight."""

    def __init__(self, name: str, weight: BaseWeight, begin: int, rows: int) -> None:
        self.name = name
        self.rows, self.columns = rows, weight.columns
        self._weight, self._begin = weight, begin
        self._generator = torch.Generator().manual_seed(len(name) + rows)

    def random(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self._generator)

    def norms(self, side: str) -> Tensor:
        """Of rows ("out") or columns ("in")."""
        of_side = self._weight.row_norms if side == "out" else self._weight.column_norms
        return of_side(self._begin, self.rows).sqrt().float().cpu()

    @property
    def size(self) -> float:
        """Frobenius norm of the weight."""
        return float(self.norms("out").norm())

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """`down` and `up` of a delta of relative size `RELATIVE`."""
        down = self.random(rank, self.columns) / math.sqrt(self.columns)
        up = self.random(self.rows, rank)
        return down, up * (RELATIVE * self.size / float((up @ down).norm()))


Modules = list[Module]


def modules_of(model: nn.Module) -> Modules:
    """All modules of the quantized layers of a block."""
    found = []
    for path, target in find_targets(model, {}).items():
        name = path.removeprefix(f"{BLOCK}.")
        weight = BaseWeight.of(target)
        parts = FUSED.get(name, (name,))
        rows = weight.rows_total // len(parts)
        for index, part in enumerate(parts):
            found.append(Module(part, weight, index * rows, rows))
    return found


def lora(module: Module, rank: int) -> dict[str, Tensor]:
    down, up = module.pair(rank)
    return {"lora_A.weight": down, "lora_B.weight": up}


def lokr(module: Module, factor: int) -> dict[str, Tensor]:
    (ol, ok), (im, il) = (_cut(size, factor) for size in (module.rows, module.columns))
    w1, w2 = module.random(ol, im), module.random(ok, il)
    scale = RELATIVE * module.size / float(w1.norm() * w2.norm())
    return {"lokr_w1": w1 * scale, "lokr_w2": w2}


def dora(module: Module, rank: int, side: str) -> dict[str, Tensor]:
    norms = module.norms(side)
    magnitude = norms * (1 + 0.02 * module.random(len(norms)))
    shaped = magnitude[:, None] if side == "out" else magnitude[None]
    return {**lora(module, rank), "dora_scale": shaped}


def glora(module: Module, rank: int) -> dict[str, Tensor]:
    down, up = module.pair(rank)
    a1 = module.random(module.columns, rank) / module.columns
    a2 = module.random(rank, module.columns)
    named = {"a1": a1, "a2": a2, "b1": up, "b2": down}
    return {f"{name}.weight": tensor for name, tensor in named.items()}


def ia3(module: Module) -> dict[str, Tensor]:
    return {"weight": 0.02 * module.random(module.rows, 1), "on_input": torch.tensor(False)}


def oft(module: Module, size: int) -> dict[str, Tensor]:
    return {"oft_R.weight": TURN * module.random(module.columns // size, size * (size - 1) // 2)}


def diag_oft(module: Module, size: int) -> dict[str, Tensor]:
    return {"oft_blocks": TURN * module.random(module.rows // size, size, size)}


def boft(module: Module, size: int, stages: int) -> dict[str, Tensor]:
    return {"oft_blocks": TURN * module.random(stages, module.rows // size, size, size)}


def _cut(size: int, factor: int) -> tuple[int, int]:
    """As LyCORIS cuts a side: by `factor`, or as near to its root as it divides."""
    if factor > 0:
        return factor, size // factor
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    return small, size // small


FILES: dict[str, Callable[[Module], dict[str, Tensor]]] = {
    "LoRA, rank 16": lambda module: lora(module, 16),
    "LoRA, rank 256": lambda module: lora(module, 256),
    "LoKr, factor 16": lambda module: lokr(module, 16),
    "LoKr, factor 8": lambda module: lokr(module, 8),
    "LoKr, factor -1": lambda module: lokr(module, -1),
    "DoRA of rows, rank 16": lambda module: dora(module, 16, "out"),
    "DoRA of columns, rank 16": lambda module: dora(module, 16, "in"),
    "GLoRA, rank 16": lambda module: glora(module, 16),
    "IA3 of rows": ia3,
    "OFT of PEFT, blocks of 32": lambda module: oft(module, 32),
    "OFT of LyCORIS, blocks of 32": lambda module: diag_oft(module, 32),
    "BOFT of LyCORIS, 3 stages of 32": lambda module: boft(module, 32, 3),
}
"""What makes a module's tensors, by the file's name."""


def state_dict(modules: Modules, name: str) -> dict[str, Tensor]:
    """A LoRA of all modules, in bfloat16 but for magnitudes."""
    tensors = {}
    for module in modules:
        for role, tensor in FILES[name](module).items():
            key = f"lycoris_{_flat(module)}" if role in ("weight", "on_input") else module.name
            prefix = f"diffusion_model.{BLOCK}." if key == module.name else ""
            wide = role in ("dora_scale", "on_input")
            tensors[f"{prefix}{key}.{role}"] = tensor if wide else tensor.to(torch.bfloat16)
    return tensors


def _flat(module: Module) -> str:
    return f"{BLOCK}.{module.name}".replace(".", "_")
