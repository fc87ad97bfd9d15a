"""Norms of a quantized model's weights, and its products with a few columns.

    python benches/bench_norms.py [--device cpu|cuda] [--rank R ...] [--repeat K] [--blocks B]
                                  [--json FILE]

The layers are those of one block of Qwen-Image at their real sizes, with random bytes: 8 of
SVDQuant in 4-bit integers, with a base branch of rank R, and 2 of AWQ. Every layer is read as
composing reads it. A model's time is a block's times 60. On a CPU it is the CPU time of one thread,
which other programs disturb least, and the same is measured with torch alone, which permutes the
packed values. On a GPU torch is the only way, and time is what passes; "memory" is the most that
was allocated beside the layers.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwenlora import clear_cache
from qwenlora.emulation import EmulatedConfig, EmulatedQwenImageTransformer, Precision
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.find import find_targets
from qwenlora.weight.awq import AwqWeight
from qwenlora.weight.base_weight import BaseWeight
from qwenlora.weight.svdq import SvdqWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qwenlora.model.target import Target

MODEL_BLOCKS = 60
COLUMNS = 32
"""Columns of what weights are multiplied with."""


def layers(rank: int, device: torch.device, blocks: int) -> list[Target]:
    """The quantized layers of some blocks, filled with random bytes."""
    config = EmulatedConfig(num_layers=blocks, rank=rank, precision=Precision.W4A4)
    model = EmulatedQwenImageTransformer(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for block in model.transformer_blocks:
        for parameter in block.parameters():
            if parameter.is_floating_point():
                parameter.uniform_(0.01, 0.02, generator=generator)
            else:
                parameter.view(torch.uint8).random_(0, 256, generator=generator)
    targets = find_targets(model, {}).values()
    return [target for target in targets if target.kind in (SlotKind.SVDQ, SlotKind.AWQ)]


def row_norms(target: Target) -> None:
    weight = BaseWeight.of(target)
    weight.row_norms(0, weight.rows_total)


def column_norms(target: Target) -> None:
    weight = BaseWeight.of(target)
    weight.column_norms(0, weight.rows_total)


def products(target: Target) -> None:
    weight = BaseWeight.of(target)
    weight.times(torch.ones(weight.columns, COLUMNS, device=weight.device), 0, weight.rows_total)


WORK: dict[str, Callable[[Target], None]] = {
    "row norms": row_norms,
    "column norms": column_norms,
    f"W x {COLUMNS} columns": products,
}


@contextmanager
def by_torch() -> Iterator[None]:
    """Host memory is read as a GPU's is."""
    before = [(kind, kind._by_rust) for kind in (SvdqWeight, AwqWeight)]
    for kind, _ in before:
        kind._by_rust = kind._by_torch  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for kind, own in before:
            kind._by_rust = own  # type: ignore[attr-defined]


def seconds(targets: Sequence[Target], work: Callable[[Target], None], repeat: int) -> float:
    """The least time for all of these layers; kept norms are dropped before each."""
    is_gpu = targets[0].device.type == "cuda"
    clock = time.perf_counter if is_gpu else time.process_time
    times = []
    for _ in range(repeat + 1):
        clear_cache()
        started = clock()
        for target in targets:
            work(target)
        if is_gpu:
            torch.cuda.synchronize()
        times.append(clock() - started)
    return min(times[1:])


def measure(rank: int, device: torch.device, blocks: int, repeat: int) -> list[dict[str, Any]]:
    targets = layers(rank, device, blocks)
    is_gpu = device.type == "cuda"
    rows = []
    for name, work in WORK.items():
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        own = seconds(targets, work, repeat) * MODEL_BLOCKS / blocks
        row: dict[str, Any] = {"rank": rank, "work": name, "seconds": own}
        if is_gpu:
            row["memory_bytes"] = torch.cuda.max_memory_allocated() - before
        else:
            with by_torch():
                row["torch_seconds"] = seconds(targets, work, 1) * MODEL_BLOCKS / blocks
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> str:
    text = f"rank {row['rank']:4}  {row['work']:16} {row['seconds']:8.2f} s per model"
    if "torch_seconds" in row:
        ratio = row["torch_seconds"] / row["seconds"]
        return f"{text}, torch alone {row['torch_seconds']:8.1f} s ({ratio:.1f} x)"
    return f"{text}, memory {row['memory_bytes'] / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"torch {torch.__version__}, {chip}")
    rows = []
    with torch.no_grad():
        for rank in options.rank:
            for row in measure(rank, device, options.blocks, options.repeat):
                print(show(row), flush=True)
                rows.append(row)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"chip": chip, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
