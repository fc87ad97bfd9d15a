"""Compression at real size, beside QR and SVD of each slot in the same run.

    python benches/bench_compress.py [--blocks N] [--loras 8] [--rank 64] [--max-rank 256]
                                     [--device cuda] [--baseline 1] [--json FILE]

Slots have the sizes of Qwen-Image; each of the LoRAs trains q, k and v apart, so that a fused slot
sums three times their ranks. Random factors are the worst case: no rank is without weight. Timed
is what composing does with sums that are over their limit: joining, decomposing, packing. The
baseline decomposes the first `--baseline` slots exactly; its time per slot is scaled. With
`--threads 1` on the CPU, CPU time is counted, which other work on the machine does not lengthen.
On a GPU a first, untimed pass warms up.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwenlora.delta.compress import LowRankSum, decomposed
from qwenlora.delta.limit import Fitted, Limiter
from qwenlora.delta.scale import ScaledPair
from qwenlora.packing.layout import RANK_MULTIPLE, LowRankSide
from qwenlora.packing.pack import pack_lowrank

if TYPE_CHECKING:
    from qwenlora.spec import MaxRank

WIDTH = 3072
BLOCKS = 60
BASE_RANK, KERNELS_LIMIT = 128, 1024


@dataclass(frozen=True)
class SlotPath:
    """Slots of one shape in each block."""

    name: str
    inputs: int
    outputs: int
    parts: int
    per_block: int


PATHS = (
    SlotPath("attn.to_out.0, to_add_out", WIDTH, WIDTH, 1, 2),
    SlotPath("mlp.net.0.proj", WIDTH, 4 * WIDTH, 1, 2),
    SlotPath("mlp.net.2", 4 * WIDTH, WIDTH, 1, 2),
    SlotPath("attn.to_qkv, add_qkv_proj", WIDTH, 3 * WIDTH, 3, 2),
)


@dataclass(frozen=True)
class Slot:
    """What the limiter asks of a target."""

    path: str
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    rank_multiple: int = RANK_MULTIPLE


def pairs_of(
    path: SlotPath, args: argparse.Namespace, seed: int
) -> tuple[list[ScaledPair], list[Tensor]]:
    """One slot's LoRAs, and where their ranks have values."""
    device = torch.device(args.device)
    generator = torch.Generator(device).manual_seed(seed)
    rows, rank = path.outputs // path.parts, args.rank
    scales = torch.arange(1, rank + 1, device=device) ** -args.decay
    pairs, supports = [], []
    for _ in range(args.loras):
        ranks = path.parts * rank
        up = torch.zeros(path.outputs, ranks, device=device)
        support = torch.zeros((path.parts, ranks), dtype=torch.bool)
        for part in range(path.parts):
            own = slice(part * rank, (part + 1) * rank)
            values = torch.randn(rows, rank, device=device, generator=generator)
            up[part * rows : (part + 1) * rows, own] = values * scales
            support[part, own] = True
        down = torch.randn(ranks, path.inputs, device=device, generator=generator)
        down /= math.sqrt(path.inputs)
        pairs.append(ScaledPair(down.bfloat16(), up.bfloat16()))
        supports.append(support)
    return pairs, supports


class Clock:
    """Adds up the seconds spent within it, the device's work included."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def _now(self) -> float:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        self._started, self._cpu_started = self._now(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += self._now() - self._started
        self.cpu_seconds += time.process_time() - self._cpu_started


def limited(
    path: SlotPath, slots: int, args: argparse.Namespace, limit: MaxRank
) -> tuple[list[Fitted], Clock]:
    """Bring one path's slots under a limit; what they carry, and the time that it took.

    The sums of all blocks together need not fit a small memory: each is made when it is due,
    untimed.
    """
    limiter = Limiter("auto" if limit == "auto" else None, lambda done: None)
    most = KERNELS_LIMIT - BASE_RANK if limit == "auto" else limit
    slot = Slot(path.name, torch.device(args.device))
    clock = Clock(args.device)
    for seed in range(slots):
        pairs, supports = pairs_of(path, args, seed)
        with clock:
            limiter.add(slot, pairs, supports, most)
    with clock:
        done = limiter.finish()
    return done, clock


def _cost(clock: Clock, args: argparse.Namespace) -> float:
    """Elapsed time; with one thread its CPU time, which others on the machine do not lengthen."""
    return clock.cpu_seconds if args.device == "cpu" and args.threads == 1 else clock.seconds


def exact(path: SlotPath, args: argparse.Namespace) -> tuple[float, float]:
    """CPU or GPU seconds per slot of the plain way; the energy that it loses on the first slot."""
    clock, lost = Clock(args.device), []
    for seed in range(args.baseline):
        pairs, _ = pairs_of(path, args, seed)
        with clock:
            cut = decomposed(LowRankSum.of([(p.down, p.up) for p in pairs])).cut(args.max_rank)
            pack_lowrank(cut.down.bfloat16(), LowRankSide.DOWN)
            pack_lowrank(cut.up.bfloat16(), LowRankSide.UP)
        lost.append(cut.energy_lost)
    return _cost(clock, args) / args.baseline, lost[0]


def measure(path: SlotPath, args: argparse.Namespace) -> dict[str, Any]:
    slots = path.per_block * args.blocks
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        limited(path, min(slots, 16), args, args.max_rank)
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    done, clock = limited(path, slots, args, args.max_rank)
    seconds = _cost(clock, args)
    row: dict[str, Any] = {
        "ranks": done[0].rank_exact,
        "slots": slots,
        "seconds": seconds,
        "seconds_60_blocks": seconds * BLOCKS / args.blocks,
        "lost": max(fitted.energy_lost or 0.0 for fitted in done),
    }
    if on_gpu:
        held = sum(p.down.nbytes + p.up.nbytes for f in done for p in f.pairs)
        row["extra_mib"] = (torch.cuda.max_memory_allocated() - before - held) / 2**20
    if args.auto:
        chosen, clock = limited(path, slots, args, "auto")
        row["auto_seconds"] = _cost(clock, args)
        row["auto_ranks"] = sorted({sum(p.rank for p in fitted.pairs) for fitted in chosen})
        row["auto_lost"] = max(fitted.energy_lost or 0.0 for fitted in chosen)
    if args.baseline:
        each, lost = exact(path, args)
        row |= {"exact_seconds_60_blocks": each * path.per_block * BLOCKS, "exact_lost": lost}
        row["speedup"] = row["exact_seconds_60_blocks"] / row["seconds_60_blocks"]
        row["lost_over_least"] = done[0].energy_lost / lost if lost else 1.0
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--loras", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--max-rank", type=int, default=256)
    parser.add_argument("--decay", type=float, default=0.0, help="singular values n ** -decay")
    parser.add_argument("--auto", action="store_true", help='time max_rank="auto", too')
    parser.add_argument("--baseline", type=int, default=1, help="slots of a path done exactly")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cores = f"{args.threads} threads" if args.device == "cpu" else args.device
    print(
        f"{args.loras} LoRAs of rank {args.rank} to {args.max_rank}, {args.blocks} blocks, {cores}"
    )
    rows = {}
    for path in PATHS:
        rows[path.name] = row = measure(path, args)
        line = (
            f"{path.name:28}{row['ranks']:5} ranks {row['seconds']:7.2f} s,"
            f" {row['seconds_60_blocks']:7.2f} s for 60 blocks, {row['lost']:.3%} lost"
        )
        if args.baseline:
            line += (
                f"; QR and SVD {row['exact_seconds_60_blocks']:7.1f} s,"
                f" x{row['speedup']:.1f}, lost {row['lost_over_least']:.3f} of the least"
            )
        if "extra_mib" in row:
            line += f"; {row['extra_mib']:.0f} MiB extra"
        if args.auto:
            line += (
                f"; auto {row['auto_seconds']:.2f} s, ranks {row['auto_ranks'][0]} to"
                f" {row['auto_ranks'][-1]}, {row['auto_lost']:.3%} lost"
            )
        print(line, flush=True)
    total = sum(row["seconds_60_blocks"] for row in rows.values())
    print(f"60 blocks: {total:.2f} s")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        result = {"settings": settings, "rows": rows, "seconds_60_blocks": total}
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
