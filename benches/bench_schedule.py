"""What a schedule costs at each step, before the forward runs.

    python benches/bench_schedule.py [--device cpu|cuda] [--blocks 8] [--rank 32] [--steps 20]

A run of so many steps on a model whose low-rank branches have the real widths of Qwen-Image. Each
step asks for its strengths as a forward does, and no forward runs. Shown are milliseconds a step:
the median with the spread, the longest, and how many steps composed anything. Deltas are kept in
host memory, as our ComfyUI nodes have it, or with `--keep` on the device, too. The first run is
not counted: it reads the file.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import qwenlora
from composition.files import LoraFile
from composition.measure import Meter, Timing
from composition.model import Weights, build_model
from qwenlora import ComfyQwenImageWrapper, ComposeOptions, LoraSet, LoraSpec
from qwenlora.model.state import read_state
from qwenlora.runtime import OPTIONS_KEY

_CASES = {
    "no schedule": "",
    "one change, half way": "0:1, 50%:0.3; steps",
    "linear, all the way": "0:1, 100%:0.3",
    "gone half way": "0:1, 50%:0; steps",
}


class Step(NamedTuple):
    """One step of a run."""

    seconds: float
    composed: bool


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep deltas on the device, too")
    args = parser.parse_args()
    logging.getLogger("qwenlora").setLevel(logging.ERROR)
    kept = {} if args.keep else {"device_cache_bytes": 0}
    options = ComposeOptions(**kept)
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            LoraFile(blocks=args.blocks, rank=args.rank, seed=seed).write(Path(folder))
            for seed in (1, 2)
        )
        size = first.stat().st_size / 1e6
        print(f"{args.device}, {args.blocks} blocks, rank {args.rank}, {size:.1f} MB a file")
        print(
            "| schedule of one LoRA | steps that compose"
            " | a step that composes | longest | others |"
        )
        model = build_model(args.blocks, 32, args.device, Weights.LEAN)
        for name, schedule in _CASES.items():
            for beside in ([], [second]):
                stack = [LoraSpec(first, 0.8, schedule=schedule), *beside]
                title = name + (", another LoRA beside it" if beside else "")
                measure(title, model, LoraSet.of(stack, options=options), args)
        qwenlora.reset_loras(model)


def measure(title: str, model: torch.nn.Module, wanted: LoraSet, args: argparse.Namespace) -> None:
    """Print one row."""
    meter = Meter(args.device, repeat=args.runs, budget=60.0)
    wrapper = ComfyQwenImageWrapper.of(model)

    def run() -> list[Step]:
        return [
            _timed(meter, model, lambda share=step / args.steps: ask(wrapper, wanted, share))
            for step in range(args.steps)
        ]

    run()
    steps = [step for _ in range(args.runs) for step in run()]
    composing = [1e3 * step.seconds for step in steps if step.composed]
    others = [1e3 * step.seconds for step in steps if not step.composed]
    cells = [title, f"{len(composing) / args.runs:g} of {args.steps}"]
    cells += [_median(composing), f"{max(composing):.1f} ms" if composing else "-", _median(others)]
    print(f"| {' | '.join(cells)} |", flush=True)


def ask(wrapper: ComfyQwenImageWrapper, wanted: LoraSet, share: float) -> None:
    """What a forward at a share of the course does before it runs."""
    wrapper.reconcile({OPTIONS_KEY: wanted.at(share)})


def _timed(meter: Meter, model: torch.nn.Module, ask_for: Callable[[], None]) -> Step:
    before = read_state(model)
    meter.wait()
    started = time.perf_counter()
    ask_for()
    meter.wait()
    return Step(time.perf_counter() - started, read_state(model) is not before)


def _median(times: list[float]) -> str:
    if not times:
        return "-"
    spread = Timing(tuple(times)).spread
    return f"{statistics.median(times):.3f} ms (±{spread:.3f})"


if __name__ == "__main__":
    main()
