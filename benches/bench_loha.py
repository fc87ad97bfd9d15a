"""A LoHa whose exact pair is wider than the matrix: its best form of a rank, beside QR and SVD.

    python benches/bench_loha.py [--rank 64] [--kept 992] [--device cuda] [--shape 12288x3072]

The exact pair of a LoHa has r1 r2 ranks, 4096 of rank 64. The baseline is that pair's optimum by QR
of both halves and SVD of the core; ours is what `compose_loras` does. Factors are random with
falling columns. Energy lost is measured against the dense float64 delta for both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.loha import LOHA
from qwenlora.delta.factors import Factors

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    """Measure both and print a line for each, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--kept", type=int, default=992)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="3072x3072")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    rows, columns = (int(side) for side in args.shape.split("x"))
    device = torch.device(args.device)
    tensors = loha(rows, columns, args.rank)
    whole = dense(tensors)
    energy = float(whole.square().sum())
    times = {}
    for name, run in (
        ("QR and SVD of the exact pair", lambda: baseline(tensors, args.kept, device)),
        ("ours", lambda: ours(tensors, args.kept, device)),
    ):
        seconds, found = measured(run, device, args.repeats)
        lost = float((whole - found.up.double() @ found.down.double()).square().sum()) / energy
        times[name] = seconds
        print(f"{name:30} {seconds:8.2f} s   energy lost {lost:.6f}")
    first, second = times.values()
    print(f"{args.shape}, rank {args.rank} kept {args.kept}, {device}: {first / second:.1f} times")


def loha(rows: int, columns: int, rank: int) -> dict[str, torch.Tensor]:
    """Its four tensors, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    fall = torch.linspace(1, 0.05, rank)
    tensors = {}
    for index in "12":
        left = torch.randn(rows, rank, generator=generator) * fall
        right = torch.randn(rank, columns, generator=generator)
        tensors[f"hada_w{index}_a"] = left.bfloat16()
        tensors[f"hada_w{index}_b"] = right.bfloat16()
    return tensors


def dense(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The delta in float64."""
    wide = {role: tensor.double() for role, tensor in tensors.items()}
    return (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])


def ours(tensors: dict[str, torch.Tensor], kept: int, device: torch.device) -> Factors:
    """What is done to a piece of a stack plan."""
    return LOHA.factors(tensors, kept, device)


def baseline(tensors: dict[str, torch.Tensor], kept: int, device: torch.device) -> Factors:
    """The pair of r1 r2 ranks, cut by the SVD of its core."""
    pair = LOHA.factors(tensors, None, device)
    q_down, r_down = torch.linalg.qr(pair.down.to(device).mT)
    q_up, r_up = torch.linalg.qr(pair.up.to(device))
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    up = (q_up @ left[:, :kept]) * values[:kept]
    return Factors(down=(right[:kept] @ q_down.mT).cpu(), up=up.cpu())


def measured(
    run: Callable[[], Factors], device: torch.device, repeats: int
) -> tuple[float, Factors]:
    """Median seconds and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


if __name__ == "__main__":
    main()
