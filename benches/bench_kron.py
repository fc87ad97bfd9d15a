"""Time of a Kronecker side branch beside that of the rank it replaces, and the error of either.

    python benches/bench_kron.py [--tokens 4096] [--device cuda]

One attention linear of Qwen-Image (3072 x 3072, and the fused 3072 x 9216) in bfloat16: the layer's
own product, a low-rank branch of some ranks, and Kronecker branches of the usual factors. Random
factors are the worst case of a truncation: trained ones lose less.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from qwenlora.slots.parts.product import kron_product

WIDTH = 3072
FACTORS = (4, 8, 16, 48)
RANKS = (64, 128, 256, 512)


def median_ms(work, device: str, *, repeats: int = 20) -> tuple[float, float]:
    """Median and spread (max - min) of the time of one call, in milliseconds."""
    seconds = []
    for round_ in range(repeats + 3):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if round_ >= 3:
            seconds.append(1e3 * (time.perf_counter() - started))
    return statistics.median(seconds), max(seconds) - min(seconds)


def share_kept(w1: torch.Tensor, w2: torch.Tensor, rank: int) -> float:
    """Energy that the best pair of a rank keeps of kron(w1, w2)."""
    values = torch.outer(torch.linalg.svdvals(w1.float()), torch.linalg.svdvals(w2.float()))
    energies = values.flatten().square().sort(descending=True).values
    return float(energies[:rank].sum() / energies.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=args.device, dtype=dtype)

    x = random(args.tokens, WIDTH)
    for parts in (1, 3):
        out = WIDTH * parts
        weight, y = random(out, WIDTH), random(args.tokens, out)
        base, spread = median_ms(lambda w=weight: torch.nn.functional.linear(x, w), args.device)
        print(f"{WIDTH} -> {out}, {args.tokens} tokens: bf16 product {base:.3f} ms (±{spread:.3f})")
        for rank in RANKS:
            down, up = random(rank * parts, WIDTH), random(out, rank * parts)
            took, spread = median_ms(
                lambda d=down, u=up, y=y: torch.addmm(y, torch.nn.functional.linear(x, d), u.mT),
                args.device,
            )
            print(f"  rank {rank} x {parts}: {took:.3f} ms (±{spread:.3f}), {took / base:.2f} x")
        for factor in FACTORS:
            w1, w2 = random(factor, factor), random(WIDTH // factor, WIDTH // factor)

            def branch(w1=w1, w2=w2, y=y, parts=parts):
                for part in range(parts):
                    y.narrow(-1, part * WIDTH, WIDTH).add_(kron_product(x, w1, w2))

            took, spread = median_ms(branch, args.device)
            kept = ", ".join(f"{rank}: {1 - share_kept(w1, w2, rank):.1%}" for rank in RANKS)
            print(
                f"  kron {factor} x {WIDTH // factor}, {parts} of them: {took:.3f} ms"
                f" (±{spread:.3f}), {took / base:.2f} x; random factors lose at rank {kept}"
            )


if __name__ == "__main__":
    main()
