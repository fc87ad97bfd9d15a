"""The report of a composition."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qwenlora.delta.slot_deltas import SlotDeltas
from qwenlora.errors import EnergyLossError, NothingToApplyError
from qwenlora.group.deltas import GroupDeltas
from qwenlora.model.state import EMPTY, AppliedState, SlotRecord
from qwenlora.plan.documents import PieceKind, Skip
from qwenlora.report import THIRDED, TURNED_OFF, ComposeReport, LoraReport, SlotReport, SlotReports
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qwenlora.compose.placer import Deltas
    from qwenlora.compose.structure import Structure
    from qwenlora.group.partition import Planned
    from qwenlora.lora_set import LoraSet
    from qwenlora.plan.documents import StackPlan
    from qwenlora.spec import ComposeOptions, LoraSpec

__all__ = ["judge_refusals", "lora_reports", "slot_report", "state_of"]


def state_of(
    wanted: LoraSet,
    planned: Planned,
    structure: Structure,
    done: Sequence[Deltas],
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
    for deltas in done:
        targets = deltas.targets if isinstance(deltas, GroupDeltas) else (deltas.target,)
        row = targets[0].row
        if not deltas.composed or row.path not in structure.targets:
            continue
        paths = [target.path for target in targets]
        records |= dict.fromkeys(paths, SlotRecord(row.base_rank, deltas.rank_added))
        reports.append((slot_report(deltas), {p: structure.order[p] for p in paths}))
        added += deltas.nbytes
        saved += deltas.saved_bytes
        if row.offloaded:
            bus += deltas.nbytes
            saved_bus += deltas.saved_bytes
    singles = [deltas for deltas in done if isinstance(deltas, SlotDeltas)]
    loras = lora_reports(wanted, planned, singles)
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


def slot_report(deltas: Deltas) -> SlotReport:
    """One slot's lines of the report."""
    target = deltas.targets[0] if isinstance(deltas, GroupDeltas) else deltas.target
    report = SlotReport(
        path=target.path,
        kind=target.kind.value,
        base_rank=target.row.base_rank,
        rank=deltas.rank,
        rank_added=deltas.rank_added,
        energy_lost=None,
        rank_exact=deltas.rank_added,
    )
    if isinstance(deltas, GroupDeltas):
        return report
    return replace(
        report,
        energy_lost=deltas.energy_lost,
        energy=deltas.energy,
        energy_is_bound=deltas.energy_is_bound,
        rank_exact=deltas.rank_exact,
        krons=deltas.kron_count,
        dense=deltas.dense_held,
        values=tuple(deltas.values),
    )


def lora_reports(
    wanted: LoraSet, planned: Planned, done: Sequence[SlotDeltas]
) -> tuple[LoraReport, ...]:
    """What became of each LoRA; `done` holds the slots of which there is something to tell."""
    plan = planned.plan
    reports = []
    for index, (spec, source) in enumerate(zip(wanted.specs, wanted.sources, strict=True)):
        zero = tuple(d.target.path for d in done if index in d.zero)
        refused = _refused(index, plan, done)
        skipped = (skip for skip in plan.skipped if skip.lora == index)
        notes = list(source.plan.notes)
        if any(index in deltas.thirded for deltas in done):
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
            )
        )
    return tuple(reports)


def _with_wish(skip: Skip, spec: LoraSpec, options: ComposeOptions) -> Skip:
    """Say who wished for what is turned off."""
    if skip.kind != TURNED_OFF:
        return skip
    by_all = "" if options.modulation else "`ComposeOptions(modulation=False)`"
    by_one = "" if spec.modulation else "`LoraSpec(modulation=False)`"
    wish = " and ".join(filter(None, (by_all, by_one)))
    return replace(skip, reason=f"{skip.reason}: {wish}")


def _refused(lora: int, plan: StackPlan, done: Sequence[SlotDeltas]) -> tuple[Skip, ...]:
    """What only the data could refuse."""
    return tuple(
        Skip(
            lora=lora,
            name=refusal.target,
            kind="energy",
            reason=refusal.reason,
            piece=PieceKind.DENSE.value,
            matters=True,
        )
        for deltas in done
        for index, refusal in deltas.refused
        if index == lora
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
