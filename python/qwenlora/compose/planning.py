"""A plan for a set on the model at hand, and the report that follows from it alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from qwenlora.compose.reports import lora_reports, planned_inexact, require_blocks
from qwenlora.compose.structure import structure_of
from qwenlora.errors import UnsupportedModelError
from qwenlora.group.partition import Division, Partition, chosen_division
from qwenlora.model.lock import lock_of
from qwenlora.model.state import read_state
from qwenlora.model.transformer import transformer_of
from qwenlora.plan.documents import PieceKind, StackItem, plan_stack
from qwenlora.report import ComposeReport, SlotReport, SlotReports

if TYPE_CHECKING:
    from torch import nn

    from qwenlora.compose.structure import Structure
    from qwenlora.lora_set import LoraSet

__all__ = ["Outlook", "look_ahead", "plan_report", "planned_for", "require_known"]


class Outlook(NamedTuple):
    """What composing a set would do, by its plan.

    Attributes:
        report: The report. Ranks and bytes are upper bounds; what only the data can tell (shared
            downs, zero deltas, energy lost) is in the report of the composition itself.
        targets: The modules whose deltas would be applied, as LoRAs call them.
    """

    report: ComposeReport
    targets: frozenset[str]


def plan_report(model: nn.Module, wanted: LoraSet) -> ComposeReport:
    """Report what composing a set would do; raises as `look_ahead` does."""
    return look_ahead(model, wanted).report


def look_ahead(model: nn.Module, wanted: LoraSet) -> Outlook:
    """Look at what composing a set would do, in its plan: no tensor is read or changed.

    Raises:
        OtherModelError: A LoRA is for another model.
        NothingToApplyError: Nothing of a LoRA can be applied.
        RankError: A slot has no room.
        UnsupportedModelError: The model has no slots.
    """
    model = transformer_of(model)
    with lock_of(model):
        structure = structure_of(model, read_state(model))
        require_known(model, wanted, structure)
        planned = planned_for(wanted, structure, strict=False)
    targets, plan = structure.targets, planned.plan
    slots = SlotReports.of(
        SlotReport(
            path=slot.path,
            kind=slot.kind.value,
            base_rank=slot.base_rank,
            rank=sum(piece.rank for piece in slot.pieces),
            rank_added=slot.rank,
            energy_lost=None,
            krons=sum(piece.kind is PieceKind.KRON for piece in slot.pieces),
            values=tuple({piece.parameter: None for piece in slot.pieces if piece.parameter}),
        )
        for slot in plan.slots
    )
    bus = sum(
        targets[slot.path].rank_bytes * slot.rank + slot.branch_bytes
        for slot in plan.slots
        if targets[slot.path].row.offloaded
    )
    loras = tuple(
        replace(lora, inexact=planned_inexact(index, planned, wanted.options))
        for index, lora in enumerate(
            lora_reports(wanted, planned, (), block_count=structure.block_count)
        )
    )
    report = ComposeReport(loras, slots, plan.added_bytes, 0.0, bus_bytes=bus)
    # Many LoRAs have the same modules.
    modules = (sys.intern(piece.target) for slot in plan.slots for piece in slot.pieces)
    return Outlook(report, frozenset(modules))


def planned_for(wanted: LoraSet, structure: Structure, *, strict: bool) -> Partition:
    """The set's plan on these slots; remembered, since strengths change no plan.

    Raises:
        BlockFactorsError: With `strict`, `LoraSpec.blocks` names blocks that the model lacks.
    """
    if strict:
        require_blocks(wanted, structure.block_count)
    options = wanted.options
    items = [
        StackItem(
            name=name,
            plan=source.plan,
            strength=spec.strength,
            modulation=options.modulation and spec.modulation,
            off=spec.factors.zeros(structure.targets),
        )
        for name, spec, source in zip(wanted.names, wanted.specs, wanted.sources, strict=True)
    ]

    # Each slot has a rank of its own where the data decide it.
    division = Division.APART if wanted.max_rank == "auto" else chosen_division()

    def plan() -> Partition:
        # What the data will show to be enough is not known yet; the exact sum bounds it.
        most = None if wanted.max_rank == "auto" else wanted.max_rank
        stack = plan_stack(items, structure.slot_map, max_rank=most, strict=strict, options=options)
        targets = list(structure.targets.values())
        return Partition(stack, targets, division=division)

    # Strengths change no plan. File plans are compared as objects: the key keeps them alive.
    what = tuple((own.name, own.plan, own.modulation, tuple(own.off)) for own in items)
    settings = (
        options.truncated_rank,
        options.lokr_scale,
        options.mlp,
        options.dense_budget,
        wanted.max_rank,
        strict,
        division,
    )
    return structure.remember((what, settings), plan)


def require_known(model: nn.Module, wanted: LoraSet, structure: Structure) -> None:
    """Compose nothing on a model that is not in the tables, unless a part of it is asked for."""
    path = structure.unknown
    if path is None or not wanted.specs or wanted.options.unknown_model == "partial":
        return
    raise UnsupportedModelError(
        f"`{path}` is a quantized layer of a model that is not known: nothing is composed on this"
        f" {type(model).__name__}"
        "\nhint: known are Qwen-Image, Z-Image and the models of their families;"
        ' `ComposeOptions(unknown_model="partial")` applies what fits and lists the rest'
    )
