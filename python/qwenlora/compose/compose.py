"""Bringing a model to exactly a given stack."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qwenlora import cache
from qwenlora.compose.journal import Journal, restore_all
from qwenlora.compose.leaving import Room, base_versions, groups_left, rest_beside
from qwenlora.compose.placer import Placer
from qwenlora.compose.reports import judge_refusals, lora_reports, slot_report
from qwenlora.compose.rescale import Placed, prepare_rescaling
from qwenlora.compose.structure import (
    forget_structure,
    found_structure,
    remember_structure,
    structure_of,
)
from qwenlora.compose.units import path_units
from qwenlora.delta.deltas import DeltaBuilder
from qwenlora.delta.slot_deltas import SlotDeltas
from qwenlora.errors import UnsupportedModelError
from qwenlora.group.builder import GroupBuilder
from qwenlora.group.deltas import GroupDeltas
from qwenlora.group.partition import Planned
from qwenlora.lora_set import LoraSet, Unmakeable
from qwenlora.memory import DeviceMemory
from qwenlora.model.find import transformer_of
from qwenlora.model.lock import lock_of
from qwenlora.model.offload import turn_on
from qwenlora.model.state import (
    EMPTY,
    AppliedState,
    SlotRecord,
    read_state,
    write_default,
    write_state,
)
from qwenlora.model.steps import forget_steps
from qwenlora.plan.documents import PieceKind, plan_stack
from qwenlora.report import ComposeReport, SlotReport, SlotReports
from qwenlora.slots.whole import slot_of
from qwenlora.spec import Placement

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence

    from torch import nn

    from qwenlora.compose.placer import Deltas
    from qwenlora.compose.structure import Structure
    from qwenlora.group.sets import KeptGroup
    from qwenlora.plan.documents import StackPlan
    from qwenlora.source.source import TensorFetcher
    from qwenlora.spec import ComposeOptions, Item, MaxRank

__all__ = ["applied", "bring", "compose_loras", "plan_report", "reset_loras"]


_log = logging.getLogger("qwenlora")


def compose_loras(
    model: nn.Module,
    loras: Item | Sequence[Item],
    *,
    max_rank: MaxRank = None,
    strict: bool = False,
    options: ComposeOptions | None = None,
) -> ComposeReport:
    """Bring the model to exactly this stack, whatever was applied before.

    The same stack again is no work. An empty stack, or strengths of 0 only, leaves the model
    bit-identical to one never touched.

    Args:
        model: A Nunchaku Qwen-Image transformer (or `qwenlora.emulation`'s).
        loras: One item or a list; an item is a path, a state dict, (either, strength), or a
            `LoraSpec`.
        max_rank: Most ranks that the LoRAs may add to a slot; what exceeds it, or the kernels'
            limit of 1024 with the base, is compressed near the optimum and the loss reported.
            None is exact up to the kernels' limit. "auto" weighs each slot's rank against the
            error: all of it is worth 5 % of the slot's energy, half of it half as much; a slot that
            would lose more stays exact (`qwenlora.delta.limit.AUTO_PRICE`).
        strict: Raise where a module would be left out, instead of reporting it.
        options: Everything else.

    Returns:
        What was done.

    Raises:
        LoraReadError: A file cannot be read, or changed meanwhile; `LoraNotFoundError` where there
            is none.
        LoraFileError: A file is malformed; `PickleFileError` where it is a pickle.
        OtherModelError: A LoRA is for another model.
        NothingToApplyError: Nothing of a LoRA can be applied.
        UnsupportedAdapterError: With `strict`, an adapter of a kind that is not supported.
        BrokenPairError: With `strict`, a module whose tensors are incomplete.
        ShapeMismatchError: With `strict`, a delta that does not fit the model.
        EnergyLossError: With `strict`, a delta whose truncation would lose too much.
        RankError: `max_rank` leaves nothing, or a slot has no room.
        NonFiniteError: A composed tensor would hold NaN or infinity.
        UnsupportedModelError: The model has no slots, or it is not known, or not understood.
        ModelStateError: Something else changed the model's slots.
    """
    model = transformer_of(model)
    wanted = LoraSet.of(loras, max_rank=max_rank, options=options)
    with lock_of(model):
        report = bring(model, wanted, strict=strict)
        # Tensors in memory are not kept alive for forwards that may never ask for them again.
        kept = all(source.cacheable for source in wanted.sources)
        write_default(model, wanted if kept else Unmakeable(wanted.key))
        return report


def bring(model: nn.Module, wanted: LoraSet, *, strict: bool = False) -> ComposeReport:
    """Bring a transformer, its lock held, to exactly this set; raises as `compose_loras` does."""
    if wanted.options.offload:
        turn_on(model)
    before = read_state(model)
    # Tensors that outlive the call must not be inference tensors, whatever mode the caller is in.
    with torch.inference_mode(False), torch.no_grad():
        try:
            return _Composition(model, wanted, strict=strict).run()
        finally:
            if read_state(model) is not before:
                forget_steps(model)


def reset_loras(model: nn.Module) -> ComposeReport:
    """Remove every LoRA: the model is bit-identical to one never touched.

    Raises:
        ModelStateError: Something else changed the model's slots.
    """
    return compose_loras(model, [])


def applied(model: nn.Module) -> ComposeReport:
    """The report of what is in the model now, checked against the model's tensors.

    Raises:
        ModelStateError: Something else changed the model's slots.
    """
    model = transformer_of(model)
    with lock_of(model):
        state = read_state(model)
        # What is remembered was looked at before.
        found_structure(model, state)
        return state.report


def plan_report(model: nn.Module, wanted: LoraSet) -> ComposeReport:
    """What composing a set would do, from its plan alone: no tensor is read, nothing is touched.

    Ranks and bytes are upper bounds; what only the data can tell (shared downs, zero deltas, energy
    lost) is in the report of the composition itself.

    Raises:
        OtherModelError: A LoRA is for another model.
        NothingToApplyError: Nothing of a LoRA can be applied.
        RankError: A slot has no room.
        UnsupportedModelError: The model has no slots.
    """
    model = transformer_of(model)
    with lock_of(model):
        structure = structure_of(model, read_state(model))
        _require_known(model, wanted, structure)
        planned = _plan(wanted, structure, strict=False)
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
    loras = lora_reports(wanted, planned, ())
    return ComposeReport(loras, slots, plan.added_bytes, 0.0, bus_bytes=bus)


def _plan(wanted: LoraSet, structure: Structure, *, strict: bool) -> Planned:
    options = wanted.options
    items = [
        (name, source.plan, spec.strength, options.modulation and spec.modulation)
        for name, spec, source in zip(wanted.names, wanted.specs, wanted.sources, strict=True)
    ]

    def plan() -> Planned:
        # What the data will show to be enough is not known yet; the exact sum bounds it.
        most = None if wanted.max_rank == "auto" else wanted.max_rank
        stack = plan_stack(items, structure.slot_map, max_rank=most, strict=strict, options=options)
        targets = list(structure.targets.values())
        return Planned(stack, targets, together=wanted.max_rank != "auto")

    # Strengths change no plan. File plans are compared as objects: the key keeps them alive.
    what = tuple((name, plan, modulation) for name, plan, _, modulation in items)
    settings = (options.truncated_rank, options.lokr_scale, wanted.max_rank, strict)
    return structure.remember((what, settings), plan)


def _require_known(model: nn.Module, wanted: LoraSet, structure: Structure) -> None:
    """Compose nothing on a model that is not in the tables, unless a part of it is asked for."""
    path = structure.unknown
    if path is None or not wanted.specs or wanted.options.unknown_model == "partial":
        return
    raise UnsupportedModelError(
        f"`{path}` is a quantized layer of a model that is not known: nothing is composed on this"
        f" {type(model).__name__}"
        "\nhint: known are Qwen-Image and the models of its family;"
        ' `ComposeOptions(unknown_model="partial")` applies what fits and lists the rest'
    )


class _Composition:
    """One call: everything is planned and checked before the model is touched."""

    def __init__(self, model: nn.Module, wanted: LoraSet, *, strict: bool) -> None:
        self._model = model
        self._wanted = wanted
        self._strict = strict
        self._started = time.perf_counter()
        self._memory = DeviceMemory()
        self._state = read_state(model)

    def run(self) -> ComposeReport:
        """Compose, or find that there is nothing to do."""
        wanted = self._wanted
        structure = self._structure()
        _require_known(self._model, wanted, structure)
        unchanged = wanted.key == self._state.stack and _fits(structure)
        if unchanged and not self._strict:
            return self._state.report
        # Also where the stack is in place already: what `strict` raises, it raises always.
        planned = _plan(wanted, structure, strict=self._strict)
        if unchanged:
            judge_refusals(self._state.report.loras, strict=self._strict)
            return self._state.report
        if not self._rescale(planned, structure):
            self._compose(planned, structure)
        report = read_state(self._model).report
        if _log.isEnabledFor(logging.INFO):
            _log.info("%s", report.summary())
        return report

    def _rescale(self, planned: Planned, structure: Structure) -> bool:
        """Change strengths alone, where nothing else differs and all that it takes is at hand."""
        placed, wanted = structure.placed, self._wanted
        rescaling = None if placed is None else prepare_rescaling(placed, planned, wanted)
        if rescaling is None:
            return False
        progress, done = wanted.options.progress, 0
        total = sum(len(own.group.targets) * len(own.layouts) for own in rescaling.placed.groups)

        def tell(slots: int) -> None:
            nonlocal done
            for _ in range(slots if progress is not None else 0):
                if progress is not None:
                    progress("write", done, total)
                done += 1

        journal = self._journal(structure)
        # Until all of it is done, nobody knows what strengths lie in the slots.
        structure.placed = None
        try:
            journal.begin()
            rescaling.make(tell)
            journal.done(self._rescaled_state())
        except BaseException:
            journal.begin()
            rescaling.unmake()
            journal.undone()
            structure.placed = placed
            raise
        finally:
            rescaling.close()
        structure.placed = rescaling.placed
        return True

    def _rescaled_state(self) -> AppliedState:
        before = self._state.report
        loras = tuple(
            replace(lora, strength=spec.strength)
            for lora, spec in zip(before.loras, self._wanted.specs, strict=True)
        )
        report = replace(before, loras=loras)
        return replace(self._state, stack=self._wanted.key, report=report)

    def _journal(self, structure: Structure) -> Journal:
        return Journal(self._model, structure, self._state, started=self._started)

    def _compose(self, planned: Planned, structure: Structure) -> None:
        # Until all of it is done, nobody knows what the slots hold.
        forget_structure(self._model)
        with contextlib.ExitStack() as closing:
            fetchers = self._open(closing)
            entering = self._entering(structure)
            needed = _needed(planned.plan, structure, entering.values())
            whole = self._is_whole(structure, needed)
            if not whole:
                # Path by path memory is short.
                entering, needed = {}, _needed(planned.plan, structure, ())
            units = path_units(planned, structure, self._state)
            if not whole:
                limit = self._wanted.options.staging_bytes
                units = [part for unit in units for part in unit.parts(limit)]
            groups = GroupBuilder(
                [group for unit in units for group in unit.groups],
                self._wanted.specs,
                self._wanted.sources,
                fetchers,
                self._wanted.options,
                kept=entering,
                needed=needed,
            )
            closing.callback(groups.close)
            # Where reading takes new pinned memory the driver answers nobody else.
            groups.ask(self._memory)
            # Before all that can be done while files are read.
            groups.begin()
            if not entering:
                structure.kept.check(base_versions(structure, self._state))
            leaving = self._leaving(planned, structure, needed) if whole else []
            options = rest_beside(self._wanted.options, leaving)
            groups.keep_within(options, self._memory)
            placer = Placer(
                units,
                planned.plan,
                self._builder(fetchers, options),
                groups,
                fetchers,
                options,
                self._journal(structure),
                leaving=leaving,
            )
            place = placer.whole if whole else placer.by_path
            place(lambda done: self._state_of(planned, structure, done))
            # After a failure nothing is composed, under no name.
            left = self._state.stack if self._state.records else EMPTY.stack
            structure.kept.put(left, leaving)
            structure.kept.watch(structure.ends())
        structure.placed = self._placed(planned, groups) if whole else None
        remember_structure(self._model, structure)

    def _open(self, closing: contextlib.ExitStack) -> list[TensorFetcher]:
        fetchers: list[TensorFetcher] = []
        for source in self._wanted.sources:
            fetchers.append(source.open())
            closing.callback(fetchers[-1].close)
        return fetchers

    def _entering(self, structure: Structure) -> Mapping[str, KeptGroup]:
        """What is kept of the set that is wanted."""
        cache.pieces.turn()
        cache.on_device.turn()
        structure.kept.watch(())
        if not structure.kept.holds(self._wanted.key):
            return {}
        structure.kept.check(base_versions(structure, self._state))
        return structure.kept.take(self._wanted.key)

    def _builder(self, fetchers: Sequence[TensorFetcher], options: ComposeOptions) -> DeltaBuilder:
        wanted = self._wanted
        return DeltaBuilder(
            wanted.specs, wanted.sources, fetchers, options, max_rank=wanted.max_rank
        )

    def _leaving(self, planned: Planned, structure: Structure, needed: int) -> list[KeptGroup]:
        """What the slots hold now, as far as there is room to keep it."""
        options, state = self._wanted.options, self._state
        room = Room(
            cache_bytes=options.cache_bytes,
            device_bytes=options.device_cache_bytes,
            deltas=sum(group.nbytes for group in planned.groups),
            needed=needed,
            memory=self._memory,
        )
        left = groups_left(structure, state, planned.paths | state.records.keys())
        return [own.kept() for own in room.choose(left, structure.kept)]

    def _placed(self, planned: Planned, groups: GroupBuilder) -> Placed | None:
        """How the groups lie in their slots, where they are all that there is."""
        stacks = [own for own in groups.placed if own.group.stacks]
        composed = sum(len(own.group.targets) - len(own.differing) for own in stacks)
        if not stacks or composed != len(read_state(self._model).records):
            return None
        strengths = tuple(spec.strength for spec in self._wanted.specs)
        return Placed(planned, strengths, stacks, groups.load_bytes)

    def _structure(self) -> Structure:
        """The model's slots, after cleaning up what an earlier call could not."""
        if self._state.in_flight:
            found = structure_of(self._model, self._state)
            restore_all(found.with_twins())
            forget_structure(self._model)
            self._state = EMPTY
            write_state(self._model, EMPTY)
        return structure_of(self._model, self._state)

    def _is_whole(self, structure: Structure, needed: int) -> bool:
        placement = self._wanted.options.placement
        if placement is not Placement.AUTO:
            return placement is Placement.WHOLE
        device = next(iter(structure.targets.values())).device
        if device.type != "cuda":
            return True
        needed += self._wanted.options.margin_bytes
        # What is kept there yields first.
        if self._memory.has(device, needed):
            return True
        cleared = cache.clear_devices()
        self._memory.changed()
        return cleared and self._memory.has(device, needed)

    def _state_of(
        self, planned: Planned, structure: Structure, done: Sequence[Deltas]
    ) -> AppliedState:
        """What is in the model when all of `done` is in place."""
        if not self._wanted.specs:
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
        loras = lora_reports(self._wanted, planned, singles)
        judge_refusals(loras, strict=self._strict)
        report = ComposeReport(
            loras=loras,
            slots=SlotReports(reports),
            added_bytes=added,
            bus_bytes=bus,
            saved_bytes=saved,
            saved_bus_bytes=saved_bus,
            seconds=0.0,
        )
        return AppliedState(stack=self._wanted.key, records=records, report=report)


def _needed(plan: StackPlan, structure: Structure, entering: Collection[KeptGroup]) -> int:
    """Device memory that composing takes, beyond what is there already.

    A new slot holds a second copy of its base until the old tensors are let go.
    """
    there = sum(kept.nbytes for kept in entering if not kept.on_host)
    return max(0, plan.added_bytes + structure.base_bytes - there)


def _fits(structure: Structure) -> bool:
    """Whether every offloaded slot can be copied into the buffers as they are now.

    Offload may be turned on after composing, which copies block 0 into new buffers.
    """
    rooms: dict[str, set[Hashable]] = defaultdict(set)
    for target in (*itertools.chain(*structure.offloaded.values()), *structure.twins):
        rooms[target.row.pattern].add(slot_of(target).room())
    return all(len(found) == 1 for found in rooms.values())
