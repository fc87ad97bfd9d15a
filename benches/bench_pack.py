"""Filling composed slots on the CPU, beside the same in torch and a plain copy of as many bytes.

    python benches/bench_pack.py [--slots N] [--repeat K] [--threads T ...] [--json FILE]

Factors have the real sizes of Qwen-Image, base rank 128, normal values in bfloat16. Every row fills
the same memory; GB/s count what is read and what is written. "fresh" allocates the destination
anew each time, as a first composition does. "scaled" multiplies each `up` by one factor, looked up
in a table while it is packed or formed before; a `down` is never scaled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwenlora import _core
from qwenlora.packing.layout import FRAGMENT, TILE, LowRankSide
from qwenlora.packing.pack import pack_lowrank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BASE_RANK = 128
DTYPE = torch.bfloat16
QKV_PARTS = 3
FACTOR = 0.4


class Factor(NamedTuple):
    """What is composed: a base and LoRAs, in one side of a slot."""

    name: str
    side: LowRankSide
    channels: int
    ranks: tuple[int, ...]
    is_fused: bool = False

    @property
    def rank(self) -> int:
        return BASE_RANK + sum(self.ranks)


FACTORS = (
    Factor("down 3072, rank 64", LowRankSide.DOWN, 3072, (64,)),
    Factor("up 3072, rank 64", LowRankSide.UP, 3072, (64,)),
    Factor("up 12288, rank 64", LowRankSide.UP, 12288, (64,)),
    Factor("down 12288, rank 64", LowRankSide.DOWN, 12288, (64,)),
    Factor("qkv down 3072, 3 x 64", LowRankSide.DOWN, 3072, (64, 64, 64), is_fused=True),
    Factor("qkv up 9216, 3 x 64", LowRankSide.UP, 9216, (64, 64, 64), is_fused=True),
    Factor("up 3072, rank 20", LowRankSide.UP, 3072, (20,)),
)


def raw(tensor: Tensor) -> npt.NDArray[np.uint8]:
    return tensor.view(torch.uint8).numpy()


def table_of(factor: float) -> npt.NDArray[np.uint8]:
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(DTYPE)
    return raw(every * factor)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


class Slot:
    """One factor's sources."""

    def __init__(self, factor: Factor) -> None:
        self.factor = factor
        self.base = random(factor.channels, BASE_RANK)
        rows = factor.channels // QKV_PARTS if factor.is_fused else factor.channels
        is_down = factor.side is LowRankSide.DOWN
        shapes = [(r, factor.channels) if is_down else (rows, r) for r in factor.ranks]
        self.loras = [random(*shape) for shape in shapes]

    @property
    def tiles(self) -> int:
        return -(-self.factor.rank // TILE)

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        written = self.factor.channels * self.tiles * TILE * DTYPE.itemsize
        return self.base.nbytes + sum(lora.nbytes for lora in self.loras) + written

    def recipe(
        self,
        dest: Tensor,
        *,
        table: npt.NDArray[np.uint8] | None = None,
        loras: Sequence[Tensor] | None = None,
    ) -> Any:
        factor, tiles = self.factor, BASE_RANK // TILE
        members: list[tuple[Any, ...]] = []
        end = 0
        for part, (lora, rank) in enumerate(zip(loras or self.loras, factor.ranks, strict=True)):
            if factor.side is LowRankSide.DOWN:
                members.append((raw(lora), rank, end))
            else:
                row_begin = part * lora.shape[0] if factor.is_fused else 0
                members.append((raw(lora), table, row_begin, lora.shape[0], rank, end))
            end += rank
        columns = [
            ("fragments", [(raw(self.base), tiles)], 0, tiles),
            (factor.side.value, self.tiles - tiles, members),
        ]
        return raw(dest), 1, factor.channels, DTYPE.itemsize, columns

    def in_torch(self, dest: Tensor) -> None:
        """Join logically, permute into fragments, join with the base's."""
        factor = self.factor
        if factor.side is LowRankSide.DOWN:
            logical = torch.cat(self.loras)
        elif factor.is_fused:
            logical = torch.block_diag(*self.loras)
        else:
            logical = torch.cat(self.loras, dim=1)
        packed = pack_lowrank(logical, factor.side)
        shape = (factor.channels // TILE, -1, FRAGMENT)
        torch.cat([self.base.view(shape), packed.view(shape)], dim=1, out=dest.view(shape))


def median(action: Callable[[], object], repeat: int) -> float:
    action()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(factor: Factor, slots: int, threads: int, repeat: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    sources = [Slot(factor) for _ in range(slots)]
    shape = (slots, factor.channels, sources[0].tiles * TILE)
    arena, other = torch.zeros(shape, dtype=DTYPE), torch.zeros(shape, dtype=DTYPE)
    moved = sum(slot.nbytes for slot in sources)

    def recipes(arena: Tensor) -> list[Any]:
        return [slot.recipe(dest) for slot, dest in zip(sources, arena, strict=True)]

    def in_torch() -> None:
        for slot, dest in zip(sources, arena, strict=True):
            slot.in_torch(dest)

    def fresh_huge() -> None:
        # NumPy asks the system for huge pages for its large arrays, torch does not.
        memory = torch.from_numpy(np.empty(arena.nbytes, np.uint8)).view(DTYPE).view(shape)
        _core.fill_packed(recipes(memory), threads=threads)

    def scaled_before() -> None:
        ready = [
            slot.recipe(dest, loras=[lora * FACTOR for lora in slot.loras])
            for slot, dest in zip(sources, arena, strict=True)
        ]
        _core.fill_packed(ready, threads=threads)

    ready, table = recipes(arena), table_of(FACTOR)
    tabled = [slot.recipe(d, table=table) for slot, d in zip(sources, arena, strict=True)]
    seconds = {
        "copy": median(lambda: other.copy_(arena), repeat) * moved / (2 * arena.nbytes),
        "torch": median(in_torch, repeat),
        "rust": median(lambda: _core.fill_packed(ready, threads=threads), repeat),
        "rust, scaled": median(lambda: _core.fill_packed(tabled, threads=threads), repeat),
        "rust, scaled before": median(scaled_before, repeat),
        "rust, fresh": median(
            lambda: _core.fill_packed(recipes(torch.empty_like(arena)), threads=threads), repeat
        ),
        "rust, fresh huge": median(fresh_huge, repeat),
    }
    return {"factor": factor.name, "threads": threads, "bytes": moved, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [
        measure(factor, max(1, args.slots * 3072 // factor.channels), threads, args.repeat)
        for factor in FACTORS
        for threads in args.threads
    ]
    names = list(rows[0]["seconds"])
    print("GB/s read and written; x: times as fast as torch; c: share of the plain copy's speed")
    print(f"{'factor':24}{'threads':>8}" + "".join(f"{n:>20}" for n in names) + f"{'x':>7}{'c':>7}")
    for row in rows:
        seconds = row["seconds"]
        speeds = "".join(f"{row['bytes'] / seconds[name] / 1e9:20.2f}" for name in names)
        ratio, share = seconds["torch"] / seconds["rust"], seconds["copy"] / seconds["rust"]
        print(f"{row['factor']:24}{row['threads']:8}{speeds}{ratio:7.1f}{share:7.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
