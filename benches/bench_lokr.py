"""What the fused MLP loses of LoKr: factors trained with LyCORIS, and their best truncations.

    pip install lycoris-lora toml einops
    python benches/bench_lokr.py [--steps 400] [--width 3072]

Two residual MLP blocks of Qwen-Image's width learn to move a 24-dimensional concept. The energies
come from the singular values of the two factors: those of their product are all products of them.
"""

from __future__ import annotations

import argparse
import math

import torch
from lycoris import LycorisNetwork, create_lycoris
from torch import nn
from torch.nn import functional as F

SETTINGS = (
    ("factor 8, whole (SimpleTuner)", 8, 10000, True),
    ("factor 16, whole (ai-toolkit)", 16, 10000, True),
    ("factor -1, whole (LyCORIS)", -1, 10000, True),
    ("factor 16, dim 32", 16, 32, False),
    ("factor -1, dim 16", -1, 16, False),
)
RANKS = (64, 128, 256, 512, 768, 992)
CONCEPT = 24


class MLP(nn.Module):
    """A residual MLP block without modulation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


class Blocks(nn.Module):
    """Two of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MLP(width), MLP(width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def lost(w1: torch.Tensor, w2: torch.Tensor) -> str:
    """Energy that the best truncations of kron(w1, w2) lose, as text."""
    values = torch.outer(torch.linalg.svdvals(w1.double()), torch.linalg.svdvals(w2.double()))
    energies = values.flatten().square().sort(descending=True).values
    shares = {rank: float(1 - energies[:rank].sum() / energies.sum()) for rank in RANKS}
    return ", ".join(f"{rank}: {share:.1%}" for rank, share in shares.items())


def factors(module: nn.Module) -> list[torch.Tensor]:
    """w1 and w2 of a trained LoKr, products of their halves where they have some."""
    tensors = dict(module.named_parameters())
    return [
        (tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]).detach()
        for name in ("lokr_w1", "lokr_w2")
    ]


def train(
    width: int, steps: int, factor: int, dim: int, whole: bool, device: str
) -> tuple[float, list[nn.Module]]:
    """Train one network; the last loss relative to the first, and its LoKr modules."""
    torch.manual_seed(0)
    net = Blocks(width).to(device).requires_grad_(False)
    inputs, outputs = (torch.randn(CONCEPT, width).to(device) for _ in range(2))
    LycorisNetwork.apply_preset(
        {"enable_conv": False, "target_module": ["MLP"], "module_algo_map": {}}
    )
    lokr = create_lycoris(
        net, 1.0, linear_dim=dim, linear_alpha=dim, algo="lokr", factor=factor, full_matrix=whole
    )
    lokr.apply_to()
    lokr.to(device)
    optimizer = torch.optim.AdamW(lokr.parameters(), lr=1e-4, weight_decay=1e-2)
    losses = []
    for _ in range(steps):
        code = torch.randn(256, CONCEPT, device=device)
        noise = 0.3 * torch.randn(256, width, device=device)
        x = code @ inputs / math.sqrt(CONCEPT) + noise
        with torch.no_grad():
            lokr.set_multiplier(0.0)
            wanted = net(x) + 0.2 * torch.tanh(code) @ outputs / math.sqrt(CONCEPT)
            lokr.set_multiplier(1.0)
        loss = F.mse_loss(net(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[-1] / losses[0], list(lokr.loras)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=3072)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, factor, dim, whole in SETTINGS:
        loss, modules = train(args.width, args.steps, factor, dim, whole, device)
        print(f"{name}: loss {loss:.2f} of the first")
        for module in modules:
            w1, w2 = factors(module)
            random = lost(torch.randn_like(w1), torch.randn_like(w2))
            print(f"  {tuple(w1.shape)} x {tuple(w2.shape)}: {lost(w1, w2)}; random {random}")


if __name__ == "__main__":
    main()
