"""Time of the first composition against bytes, ranks, LoRAs, blocks and threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import qwenlora
from composition.files import Down, LoraFile
from composition.measure import Action, Meter
from composition.options import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from composition.engines import Engine

SUITE = "scaling"


@dataclass(frozen=True, kw_only=True)
class Sweeps:
    """The points of each sweep.

    Attributes:
        blocks: Blocks that a file trains in the sweeps over other things.
        ranks: Ranks of one LoRA whose q, k and v share a `down`, so that none exceeds the kernels'
            limit and is compressed.
        loras: Numbers of LoRAs.
        lora_rank: Rank of each of them.
        trained: Numbers of blocks trained, at `rank`.
        threads: Numbers of threads, at `rank`.
        rank: Rank of the last two sweeps.
    """

    blocks: int
    ranks: Sequence[int]
    loras: Sequence[int]
    lora_rank: int
    trained: Sequence[int]
    threads: Sequence[int]
    rank: int


def measure_scaling(
    model: nn.Module,
    folder: Path,
    sweeps: Sweeps,
    others: Sequence[Engine],
    meter: Meter,
    their_meter: Meter,
) -> Iterator[dict[str, Any]]:
    """Rows of all sweeps; the engines beside only at three points of each."""
    for sweep, x, paths, threads in _points(folder, sweeps):
        size = sum(path.stat().st_size for path in paths)
        row = {"suite": SUITE, "sweep": sweep, "x": x, "bytes": size}
        stack = [(path, 0.8) for path in paths]
        chosen = options(threads=threads)

        def compose(stack: Any = stack, chosen: Any = chosen) -> None:
            qwenlora.compose_loras(model, stack, options=chosen)

        def forget() -> None:
            qwenlora.reset_loras(model)
            qwenlora.clear_cache()

        timing = meter.time(Action(compose, forget))
        forget()
        yield row | {"engine": "qwenlora"} | timing.document()
        for engine in others if x in _beside(sweeps, sweep) else ():

            def theirs(engine: Engine = engine, stack: Any = stack) -> None:
                engine.compose(model, stack)

            base = Action(theirs, lambda engine=engine: engine.reset(model))
            timing = their_meter.time(base, warm_up=0)
            engine.reset(model)
            yield row | {"engine": engine.name} | timing.document()


def _beside(sweeps: Sweeps, sweep: str) -> set[int]:
    """Ends and middle of a sweep; threads are qwenlora's own."""
    points = {"rank": sweeps.ranks, "LoRAs": sweeps.loras, "blocks": sweeps.trained}.get(sweep, ())
    return {points[0], points[len(points) // 2], points[-1]} if points else set()


def _points(
    folder: Path, sweeps: Sweeps
) -> Iterator[tuple[str, int, tuple[Path, ...], int | None]]:
    """Sweep, its variable, the files and the threads; files go when their point is done."""
    for rank in sweeps.ranks:
        with _Written(folder, blocks=sweeps.blocks, rank=rank, down=Down.SHARED) as path:
            yield "rank", rank, (path,), None
    paths = [
        LoraFile(blocks=sweeps.blocks, rank=sweeps.lora_rank, seed=seed).write(folder)
        for seed in range(max(sweeps.loras))
    ]
    for count in sweeps.loras:
        yield "LoRAs", count, tuple(paths[:count]), None
    for path in paths:
        path.unlink()
    for trained in sweeps.trained:
        with _Written(folder, blocks=trained, rank=sweeps.rank) as path:
            yield "blocks", trained, (path,), None
    with _Written(folder, blocks=sweeps.blocks, rank=sweeps.rank) as path:
        for threads in sweeps.threads:
            yield "threads", threads, (path,), threads


class _Written:
    """A file for as long as it is needed: the page cache is not without end."""

    def __init__(self, folder: Path, **kind: Any) -> None:
        self._path = LoraFile(**kind).write(folder)

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *_: object) -> None:
        self._path.unlink()


def line_through(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Least-squares line of time over bytes: its rate and start, and how far points lie from it."""
    sizes, times = [row["bytes"] for row in rows], [row["median_s"] for row in rows]
    mean_size, mean_time = sum(sizes) / len(rows), sum(times) / len(rows)
    spread = sum((size - mean_size) ** 2 for size in sizes)
    pairs = zip(sizes, times, strict=True)
    slope = sum((s - mean_size) * (t - mean_time) for s, t in pairs) / spread if spread else 0.0
    start = mean_time - slope * mean_size
    worst = max(
        (abs(start + slope * s - t) / t for s, t in zip(sizes, times, strict=True)), default=0.0
    )
    rate = 1 / slope if slope > 0 else float("inf")
    return {"bytes_per_s": rate, "start_s": start, "largest_deviation": worst}
