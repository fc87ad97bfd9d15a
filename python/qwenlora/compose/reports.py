"""The report of a composition."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qwenlora.errors import BlockFactorsError, EnergyLossError, NothingToApplyError
from qwenlora.model.state import EMPTY, AppliedState, SlotRecord
from qwenlora.plan.documents import PieceKind, Skip, SlotKind
from qwenlora.report import (
    THIRDED,
    TURNED_OFF,
    ComposeReport,
    Exactness,
    Inexact,
    LoraReport,
    SlotReport,
    SlotReports,
)
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from qwenlora.compose.structure import Structure
    from qwenlora.delta.outcome import SlotOutcome
    from qwenlora.group.partition import Partition
    from qwenlora.lora_set import LoraSet
    from qwenlora.plan.documents import StackPlan
    from qwenlora.spec import ComposeOptions, LoraSpec

__all__ = [
    "judge_refusals",
    "lora_reports",
    "planned_inexact",
    "require_blocks",
    "slot_report",
    "state_of",
]


def state_of(
    wanted: LoraSet,
    planned: Partition,
    structure: Structure,
    done: Sequence[SlotOutcome],
    *,
    strict: bool,
) -> AppliedState:
    """The record of a model with all of `done` in place.

    Raises:
        EnergyLossError: With `strict`, a delta is left out for what it would lose.
        NothingToApplyError: Nothing of a LoRA is left.
    """
    if not wanted.specs:
        return EMPTY
    records: dict[str, SlotRecord] = {}
    reports: list[tuple[SlotReport, Mapping[str, int]]] = []
    added = bus = saved = saved_bus = 0
    # Buffer blocks belong to their manager, which may be replaced at any time: not recorded.
    for outcome in done:
        row = outcome.targets[0].row
        if not outcome.composed or row.path not in structure.targets:
            continue
        paths = [target.path for target in outcome.targets]
        records |= dict.fromkeys(paths, SlotRecord(row.base_rank, outcome.rank_added))
        reports.append((slot_report(outcome), {p: structure.order[p] for p in paths}))
        added += outcome.nbytes
        saved += outcome.saved_bytes
        if row.offloaded:
            bus += outcome.nbytes
            saved_bus += outcome.saved_bytes
    loras = lora_reports(wanted, planned, done, block_count=structure.block_count)
    judge_refusals(loras, strict=strict)
    report = ComposeReport(
        loras=loras,
        slots=SlotReports(reports),
        added_bytes=added,
        bus_bytes=bus,
        saved_bytes=saved,
        saved_bus_bytes=saved_bus,
        seconds=0.0,
    )
    return AppliedState(stack=wanted.key, records=records, report=report)


def slot_report(outcome: SlotOutcome) -> SlotReport:
    """The report of one slot; of several that are alike, of the first."""
    target = outcome.targets[0]
    return SlotReport(
        path=target.path,
        kind=target.kind.value,
        base_rank=target.row.base_rank,
        rank=outcome.rank,
        rank_added=outcome.rank_added,
        energy_lost=outcome.energy_lost,
        energy=outcome.energy,
        energy_is_bound=outcome.energy_is_bound,
        rank_exact=outcome.rank_exact,
        krons=outcome.krons,
        dense=outcome.dense,
        values=outcome.values,
    )


def lora_reports(
    wanted: LoraSet, planned: Partition, done: Sequence[SlotOutcome], *, block_count: int
) -> tuple[LoraReport, ...]:
    """One report for each LoRA.

    Args:
        wanted: The set.
        planned: Its plan.
        done: The slots of which there is something to report.
        block_count: How many numbered blocks the model has.
    """
    plan = planned.plan
    reports = []
    for index, (spec, source) in enumerate(zip(wanted.specs, wanted.sources, strict=True)):
        zero = tuple(d.targets[0].path for d in done if index in d.zero)
        refused = _refused(index, plan, done)
        skipped = (skip for skip in plan.skipped if skip.lora == index)
        notes = list(source.plan.notes)
        if any(index in outcome.thirded for outcome in done):
            notes.append(THIRDED)
        reports.append(
            LoraReport(
                name=wanted.names[index],
                strength=spec.strength,
                modules_applied=plan.applied_modules[index] - len(refused),
                skipped=(*(_with_wish(skip, spec, wanted.options) for skip in skipped), *refused),
                notes=tuple(notes),
                zero_slots=zero,
                all_zero=bool(zero) and len(zero) == planned.held.get(index, 0),
                blocks=str(spec.factors),
                blocks_note=spec.factors.outside(block_count),
                inexact=_inexact(index, planned, done, {skip.name for skip in refused}),
                schedule=str(spec.course),
            )
        )
    return tuple(reports)


def planned_inexact(lora: int, planned: Partition, options: ComposeOptions) -> tuple[Inexact, ...]:
    """The modules of a LoRA that the plan alone says are not exact."""
    words = {"truncated": Exactness.TRUNCATED}
    if options.norms is None:
        words["norms"] = Exactness.NORMS_ESTIMATED
    return tuple(
        Inexact(piece.target, words[piece.exactness].value)
        for _, plan in planned.single
        for piece in plan.pieces
        if piece.lora == lora
        and piece.exactness in words
        and plan.kind in (SlotKind.SVDQ, SlotKind.AWQ)
    )


def _inexact(
    lora: int, planned: Partition, done: Sequence[SlotOutcome], refused: Collection[str]
) -> tuple[Inexact, ...]:
    """The modules of a LoRA that are in the model, and not exactly."""
    estimated = {module for outcome in done for index, module in outcome.estimated if index == lora}
    lost = {
        target.path: outcome.energy_lost
        for outcome in done
        for target in outcome.targets
        if outcome.energy_lost is not None
    }
    if not estimated and not lost:
        return ()
    found: dict[str, Inexact] = {}
    for _, plan in planned.single:
        for piece in plan.pieces:
            if piece.lora != lora or piece.parameter is not None or piece.target in refused:
                continue
            if plan.path in lost:
                what = Exactness.TRUNCATED.value
                found[piece.target] = Inexact(piece.target, what, lost[plan.path])
            elif piece.target in estimated:
                what = Exactness.NORMS_ESTIMATED.value
                found.setdefault(piece.target, Inexact(piece.target, what))
    return tuple(found.values())


def _with_wish(skip: Skip, spec: LoraSpec, options: ComposeOptions) -> Skip:
    """Say who wished for what is turned off."""
    if skip.kind != TURNED_OFF:
        return skip
    if spec.factors.factor(skip.name) == 0:
        return replace(skip, reason=f'{skip.reason}: `LoraSpec(blocks="{spec.factors}")`')
    by_all = "" if options.modulation else "`ComposeOptions(modulation=False)`"
    by_one = "" if spec.modulation else "`LoraSpec(modulation=False)`"
    wish = " and ".join(filter(None, (by_all, by_one)))
    return replace(skip, reason=f"{skip.reason}: {wish}")


def _refused(lora: int, plan: StackPlan, done: Sequence[SlotOutcome]) -> tuple[Skip, ...]:
    """The modules that were refused for their data."""
    return tuple(
        Skip(
            lora=lora,
            name=refusal.target,
            kind="energy",
            reason=refusal.reason,
            piece=PieceKind.DENSE.value,
            matters=True,
        )
        for outcome in done
        for index, refusal in outcome.refused
        if index == lora
    )


def require_blocks(wanted: LoraSet, block_count: int) -> None:
    """Check that the model has all blocks that the LoRAs' factors name.

    Raises:
        BlockFactorsError: It lacks some.
    """
    for name, spec in zip(wanted.names, wanted.specs, strict=True):
        missing = spec.factors.outside(block_count)
        if missing:
            raise BlockFactorsError(
                f"`{name}`: {missing}\nhint: strict=False applies the factors of the others"
            )


def judge_refusals(loras: Sequence[LoraReport], *, strict: bool) -> None:
    """Raise what cannot, or must not, be passed over."""
    for lora in loras:
        refused = [skip for skip in lora.skipped if skip.kind == "energy"]
        if not refused:
            continue
        first = refused[0]
        if strict:
            raise EnergyLossError(
                f"`{lora.name}`: `{first.name}` would be left out: {first.reason}"
                "\nhint: strict=False applies the rest"
            )
        if lora.modules_applied == 0:
            raise NothingToApplyError(
                f"nothing of `{lora.name}` can be applied:"
                f" {counted(len(refused), 'module is', 'modules are')} left out, the first"
                f" `{first.name}`: {first.reason}"
            )
