"""What Nunchaku's int4 kernels allow, and what each way through the fused MLP costs.

    python benches/bench_kernels.py [--tokens 4096 512] [--factors 4 8 16 -1] [--json FILE]
                                    [--width 3072] [--compiled] [--device cuda]

Facts: column scales of an int4 layer, the output behind GELU beside its quantized form, layers cut
into slices of rows, and the layouts of what the kernels hand each other. Each is a figure on the
kernels themselves.

Times: an MLP of Qwen-Image (3072, 12288) without a delta, with a low-rank branch of 256, and with
Kronecker products of whole factors on both layers, each way that carries them; beside the error of
the output against float64, and the share of the wanted change that arrives. Needs Nunchaku's
extension, built for the device.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.facts import measure_facts, relative
from kernels.layer import DTYPE, Kernels, Layer
from kernels.paths import MOST_RANKS, FusedWithHidden, Kron, Mlp, Open, OpenCentred, Sliced
from qwenlora.packing.layout import RANK_MULTIPLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Row = dict[str, Any]
BASE_RANK = 32
TRUNCATED = 256
"""Ranks to which a product of whole factors is brought today."""
PIECE = 512
"""Tokens that the open way's quantizer takes at a time, where it takes pieces."""
CALLS = 10
"""Calls between two events: their launches run ahead of the kernels."""
RELATIVE_SIZE = 0.1
"""Of a product beside its layer's weight."""


def factors_of(size: int, factor: int) -> tuple[int, int]:
    """How LyCORIS cuts a side: by `factor`, or as near to its root as it divides."""
    if factor > 0:
        return factor, size // factor
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    return small, size // small


def random_kron(out: int, inp: int, factor: int, device: str) -> Kron:
    """Whole factors, `w1` of the smaller parts; of the first layer's kind where `out` is larger."""
    generator = torch.Generator().manual_seed(out + factor)
    (ol, ok), (im, il) = factors_of(out, factor), factors_of(inp, factor)
    w1 = torch.randn(ol, im, generator=generator) / math.sqrt(im)
    w2 = torch.randn(ok, il, generator=generator) / math.sqrt(il) * RELATIVE_SIZE
    return Kron(w1.to(device, DTYPE), w2.to(device, DTYPE))


def most_rows(kron: Kron, ranks: int) -> int | None:
    """Rows of `w1` in a slice: as many as the kernels' ranks and tiles of 128 allow."""
    (ol, _), (ok, il) = kron.w1.shape, kron.w2.shape
    fit = [
        count
        for count in range(1, ol + 1)
        if ol % count == 0
        and count * il + ranks <= MOST_RANKS
        and not count * ok % 128
        and not count * il % RANK_MULTIPLE
    ]
    # More rows are fewer launches, and more zeros to multiply.
    return max(fit) if fit else None


def least_rows(kron: Kron, ranks: int, rows: int) -> int | None:
    """The fewest rows of `w1` that make slices of at least `rows`."""
    limit = most_rows(kron, ranks)
    ol, ok, il = kron.w1.shape[0], *kron.w2.shape
    fit = [
        count
        for count in range(1, (limit or 0) + 1)
        if ol % count == 0
        and count * ok >= rows
        and not count * ok % 128
        and not count * il % RANK_MULTIPLE
    ]
    return min(fit) if fit else limit


class Clock:
    """Medians of one device, in milliseconds."""

    def __init__(self, device: str, repeat: int) -> None:
        self._device = device
        self._repeat = repeat

    def measure(self, work: Callable[[], object]) -> Row:
        """The time of one call: median, least and most of several times of some calls.

        With it the MiB that a call holds at most, its output among them.
        """
        for _ in range(3):
            work()
        found = [self._once(work) for _ in range(self._repeat)]
        row = {"median_ms": statistics.median(found), "min_ms": min(found), "max_ms": max(found)}
        return row | ({"peak_mib": self._peak(work)} if self._device == "cuda" else {})

    def _peak(self, work: Callable[[], object]) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def _once(self, work: Callable[[], object]) -> float:
        if self._device != "cuda":
            began = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - began)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / CALLS


class Bench:
    """One MLP and its ways."""

    def __init__(self, width: int, device: str) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        self._device = device
        self._generator = generator
        hidden = 4 * width
        first = self._random(hidden, width) / math.sqrt(width)
        second = self._random(width, hidden) / math.sqrt(hidden)
        self.mlp = Mlp(
            Kernels(),
            Layer.of(first, 0.1 * self._random(hidden), rank=BASE_RANK),
            Layer.of(second, 0.1 * self._random(width), rank=BASE_RANK, act_unsigned=True),
        )
        self._dense = self.mlp.first.dense(), self.mlp.second.dense()

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)

    def input(self, tokens: int) -> Tensor:
        """(M, C)."""
        return self._random(tokens, self.mlp.first.inputs).to(DTYPE)

    def truncated(self) -> Mlp:
        """Both layers with the ranks that stand for a product today, of any values."""
        layers = []
        for layer in (self.mlp.first, self.mlp.second):
            down = self._random(TRUNCATED, layer.inputs).to(DTYPE) / math.sqrt(layer.inputs)
            up = self._random(layer.outputs, TRUNCATED).to(DTYPE) * 0.01
            layers.append(layer.with_ranks(down, up))
        return Mlp(self.mlp.kernels, *layers)

    def krons(self, factor: int) -> tuple[Kron, Kron]:
        """Those of both layers."""
        inp, out = self.mlp.first.inputs, self.mlp.first.outputs
        return (
            random_kron(out, inp, factor, self._device),
            random_kron(inp, out, factor, self._device),
        )

    def plain_ways(self, *, compiled: bool) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """Without a product."""
        yield "fused", self.mlp.fused
        yield f"fused, rank {TRUNCATED} more", self.truncated().fused
        yield "fused + hidden", FusedWithHidden(self.mlp)
        yield "open", Open(self.mlp)
        yield f"open, pieces of {PIECE}", Open(self.mlp, piece=PIECE)
        if compiled:
            yield "open, compiled quantizer", Open(self.mlp, compiled=True)
        yield "open, centred", OpenCentred(self.mlp)

    def ways(
        self, first: Kron, second: Kron, *, compiled: bool
    ) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """With products on the second layer, on the first, and on both."""
        yield "fused + hidden, second", FusedWithHidden(self.mlp, second=second)
        counts = {
            least_rows(first, BASE_RANK, 768),
            least_rows(first, BASE_RANK, 1024),
            most_rows(first, BASE_RANK),
        }
        for count in sorted(count for count in counts if count):
            rows = count * first.w2.shape[0]
            name = f"sliced by {rows}, {count * first.w2.shape[1]} ranks"
            yield f"{name}, first", Sliced(self.mlp, first, count)
            yield f"{name}, both", Sliced(self.mlp, first, count, second=second)
        yield "open, both", Open(self.mlp, first=first, second=second)
        pieces = Open(self.mlp, first=first, second=second, piece=PIECE)
        yield f"open, pieces of {PIECE}, both", pieces
        if compiled:
            both = Open(self.mlp, first=first, second=second, compiled=True)
            yield "open, compiled quantizer, both", both
        yield "open, centred, both", OpenCentred(self.mlp, first=first, second=second)

    def exact(self, x: Tensor, first: Kron | None = None, second: Kron | None = None) -> Tensor:
        """The output in float64."""
        (w1, b1), (w2, b2) = self._dense
        w1 = w1 if first is None else w1 + first.dense()
        w2 = w2 if second is None else w2 + second.dense()
        hidden = F.gelu(x.double() @ w1.mT + b1, approximate="tanh")
        return hidden @ w2.mT + b2


def accuracy(bench: Bench, x: Tensor, name: str, way: Any, krons: tuple[Kron, Kron]) -> Row:
    """Error of the output against float64, and the share of the change that arrives."""
    carried = {
        "first": "first" in name or "both" in name,
        "second": "second" in name or "both" in name,
    }
    own = {side: kron for side, kron in zip(carried, krons, strict=True) if carried[side]}
    base, exact = bench.exact(x), bench.exact(x, **own)
    found, change = way(x).double(), exact - base
    share = ((found - bench.mlp.fused(x).double()) * change).sum() / change.square().sum()
    return {
        "error": relative(found, exact),
        "share": float(share),
        "change": float(change.norm() / exact.norm()),
    }


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of facts and of times."""
    bench, clock = Bench(args.width, args.device), Clock(args.device, args.repeat)
    for tokens in (args.tokens[0], 300):
        for name, figures in measure_facts(bench.mlp, bench.input(tokens)):
            yield {"suite": "facts", "name": name, "tokens": tokens, **figures}
    for tokens in args.tokens:
        x = bench.input(tokens)
        for name, way in bench.plain_ways(compiled=args.compiled):
            row = {"suite": "times", "tokens": tokens, "name": name}
            if "more" not in name:
                row["against_fused"] = relative(way(x), bench.mlp.fused(x))
                row["error"] = relative(way(x), bench.exact(x))
            yield row | clock.measure(lambda way=way, x=x: way(x))
        for factor in args.factors:
            krons = bench.krons(factor)
            hidden = bench.mlp.first_output(x)
            for name, kron, given in zip(("first", "second"), krons, (x, hidden), strict=True):
                row = {"suite": "times", "tokens": tokens, "factor": factor}
                took = clock.measure(lambda kron=kron, given=given: kron(given))
                yield row | {"name": f"product of the {name} alone"} | took
            for name, way in bench.ways(*krons, compiled=args.compiled):
                row = {"suite": "times", "tokens": tokens, "factor": factor, "name": name}
                row |= accuracy(bench, x, name, way, krons)
                yield row | clock.measure(lambda way=way, x=x: way(x))


def told(row: Row) -> str:
    """A row as a line."""
    shown = {
        key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 512])
    parser.add_argument("--factors", type=int, nargs="+", default=[4, 8, 16, -1])
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--compiled", action="store_true", help="time a compiled quantizer, too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    machine = {"device": name, "torch": torch.__version__, "width": args.width}
    print(told(machine))
    rows = []
    with torch.inference_mode():
        for row in measure(args):
            rows.append(row)
            print(told(row), flush=True)
            if args.json:
                found = {"machine": machine, "rows": rows}
                args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
