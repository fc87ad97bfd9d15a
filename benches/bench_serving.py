"""A switch between stacks of named LoRAs, with two attached and with a hundred.

    python benches/bench_serving.py [--device cpu|cuda] [--blocks 8] [--rank 4] [--adapters 2 100]

A pipeline's methods are called as a server calls them: `set_adapters`, then what a forward does
before it runs. A line each for a stack that is in place, a change of weights, a return to a stack
whose deltas are kept, and one whose files must be read. Low-rank branches and files have the real
widths of Qwen-Image and random values. The ratio is that of the largest number of adapters to the
smallest, for the same call.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import qwenlora
from composition.files import LoraFile
from composition.measure import Action, Meter
from composition.model import Weights, build_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Pipeline:
    """What of a pipeline is attached."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer


class Server:
    """A pipeline's methods on a model, without a pipeline's forward."""

    def __init__(self, model: torch.nn.Module, files: Sequence[Path]) -> None:
        self.pipeline: Any = Pipeline(model)
        self.names = [f"lora-{number}" for number in range(len(files))]
        qwenlora.attach(self.pipeline)
        for name, file in zip(self.names, files, strict=True):
            self.pipeline.load_lora_weights(file, adapter_name=name)
        self._wrapper = self.pipeline.qwenlora.wrapper

    def switch(self, *stack: tuple[str, float]) -> None:
        """Bring the model to a stack, as the next forward would."""
        self.pipeline.set_adapters([name for name, _ in stack], [weight for _, weight in stack])
        self._wrapper.reconcile()

    def close(self) -> None:
        """Back to the bare model."""
        qwenlora.detach(self.pipeline)


def actions(server: Server) -> Iterator[tuple[str, Callable[[], Action]]]:
    """What is measured; the first two LoRAs are asked for, whatever else is attached."""
    first, second = server.names[:2]
    weights = itertools.cycle([0.5, 0.75])
    turns = itertools.cycle([first, second])

    def between() -> Action:
        for _ in range(2):
            server.switch((next(turns), 1.0))
        return Action(lambda: server.switch((next(turns), 1.0)))

    def cold() -> Action:
        return Action(lambda: server.switch((next(turns), 1.0)), qwenlora.clear_cache)

    yield "in place already", lambda: Action(lambda: server.switch((first, 1.0)))
    yield "other weights", lambda: Action(lambda: server.switch((first, next(weights))))
    yield "kept stack", between
    yield "files read", cold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 100])
    parser.add_argument("--repeat", type=int, default=21)
    parser.add_argument("--folder", type=Path, help="where LoRA files are kept between runs")
    args = parser.parse_args()
    logging.getLogger("qwenlora").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(args, folder)


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Print one table."""
    counts = sorted(args.adapters)
    files = [
        LoraFile(blocks=args.blocks, rank=args.rank, seed=seed).write(folder)
        for seed in range(counts[-1])
    ]
    model = build_model(args.blocks, 32, args.device, Weights.LEAN)
    meter = Meter(args.device, repeat=args.repeat, budget=20.0)
    found: dict[str, list[tuple[float, float]]] = {}
    for count in counts:
        qwenlora.clear_cache()
        server = Server(model, files[:count])
        for name, action in actions(server):
            timing = meter.time(action())
            found.setdefault(name, []).append((1e3 * timing.median, 1e3 * timing.spread))
        server.close()
    size = files[0].stat().st_size / 1e6
    print(f"{args.device}, {args.blocks} blocks, files of rank {args.rank}, {size:.1f} MB each")
    print("| call | " + " | ".join(f"{count} attached" for count in counts) + " | ratio |")
    for name, row in found.items():
        cells = " | ".join(f"{median:.2f} ms (±{spread:.2f})" for median, spread in row)
        print(f"| {name} | {cells} | {row[-1][0] / row[0][0]:.2f} |")


if __name__ == "__main__":
    main()
