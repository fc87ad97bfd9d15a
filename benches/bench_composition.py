"""Composition on the CPU or a GPU: what users do, offload, fresh processes, scaling, beside floors.

    python benches/bench_composition.py [--device cpu|cuda] [--only SUITE ...] [--peer DIR]
                                        [--json FILE] [--plots DIR]

Low-rank branches and LoRA files have the real sizes of Qwen-Image and random values. Beside
qwenlora stand, in the same run and on the same layers, the plain way (unpack the base, join the
logical factors, pack the result) and, with --peer, the existing ComfyUI loader: DIR holds its
`nunchaku_code/lora_qwen.py` and, of Nunchaku, `nunchaku/utils.py` and
`nunchaku/lora/flux/{nunchaku_converter,packer,utils}.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from composition.engines import Engine, Peer, Repack
from composition.floors import measure_floors
from composition.fresh import measure_fresh
from composition.measure import Meter, geometric
from composition.model import Weights, build_lite_model, build_model
from composition.offload import measure_offload
from composition.options import BOUNDED
from composition.scaling import Sweeps, measure_scaling
from composition.screen import print_actions, print_floors, print_scaling
from composition.table import Files, measure_table
from composition.z_image import FORMS, LAYERS, build_z_image, write_z_image_lora

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Row = dict[str, Any]
SUITES = ("table", "offload", "fresh", "scaling")
OTHER_FORM = "diffusers"
"""The suite of the model as diffusers builds it, which needs diffusers: asked for by name."""
Z_IMAGE = "z_image"
"""The suite of Z-Image in two forms, which needs diffusers: asked for by name."""
Z_IMAGE_RANK = 32
Z_IMAGE_ACTIONS = (
    "first",
    "first, page cache cold",
    "strength",
    "strength, pieces in host memory",
    "strength, pieces on the device",
    "switch to a set used before",
    "switch, pieces on the device",
    "reset",
    "same stack again",
    "forward, nothing changed",
)
"""Those of the table that need no file but the two of this suite."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        blocks: Blocks of the model.
        base_ranks: Ranks of its base branches; offload, fresh processes and sweeps take the first
            and, of the sweeps, those that fit.
        ranks: Ranks of the three LoRAs; the first is also that of all single ones.
        sweeps: Points of the sweeps.
        repeat: Times that an action is timed.
        budget: Seconds after which it is not timed again.
        their_budget: The same for the engines beside in the sweeps.
    """

    blocks: int
    base_ranks: tuple[int, ...]
    ranks: tuple[int, ...]
    sweeps: Sweeps
    repeat: int
    budget: float
    their_budget: float

    def with_blocks(self, blocks: int) -> Size:
        """The same with another number of blocks."""
        trained = sorted({min(blocks, count) for count in self.sweeps.trained})
        sweeps = replace(self.sweeps, trained=trained, blocks=min(blocks, self.sweeps.blocks))
        return replace(self, blocks=blocks, sweeps=sweeps)


SIZES = {
    "full": Size(
        blocks=60,
        base_ranks=(32, 128),
        ranks=(64, 32, 16),
        sweeps=Sweeps(
            blocks=60,
            ranks=geometric(8, 512),
            loras=range(1, 11),
            lora_rank=32,
            trained=(1, 2, 4, 8, 15, 30, 60),
            threads=(1, 2, 4, 8, 16),
            rank=64,
        ),
        repeat=10,
        budget=6,
        their_budget=1,
    ),
    "small": Size(
        blocks=60,
        base_ranks=(128,),
        ranks=(64, 32, 16),
        sweeps=Sweeps(
            blocks=6,
            ranks=geometric(8, 512),
            loras=range(1, 11),
            lora_rank=32,
            trained=(1, 2, 4, 8, 15, 30, 60),
            threads=(1, 2, 4, 8, 16),
            rank=16,
        ),
        repeat=10,
        budget=8,
        their_budget=1,
    ),
    "tiny": Size(
        blocks=2,
        base_ranks=(16,),
        ranks=(16, 8, 8),
        sweeps=Sweeps(
            blocks=1,
            ranks=(8, 16),
            loras=(1, 2),
            lora_rank=8,
            trained=(1, 2),
            threads=(1, 2),
            rank=8,
        ),
        repeat=3,
        budget=1,
        their_budget=0,
    ),
}


class Run:
    """One run of the bench: its suites one after the other."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._size = SIZES[args.size]
        if args.blocks:
            self._size = self._size.with_blocks(args.blocks)
        self._machine = machine(args.device)
        print(", ".join(f"{name} {value}" for name, value in self._machine.items()), end="\n\n")
        self._folder = folder
        self._device = args.device
        self._weights = Weights(args.weights)
        repeat, budget = args.repeat or self._size.repeat, args.budget or self._size.budget
        self._meter = Meter(args.device, repeat=repeat, budget=budget)
        self._others: list[Engine] = [Repack()]
        if args.peer:
            self._others.append(Peer(args.peer.resolve(), args.device))
        self._files = Files.write(folder, self._size.blocks, self._size.ranks)
        self.floors: Row = {}

    def document(self, rows: list[Row]) -> Row:
        """Everything found so far."""
        found = {"machine": self._machine, "blocks": self._size.blocks, "floors": self.floors}
        return {**found, "rows": rows}

    def measure_floors(self) -> None:
        """What the machine allows; read by the sweeps' plots."""
        self.floors = measure_floors(
            self._files.first, self._meter, list(self._size.sweeps.threads)
        )
        print_floors(self.floors)

    def table(self) -> Iterator[Row]:
        """What users do, for every base rank."""
        for base_rank in self._size.base_ranks:
            model = self._model(base_rank)
            for other in self._others:
                if isinstance(other, Peer):
                    other.compose(model, [(self._files.first, 0.8)])
                    other.require_applied(model, 8 * self._size.blocks)
                    other.reset(model)
            rows = []
            for row in measure_table(model, self._files, self._others, self._meter):
                rows.append(row | {"base_rank": base_rank})
                yield self._told(rows[-1])
            print_actions(rows, f"base rank {base_rank}")
            self._free(model)

    def diffusers(self) -> Iterator[Row]:
        """What users do, on the model as diffusers builds it."""
        base_rank = self._size.base_ranks[0]
        model = build_lite_model(self._size.blocks, base_rank, self._device, self._weights)
        rows = []
        for row in measure_table(model, self._files, [], self._meter):
            rows.append(row | {"base_rank": base_rank, "suite": OTHER_FORM})
            yield self._told(rows[-1])
        print_actions(rows, f"diffusers' own layers, base rank {base_rank}")
        self._free(model)

    def z_image(self) -> Iterator[Row]:
        """What users do, on Z-Image as Nunchaku builds it and as diffusers does."""
        layers = min(LAYERS, self._size.blocks)
        paths = [self._folder / f"z_image_{seed}.safetensors" for seed in range(2)]
        for seed, path in enumerate(paths):
            write_z_image_lora(path, layers, Z_IMAGE_RANK, seed=seed)
        first, other = paths
        files = replace(self._files, first=first, other=other)
        for form in FORMS:
            model = build_z_image(form, layers, self._size.base_ranks[0], self._device)
            rows = []
            for row in measure_table(model, files, [], self._meter, only=Z_IMAGE_ACTIONS):
                rows.append(row | {"suite": Z_IMAGE, "form": form.value})
                yield self._told(rows[-1])
            print_actions(rows, f"Z-Image, {form.value}, rank {Z_IMAGE_RANK}")
            self._free(model)

    def offload(self) -> Iterator[Row]:
        """One block resident."""
        found = []
        for row in measure_offload(
            self._files,
            self._others,
            self._meter,
            blocks=self._size.blocks,
            base_rank=self._size.base_ranks[0],
            weights=self._weights,
        ):
            found.append(row)
            yield self._told(row)
        for place in dict.fromkeys(row["placement"] for row in found):
            rows = [row for row in found if row["placement"] == place]
            print_actions(rows, f"offload: {place}")

    def fresh(self) -> Iterator[Row]:
        """Processes that have nothing yet."""
        rows = []
        for wanted in ({}, BOUNDED):
            setting = {
                "file": str(self._files.first),
                "blocks": self._size.blocks,
                "base_rank": self._size.base_ranks[-1],
                "device": self._device,
                "weights": Weights.LEAN.value,
                "options": wanted,
            }
            budget = 5 * self._meter.budget
            rows.append(measure_fresh(setting, repeat=self._meter.repeat, budget=budget))
            yield self._told(rows[-1])
        print_actions(rows, "fresh processes")

    def scaling(self) -> Iterator[Row]:
        """Sweeps, on the smallest base rank: the kernels' limit leaves the most room."""
        base_rank = min(self._size.base_ranks[0], 32)
        model = self._model(base_rank)
        folder = self._folder / "sweeps"
        folder.mkdir(exist_ok=True)
        theirs = Meter(self._device, repeat=3, budget=self._size.their_budget, least=1)
        rows = []
        sweeps = self._size.sweeps
        for row in measure_scaling(model, folder, sweeps, self._others, self._meter, theirs):
            rows.append(row | {"base_rank": base_rank})
            yield self._told(rows[-1])
        print_scaling(rows)
        self._free(model)

    def _told(self, row: Row) -> Row:
        """A row, shown on the terminal as it comes."""
        keys = ("suite", "placement", "engine", "action", "sweep", "x")
        name = " ".join(str(row[key]) for key in keys if key in row)
        found = f"{1e3 * row['median_s']:.2f} ms" if "median_s" in row else "skipped"
        print(f"{name}: {found}", file=sys.stderr)
        return row

    def _model(self, base_rank: int) -> torch.nn.Module:
        return build_model(self._size.blocks, base_rank, self._device, self._weights)

    def _free(self, model: torch.nn.Module) -> None:
        del model
        gc.collect()
        torch.cuda.empty_cache()


def machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cores": cores,
        "system": platform.platform(terse=True),
        "torch": torch.__version__,
    }


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--size", choices=SIZES, help="full on a GPU, small on the CPU")
    parser.add_argument("--blocks", type=int, help="blocks of the model, 60 unless tiny")
    parser.add_argument(
        "--only", choices=(*SUITES, OTHER_FORM, Z_IMAGE), nargs="+", default=SUITES, metavar="SUITE"
    )
    parser.add_argument("--peer", type=Path, metavar="DIR", help="sources of the existing loader")
    parser.add_argument(
        "--weights",
        choices=[kind.value for kind in Weights],
        help="quantized weights: full on a GPU, lean (left out) on the CPU",
    )
    parser.add_argument("--repeat", type=int, help="times that an action is timed")
    parser.add_argument("--budget", type=float, help="seconds to time one action, beyond 3 times")
    parser.add_argument("--folder", type=Path, help="where to write LoRA files, 20 GB at most")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the sweeps (matplotlib)")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.size = args.size or ("full" if gpu else "small")
    args.weights = args.weights or (Weights.FULL if gpu else Weights.LEAN).value
    return args


def measure(args: argparse.Namespace) -> Row:
    """Run the suites asked for; what is found is written as it is found."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Run(args, Path(folder))
        run.measure_floors()
        rows: list[Row] = []
        for suite in args.only:
            for row in getattr(run, suite)():
                rows.append(row)
                if args.json:
                    args.json.write_text(json.dumps(run.document(rows), indent=1), encoding="utf-8")
        return run.document(rows)


def main() -> None:
    args = parsed()
    logging.getLogger("qwenlora").setLevel(logging.ERROR)
    with torch.no_grad():
        document = measure(args)
    if args.plots:
        draw(document, args.plots)


def draw(document: Row, folder: Path) -> Sequence[Path]:
    """Draw the sweeps; matplotlib is needed only here."""
    from composition.plots import save_plots

    return save_plots(document, folder)


if __name__ == "__main__":
    main()
