"""The same with block offload: one block resident, the others in host memory, pinned and not."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import qwenlora
from composition.measure import Action, Meter
from composition.model import Weights, build_model
from composition.table import Files, OurActions, their_actions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from composition.engines import Engine

SUITE = "offload"
RESIDENT, PINNED, PAGEABLE = "resident", "pinned", "not pinned"


def measure_offload(
    files: Files,
    others: Sequence[Engine],
    meter: Meter,
    *,
    blocks: int,
    base_rank: int,
    weights: Weights,
) -> Iterator[dict[str, Any]]:
    """Rows for a resident model, and for one of each way to offload it."""
    places = (RESIDENT, PINNED, PAGEABLE) if meter.device == "cuda" else (RESIDENT, PAGEABLE)
    for place in places:
        model = build_model(blocks, base_rank, meter.device, weights)
        if place != RESIDENT:
            model.set_offload(True, use_pin_memory=place == PINNED, device=meter.device)
        for row in _rows(model, place, files, others, meter):
            yield {"suite": SUITE, "placement": place, "base_rank": base_rank} | row
        del model
        gc.collect()
        torch.cuda.empty_cache()


def _rows(
    model: nn.Module, place: str, files: Files, others: Sequence[Engine], meter: Meter
) -> Iterator[dict[str, Any]]:
    ours = OurActions(model, files)
    actions: dict[str, Callable[[], Action]] = {
        "first": lambda: ours.first([files.first]),
        "strength": ours.strength,
        "reset": ours.reset,
    }
    for name, make in actions.items():
        yield {"engine": "qwenlora", "action": name} | meter.measure(make())
    if place != RESIDENT:
        yield from _forward_rows(model, files, meter)
    qwenlora.reset_loras(model)
    qwenlora.clear_cache()
    for engine in others:
        yield from _theirs(engine, model, files, meter)


def _forward_rows(model: nn.Module, files: Files, meter: Meter) -> Iterator[dict[str, Any]]:
    """What a forward takes for copying blocks alone: where nothing hides it, it is the time."""
    forward = Action(lambda: copy_blocks(model))
    qwenlora.reset_loras(model)
    base = meter.time(forward)
    report = qwenlora.compose_loras(model, (files.first, 0.8))
    composed = meter.time(forward)
    yield {"engine": "qwenlora", "action": "block copies, base"} | base.document()
    yield {
        "engine": "qwenlora",
        "action": "block copies, composed",
        "added_s": composed.median - base.median,
        "bus_bytes": report.bus_bytes,
    } | composed.document()


def copy_blocks(model: nn.Module) -> None:
    """The block copies of one forward, queued; no block runs."""
    manager = model.offload_manager
    manager.initialize()
    for index in range(len(manager.blocks)):
        manager.get_block(index)
        manager.step()


def _theirs(
    engine: Engine, model: nn.Module, files: Files, meter: Meter
) -> Iterator[dict[str, Any]]:
    if engine.name == "repack":
        return
    for action, steps in their_actions(engine, model, files):
        if action not in ("first", "strength", "reset"):
            continue
        row = {"engine": engine.name, "action": action}
        try:
            yield row | meter.measure(steps)
        except RuntimeError as error:
            yield row | {"skipped": f"fails: {str(error).splitlines()[0]}"}
    if getattr(model, "offload_manager", None) is None:
        return
    # Their layers then differ from the buffers, which keep the base's rank.
    engine.compose(model, [(files.first, 0.8)])
    row = {"engine": engine.name, "action": "block copies, composed"}
    try:
        yield row | meter.time(Action(lambda: copy_blocks(model))).document()
    except RuntimeError as error:
        yield row | {"skipped": f"fails: {str(error).splitlines()[0]}"}
    model.offload_manager.current_block_idx = 0
    engine.reset(model)
