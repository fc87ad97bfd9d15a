"""What max_rank="auto" does to sums of trained LoRAs: their spectra, and the ranks it takes.

    pip install peft
    python benches/bench_auto_rank.py [--steps 400] [--width 1024] [--loras 4] [--rank 64]

LoRAs are trained with PEFT on two residual MLP blocks, each to move a concept of its own (16 of the
dimensions of a low-dimensional code) to other directions; random factors of the same shapes are the
worst case. For each linear: the energy that the best truncations of the sum lose, by the share of
its ranks that they keep, and the rank that "auto" takes at several prices.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from qwenlora.delta.compress import LowRankSum, decomposed
from qwenlora.delta.limit import worthwhile_rank

SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
PRICES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
CONCEPT = 16


class MLP(nn.Module):
    """A residual MLP block without modulation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


class Task:
    """Moving one concept to other directions, with noise around it."""

    def __init__(self, width: int, seed: int) -> None:
        self._width = width
        self._generator = torch.Generator().manual_seed(1 + seed)
        self._inputs, self._outputs = self._randn(CONCEPT, width), self._randn(CONCEPT, width)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def loss(self, net: Any, count: int = 128) -> Tensor:
        """Of fresh samples."""
        code = self._randn(count, CONCEPT)
        x = code @ self._inputs / math.sqrt(CONCEPT) + 0.3 * self._randn(count, self._width)
        with torch.no_grad(), net.disable_adapter():
            wanted = net(x) + 0.2 * torch.tanh(code) @ self._outputs / math.sqrt(CONCEPT)
        return F.mse_loss(net(x), wanted)


def adapted(net: nn.Module) -> dict[str, Any]:
    """The linears that carry a LoRA."""
    return {name: module for name, module in net.named_modules() if hasattr(module, "lora_A")}


def pairs_of(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (
            module.lora_A["default"].weight.detach().clone(),
            module.lora_B["default"].weight.detach().clone(),
        )
        for name, module in adapted(net).items()
    }


def train(width: int, rank: int, steps: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """One LoRA's factors by linear; its losses relative to the untrained one's, by share kept."""
    torch.manual_seed(0)
    base = nn.Sequential(MLP(width), MLP(width)).requires_grad_(False)
    task = Task(width, seed)
    torch.manual_seed(1 + seed)
    net = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=["up", "down"]))
    with torch.no_grad():
        untrained = float(task.loss(net, 2048))
    own = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(net).backward()
        optimizer.step()
        schedule.step()
    pairs = pairs_of(net)
    losses = {}
    for share in (1.0, *reversed(SHARES)):
        for name, module in adapted(net).items():
            cut = decomposed(LowRankSum.of([pairs[name]])).cut(round(share * rank))
            module.lora_A["default"].weight.data = cut.down
            module.lora_B["default"].weight.data = cut.up
        with torch.no_grad():
            losses[f"{share:g}"] = float(task.loss(net, 2048)) / untrained
    return pairs, losses


def described(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Spectrum and ranks of one sum."""
    truncation = decomposed(LowRankSum.of(pairs))
    exact = sum(down.shape[0] for down, _ in pairs)
    return {
        "ranks": exact,
        "lost": {f"{share:.3f}": truncation.lost(round(share * exact)) for share in SHARES},
        "auto": {
            f"{price:g}": (rank, truncation.lost(rank) if rank else 0.0)
            for price in PRICES
            for rank in [worthwhile_rank(truncation, exact, exact, price=price)]
        },
    }


def shown(name: str, row: dict[str, Any]) -> str:
    lost = ", ".join(f"{float(share):.0%}: {value:.2%}" for share, value in row["lost"].items())
    auto = ", ".join(
        f"{float(price):.2%}: {'exact' if rank is None else f'{rank} ({lost:.3%})'}"
        for price, (rank, lost) in row["auto"].items()
    )
    return f"{name}: {row['ranks']} ranks\n  lost keeping {lost}\n  auto at price {auto}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--loras", type=int, default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trained: list[dict[str, Any]] = []
    rows: dict[str, Any] = {}
    for seed in range(args.loras):
        pairs, losses = train(args.width, args.rank, args.steps, seed)
        told = ", ".join(f"{float(share):.0%}: {loss:.4f}" for share, loss in losses.items())
        print(f"LoRA {seed}, loss of the untrained, cut to {told} of its ranks", flush=True)
        trained.append(pairs)
        rows[f"loss {seed}"] = losses
    for name in trained[0]:
        sums = {
            "one trained": [trained[0][name]],
            f"{args.loras} trained": [pairs[name] for pairs in trained],
            f"{args.loras} random": [
                (torch.randn_like(down), torch.randn_like(up))
                for down, up in (pairs[name] for pairs in trained)
            ],
        }
        for kind, pairs in sums.items():
            rows[f"{name}, {kind}"] = row = described(pairs)
            print(shown(f"{name}, {kind}", row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
