"""Bringing a model to exactly a set: nothing, a change of strengths, or a composition."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qwenlora.compose.journal import restore_all
from qwenlora.compose.planning import planned_for, require_known
from qwenlora.compose.reports import judge_refusals
from qwenlora.compose.rescale import prepare_rescaling
from qwenlora.compose.steps import Task, compose
from qwenlora.compose.structure import forget_structure, structure_of
from qwenlora.errors import ScheduleError
from qwenlora.memory import DeviceMemory
from qwenlora.model.offload import turn_on
from qwenlora.model.state import EMPTY, AppliedState, read_state, write_state
from qwenlora.model.steps import forget_steps
from qwenlora.slots.whole import slot_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import nn

    from qwenlora.compose.structure import Structure
    from qwenlora.lora_set import LoraSet
    from qwenlora.report import ComposeReport

__all__ = ["bring", "fits"]

_log = logging.getLogger("qwenlora")


def bring(model: nn.Module, wanted: LoraSet, *, strict: bool = False) -> ComposeReport:
    """Bring a transformer, its lock held, to exactly this set; raises as `compose_loras` does."""
    _require_resolved(wanted)
    if wanted.options.offload:
        turn_on(model)
    before = read_state(model)
    # Tensors that outlive the call must not be inference tensors, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad():
        try:
            return _brought(model, wanted, strict=strict)
        finally:
            if read_state(model) is not before:
                forget_steps(model)


def _require_resolved(wanted: LoraSet) -> None:
    """Compose nothing whose strengths depend on how far sampling is, which is not known here."""
    for name, spec in zip(wanted.names, wanted.specs, strict=True):
        if spec.schedule is not None:
            raise ScheduleError(
                f"`{name}` has a schedule, and nothing tells how far sampling is"
                "\nhint: set `course` of the model's ComfyQwenImageWrapper, or compose one step's"
                " strengths with `LoraSpec.at(share)`"
            )


def _brought(model: nn.Module, wanted: LoraSet, *, strict: bool) -> ComposeReport:
    """Plan and check everything, then touch the model."""
    started = time.perf_counter()
    before = _cleaned(model)
    structure = structure_of(model, before)
    require_known(model, wanted, structure)
    unchanged = wanted.key == before.stack and fits(structure)
    if unchanged and not strict:
        return before.report
    # Also where the stack is in place already: what `strict` raises, it raises always.
    planned = planned_for(wanted, structure, strict=strict)
    if unchanged:
        judge_refusals(before.report.loras, strict=strict)
        return before.report
    memory = DeviceMemory()
    task = Task(model, wanted, planned, structure, before, memory, strict=strict, started=started)
    if not _rescaled(task):
        compose(task)
    report = read_state(model).report
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s", report.summary())
    return report


def _cleaned(model: nn.Module) -> AppliedState:
    """The record of what is in place, after cleaning up what an earlier call could not."""
    state = read_state(model)
    if not state.in_flight:
        return state
    found = structure_of(model, state)
    restore_all(found.with_twins())
    forget_structure(model)
    write_state(model, EMPTY)
    return EMPTY


def _rescaled(task: Task) -> bool:
    """Change strengths alone, where nothing else differs and all that it takes is at hand.

    Returns:
        Whether that was possible.
    """
    structure, placed = task.structure, task.structure.placed
    if placed is None:
        return False
    rescaling = prepare_rescaling(placed, task.planned, task.wanted)
    if rescaling is None:
        return False
    # Until all of it is done, nobody knows what strengths lie in the slots.
    structure.placed = None
    with contextlib.closing(rescaling):
        try:
            task.journal().write([rescaling], _rescaled_state(task))
        except BaseException:
            # An interruption that comes behind the last write leaves the new strengths.
            if read_state(task.model) is task.before:
                structure.placed = placed
            raise
    structure.placed = rescaling.placed
    return True


def _rescaled_state(task: Task) -> AppliedState:
    before = task.before.report
    loras = tuple(
        replace(
            lora,
            strength=spec.strength,
            blocks=str(spec.factors),
            blocks_note=spec.factors.outside(task.structure.block_count),
        )
        for lora, spec in zip(before.loras, task.wanted.specs, strict=True)
    )
    report = replace(before, loras=loras)
    return replace(task.before, stack=task.wanted.key, report=report)


def fits(structure: Structure) -> bool:
    """Tell if every offloaded slot can be copied into the buffers as they are now.

    Offload may be turned on after composing, which copies block 0 into new buffers.
    """
    rooms: dict[str, set[Hashable]] = defaultdict(set)
    for target in (*itertools.chain(*structure.offloaded.values()), *structure.twins):
        rooms[target.row.pattern].add(slot_of(target).room())
    return all(len(found) == 1 for found in rooms.values())
