"""What composed rank costs in a forward: time per rank, resident and offloaded.

    python benches/bench_rank.py [--only resident|offloaded] [--device cpu|cuda] [--repeat K]
                                 [--tokens IMAGE TEXT] [--ranks R ...]
                                 [--added R ...] [--blocks N] [--weights lean|full] [--json FILE]

Resident: the quantized linears of one Qwen-Image block on Nunchaku's kernels, at several total
ranks of their low-rank branches (base and LoRA together); a line through the medians gives the time
of one rank, in each layer and in a forward of all blocks. Needs Nunchaku itself, built for the
device; `--emulated` puts the stand-ins in place of its layers: their times say nothing about it.

Offloaded: what the block copies of a forward take with nothing to hide them, one block resident,
against the rank that a LoRA adds to every quantized linear; pinned and not.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import qwenlora
from composition.measure import Action, Meter
from composition.model import Values, Weights, build_model
from composition.offload import PAGEABLE, PINNED, copy_blocks
from composition.shapes import BLOCKS, FUSED, LINEARS, WIDTH
from qwenlora import emulation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Row = dict[str, Any]
BASE_RANK = 32
CALLS = 10
"""Calls between two events of a GPU: their launches run ahead of the kernels."""


@dataclass(frozen=True)
class Line:
    """A least-squares line of seconds over rank, and how far the points lie from it."""

    slope: float
    start: float
    largest_deviation: float

    @classmethod
    def through(cls, ranks: Sequence[int], seconds: Sequence[float]) -> Line:
        """Two points at least."""
        slope, start = statistics.linear_regression(ranks, seconds)
        worst = max(
            abs(start + slope * rank - s) / s for rank, s in zip(ranks, seconds, strict=True)
        )
        return cls(slope, start, worst)

    def document(self) -> Row:
        """JSON-able."""
        return {
            "seconds_per_rank": self.slope,
            "start_s": self.start,
            "largest_deviation": self.largest_deviation,
        }


@dataclass(frozen=True)
class Engine:
    """Where the layers come from.

    Attributes:
        name: As told.
        linear: Makes a layer of (in, out), with a base branch and, behind GELU, `act_unsigned`.
        fused_mlp: (x, first, second) to their output.
    """

    name: str
    linear: Callable[..., Any]
    fused_mlp: Callable[[Tensor, Any, Any], Tensor]


def nunchaku() -> Engine:
    """Nunchaku's own layers.

    Raises:
        ImportError: It is not installed; the PyPI package of its name is another one.
    """
    importlib.import_module("nunchaku._C")
    linear = importlib.import_module("nunchaku.models.linear").SVDQW4A4Linear
    fused = importlib.import_module("nunchaku.ops.fused").fused_gelu_mlp
    return Engine("Nunchaku's kernels", linear, fused)


def emulated() -> Engine:
    """The stand-ins, which quantize, but multiply in float32."""

    def linear(inp: int, out: int, **settings: Any) -> nn.Module:
        precision = emulation.Precision.W4A4
        return emulation.SVDQW4A4Linear(inp, out, precision=precision, **settings)

    return Engine("the emulation, not Nunchaku's kernels", linear, emulation.fused_gelu_mlp)


class Layer:
    """One quantized linear with random values, whose branch can take any rank up to the highest."""

    def __init__(
        self, engine: Engine, inp: int, out: int, highest: int, device: str, **settings: Any
    ) -> None:
        self.module = engine.linear(inp, out, rank=BASE_RANK, device=device, **settings)
        self._values = Values(inp + out, device)
        module = self.module
        module.qweight.data = torch.randint_like(module.qweight, -128, 128)
        for name, value in {"wscales": 0.2 / math.sqrt(inp), "smooth_factor": 1, "bias": 0}.items():
            getattr(module, name).data.fill_(value)
        self._down, self._up = (self._random(size, highest, device) for size in (inp, out))

    def _random(self, features: int, highest: int, device: str) -> Tensor:
        pool = torch.empty(features * highest, dtype=torch.bfloat16, device=device)
        return self._values.fill(pool) / math.sqrt(features)

    def set_rank(self, rank: int) -> None:
        """Give the branch a total rank: the shapes that composing gives it."""
        for name, pool in (("proj_down", self._down), ("proj_up", self._up)):
            parameter = getattr(self.module, name)
            features = parameter.shape[0]
            parameter.data = pool[: features * rank].view(features, rank)


@dataclass(frozen=True)
class Step:
    """What a block runs in one piece: a linear, or the fused MLP with its two.

    Attributes:
        name: As told.
        tokens: Rows of its input.
        layers: Its linears.
        call: Runs it once.
    """

    name: str
    tokens: int
    layers: tuple[Layer, ...]
    call: Callable[[], Tensor]


def steps(
    engine: Engine, width: int, tokens: Sequence[int], highest: int, device: str
) -> Iterator[Step]:
    """All that one block runs on quantized linears: the image stream, then the text stream."""

    def layer(inp: int, out: int, **settings: Any) -> Layer:
        return Layer(engine, inp, out, highest, device, **settings)

    for count, (qkv, out) in zip(
        tokens, (("to_qkv", "to_out.0"), ("add_qkv_proj", "to_add_out")), strict=True
    ):
        x = torch.randn(1, count, width, device=device).bfloat16()
        for name, outputs in ((qkv, 3 * width), (out, width)):
            one = layer(width, outputs)
            yield Step(name, count, (one,), lambda x=x, one=one: one.module(x))
        first, second = layer(width, 4 * width), layer(4 * width, width, act_unsigned=True)
        yield Step(
            "img_mlp" if qkv == "to_qkv" else "txt_mlp",
            count,
            (first, second),
            lambda x=x, a=first, b=second: engine.fused_mlp(x, a.module, b.module),
        )


def seconds_of(call: Callable[[], object], device: str) -> float:
    """One call's time; on a GPU between events, where it does not wait for launches."""
    if device != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS


def time_step(step: Step, ranks: Sequence[int], repeat: int, device: str) -> Row:
    """Medians by total rank, taken in turns so that a drifting clock meets all ranks alike."""
    times: dict[int, list[float]] = {rank: [] for rank in ranks}
    for turn in range(repeat + 1):
        for rank in ranks:
            for layer in step.layers:
                layer.set_rank(rank)
            found = seconds_of(step.call, device)
            if turn:
                times[rank].append(found)
    medians = [statistics.median(times[rank]) for rank in ranks]
    assert step.call().isfinite().all(), f"{step.name} overflows: times of such values say nothing"
    return {
        "part": "resident",
        "step": step.name,
        "tokens": step.tokens,
        "linears": len(step.layers),
        "ranks": list(ranks),
        "median_s": medians,
        "spread_s": [max(times[rank]) - min(times[rank]) for rank in ranks],
        "line": Line.through(ranks, medians).document(),
    }


def measure_resident(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each step of a block, and one for a forward; or one that says what is missing."""
    try:
        if args.device != "cuda" and not args.emulated:
            raise ImportError("its kernels run on CUDA devices")
        engine = emulated() if args.emulated else nunchaku()
    except ImportError as error:
        yield {"part": "resident", "skipped": f"needs Nunchaku with its kernels: {error}"}
        return
    found = []
    with torch.inference_mode():
        for step in steps(engine, args.width, args.tokens, max(args.ranks), args.device):
            found.append(time_step(step, args.ranks, args.repeat, args.device))
            yield found[-1] | {"engine": engine.name}
    totals = [BLOCKS * sum(times) for times in zip(*(r["median_s"] for r in found), strict=True)]
    # The ranks of q, k and v add up where they are fused.
    trained = (
        len(FUSED.get(f"attn.{r['step']}", ("",))) * r["line"]["seconds_per_rank"] for r in found
    )
    yield {
        "part": "resident",
        "step": f"forward, {BLOCKS} blocks",
        "linears": BLOCKS * sum(row["linears"] for row in found),
        "ranks": list(args.ranks),
        "median_s": totals,
        "line": Line.through(args.ranks, totals).document(),
        "seconds_per_trained_rank": BLOCKS * sum(trained),
        "engine": engine.name,
    }


def lora(blocks: int, rank: int) -> dict[str, Tensor]:
    """A LoRA that adds one rank to every quantized linear, its values the same in all blocks.

    q, k and v share their `down`, so that the fused layer gains the rank once.
    """
    values, found = Values(rank, "cpu"), {}
    shared = {name: slot for slot, names in FUSED.items() for name in names}
    downs: dict[str, Tensor] = {}
    for name, (out, inp) in LINEARS.items():
        slot = shared.get(name, name)
        if slot not in downs:
            downs[slot] = values.fill(torch.empty(rank, inp, dtype=torch.bfloat16))
        up = values.fill(torch.empty(out, rank, dtype=torch.bfloat16))
        for block in range(blocks):
            key = f"transformer_blocks.{block}.{name}"
            found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"] = downs[slot], up
    return found


def time_copies(model: nn.Module, ranks: Sequence[int], meter: Meter) -> Iterator[Row]:
    """What a forward's block copies take with each rank added."""
    options = qwenlora.ComposeOptions(cache_bytes=0, device_cache_bytes=0)
    manager = model.offload_manager
    base = None
    for rank in ranks:
        qwenlora.reset_loras(model)
        bus_bytes = 0
        if rank:
            tensors = lora(len(model.transformer_blocks), rank)
            report = qwenlora.compose_loras(model, tensors, options=options)
            assert report.complete
            assert {slot.rank_added for slot in report.slots} == {rank}
            bus_bytes = report.bus_bytes
        manager.bytes_per_forward = []
        timing = meter.time(Action(lambda: copy_blocks(model)))
        copied, manager.bytes_per_forward = manager.bytes_per_forward[-1], None
        base = copied - bus_bytes if base is None else base
        assert copied == base + bus_bytes, "the report announces other bytes than are copied"
        yield {"rank": rank, "bus_bytes": bus_bytes, "copied_bytes": copied} | timing.document()


def measure_offloaded(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each way to keep blocks in host memory; without a GPU nothing can be pinned."""
    meter = Meter(args.device, repeat=args.repeat, budget=20)
    for place in (PINNED, PAGEABLE) if args.device == "cuda" else (PAGEABLE,):
        model = build_model(args.blocks, BASE_RANK, args.device, Weights(args.weights))
        model.set_offload(True, use_pin_memory=place == PINNED, device=args.device)
        points = list(time_copies(model, args.added, meter))
        ranks = [point["rank"] for point in points]
        line = Line.through(ranks, [point["median_s"] for point in points])
        bytes_per_rank, _ = statistics.linear_regression(ranks, [p["bus_bytes"] for p in points])
        yield {
            "part": "offloaded",
            "placement": place,
            "blocks": args.blocks,
            "weights": args.weights,
            "points": points,
            "line": line.document(),
            "bytes_per_rank": bytes_per_rank,
            # Noise alone can give points that few a falling line.
            "bytes_per_s": bytes_per_rank / line.slope if line.slope > 0 else None,
        }
        del model
        qwenlora.clear_cache()
        gc.collect()
        torch.cuda.empty_cache()


def show_resident(rows: Sequence[Row]) -> None:
    ranks = rows[0]["ranks"]
    print(f"resident, {rows[0]['engine']}: ms at total ranks {', '.join(map(str, ranks))}")
    for row in rows:
        tokens = f"{row['tokens']} tokens" if "tokens" in row else ""
        times = " ".join(f"{1e3 * s:9.3f}" for s in row["median_s"])
        line = row["line"]
        slope = 1e6 * line["seconds_per_rank"]
        print(
            f"  {row['step']:18}{tokens:>12} {times}  {slope:8.3f} us per rank,"
            f" {slope / row['linears']:.3f} of each of {row['linears']} linears"
            f" (points within {line['largest_deviation']:.1%} of the line)"
        )
    trained = 1e6 * rows[-1]["seconds_per_trained_rank"]
    print(f"  a rank that a LoRA trains, q, k and v apart: {trained:.3f} us per forward")


def show_offloaded(row: Row) -> None:
    print(f"offloaded, {row['placement']}, {row['blocks']} blocks: block copies of a forward")
    for point in row["points"]:
        print(
            f"  rank {point['rank']:4} added: {1e3 * point['median_s']:9.2f} ms"
            f" ±{1e3 * point['spread_s']:.2f}, {point['bus_bytes'] / 1e6:8.1f} MB more"
        )
    rate, line = row["bytes_per_s"], row["line"]
    print(
        f"  {1e3 * line['seconds_per_rank']:.4f} ms and {row['bytes_per_rank'] / 1e6:.2f} MB per"
        f" rank and forward, {f'{rate / 1e9:.1f}' if rate else '-'} GB/s"
        f" (points within {line['largest_deviation']:.1%} of the line)"
    )


def show(rows: Sequence[Row]) -> None:
    """Tables of all that was measured, and a word for what was not."""
    for row in rows:
        if "skipped" in row:
            print(f"{row['part']}: skipped, {row['skipped']}")
    resident = [row for row in rows if row["part"] == "resident" and "skipped" not in row]
    if resident:
        show_resident(resident)
    for row in rows:
        if row["part"] == "offloaded":
            show_offloaded(row)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--only", choices=("resident", "offloaded"))
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path)
    resident = parser.add_argument_group("resident")
    resident.add_argument(
        "--tokens", type=int, nargs=2, default=[4096, 512], metavar=("IMAGE", "TEXT")
    )
    resident.add_argument(
        "--ranks", type=int, nargs="+", default=[32, 64, 128, 192, 256, 384, 512, 768, 1024]
    )
    resident.add_argument("--width", type=int, default=WIDTH)
    resident.add_argument("--emulated", action="store_true")
    offloaded = parser.add_argument_group("offloaded")
    offloaded.add_argument("--added", type=int, nargs="+", default=[0, 16, 32, 64, 128, 256])
    offloaded.add_argument("--blocks", type=int, help="60 on a GPU, 6 on the CPU")
    offloaded.add_argument("--weights", choices=[w.value for w in Weights])
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.blocks = args.blocks or (BLOCKS if on_gpu else 6)
    # Copies of empty weights would leave the bus waiting for launches.
    args.weights = args.weights or (Weights.FULL if on_gpu else Weights.LEAN).value
    return args


def main() -> None:
    args = parsed()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, bfloat16, medians of {args.repeat}")
    rows: list[Row] = []
    if args.only != "offloaded":
        rows += measure_resident(args)
    if args.only != "resident":
        rows += measure_offloaded(args)
    show(rows)
    if args.json:
        document = {"device": device, "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
