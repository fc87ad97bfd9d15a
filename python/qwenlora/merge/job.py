"""Merging: slot by slot read, join, round and write."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.finite import damaged, is_finite, non_finite_in
from qwenlora.delta.pieces import is_zero, read_pieces
from qwenlora.delta.strength import factor_at
from qwenlora.errors import NonFiniteError, NothingToApplyError
from qwenlora.lora_set import LoraSet
from qwenlora.merge.balanced import round_pair, value_dtype
from qwenlora.merge.base import MergeBase
from qwenlora.merge.based_member import BasedDelta, BasedMember, needs_base
from qwenlora.merge.combine import Joined, combine
from qwenlora.merge.diffs import Value, is_value, replaced_value, sum_values
from qwenlora.merge.folder import check_folder, folder_notes
from qwenlora.merge.member import Member
from qwenlora.merge.needed import scaled_bias, scales_bias
from qwenlora.merge.output import atomic_file, check_output
from qwenlora.merge.plan import PREFIX, MergePlan, covers, pair_shapes
from qwenlora.merge.report import BaseReport, MergeReport, ModuleReport, metadata_of
from qwenlora.merge.writer import SafetensorsWriter
from qwenlora.report import THIRDED, LoraReport
from qwenlora.source.checkpoint import files_of
from qwenlora.source.dtypes import NAMES

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.merge.known import KnownSlot
    from qwenlora.merge.member import ModuleDelta
    from qwenlora.merge.plan import MergeOptions
    from qwenlora.plan.documents import Piece, SlotPlan
    from qwenlora.source.source import TensorFetcher
    from qwenlora.spec import LoraSpec

__all__ = ["merge_loras"]

Progress = Callable[[int, int], None]
"""Called as `progress(done, all)` before each slot."""
Note = Callable[[str], None]
"""Called with what is worth knowing before the work begins."""


def merge_loras(
    specs: Sequence[LoraSpec] | LoraSet,
    output: Path,
    options: MergeOptions,
    *,
    progress: Progress = lambda _done, _all: None,
    note: Note = lambda _text: None,
    known: Mapping[str, KnownSlot] | None = None,
) -> MergeReport:
    """Write the sum of LoRAs at their strengths as one LoRA file.

    The tensors of one slot are in memory at a time.

    Args:
        specs: Files and PEFT folders with strengths; at least one is not 0. Or a set: its files
            must be as they were when it was made, and `options` counts where its own differ.
        output: The file to write.
        options: How.
        progress: Called before each slot.
        note: Called with what is worth knowing before the work begins.
        known: The model's slots by path; by default those of the released model that the sources
            are for.

    Returns:
        What was written.

    Raises:
        LoraReadError: A source cannot be read, or changed meanwhile.
        LoraFileError: A source is malformed.
        OtherModelError: A source is for a model that is not known, or for another one than the
            sources before it, or than the base; or the base is of none that is known.
        UnknownWeightError: A layer of the base is damaged.
        NothingToApplyError: Nothing of a source can be merged, or the sum is zero.
        NonFiniteError: A tensor would hold NaN or infinity.
        OutputError: The file must not, or cannot, be written.
    """
    started = time.perf_counter()
    files = [] if options.base is None else files_of(options.base).files
    named = specs.specs if isinstance(specs, LoraSet) else specs
    check_output(output, [*_paths(named), *files], force=options.force)
    read = _paths([spec for spec in named if spec.strength != 0])
    for path in read:
        check_folder(path)
    with contextlib.ExitStack() as closing, torch.no_grad():
        base = None
        if options.base is not None:
            base = closing.enter_context(contextlib.closing(MergeBase(options.base)))
        plan = MergePlan.of(specs, options, known=known, base=base)
        for text in (*itertools.chain(*map(folder_notes, read)), *plan.notes()):
            note(text)
        fetchers = []
        for source in plan.sources:
            fetchers.append(source.open())
            closing.callback(fetchers[-1].close)
        file = closing.enter_context(atomic_file(output))
        job = _Job(plan, fetchers)
        writer = SafetensorsWriter(file, output, plan.bounds(), job.greatest_metadata())
        for done, slot in enumerate(plan.slots):
            progress(done, len(plan.slots))
            job.write(slot, writer)
        for fetcher in fetchers:
            fetcher.finish()
        if base is not None:
            base.finish()
        report = job.report(output, writer.size, time.perf_counter() - started)
        if not report.modules and not report.values:
            raise NothingToApplyError("the sum of all deltas is zero: nothing is left to write")
        writer.finish(job.metadata())
    return report


def _paths(specs: Sequence[LoraSpec]) -> list[Path]:
    """The files and folders that are named, each once."""
    sources = (spec.source for spec in specs)
    return list(dict.fromkeys(Path(s) for s in sources if not isinstance(s, Mapping)))


class _Job:
    """A merge under way: what has been written, and what has been found."""

    def __init__(self, plan: MergePlan, fetchers: Sequence[TensorFetcher]) -> None:
        self._plan = plan
        self._fetchers = fetchers
        self._modules: list[ModuleReport] = []
        self._values: list[str] = []
        self._zero: list[str] = []
        self._vanished: list[str] = []
        self._zero_deltas: dict[int, list[str]] = defaultdict(list)
        self._with_deltas: set[int] = set()
        self._thirded: set[int] = set()

    def greatest_metadata(self) -> dict[str, str]:
        """The metadata, no entry shorter than it will be."""
        plan = self._plan
        bounds = plan.rank_bounds().items()
        modules = [ModuleReport(path, rank, None, 0.0) for path, rank in bounds]
        return metadata_of(
            self._loras(),
            modules,
            plan.options.cut,
            plan.inherited,
            has_ranks=True,
            base=self._base_report(),
        )

    def metadata(self) -> dict[str, str]:
        """The metadata of what has been written."""
        ranks = {module.rank for module in self._modules}
        plan = self._plan
        return metadata_of(
            self._loras(),
            self._modules,
            plan.options.cut,
            plan.inherited,
            has_ranks=len(ranks) > 1,
            base=self._base_report(),
        )

    def write(self, slot: SlotPlan, writer: SafetensorsWriter) -> None:
        """Read, join and write all modules of a slot."""
        known = self._plan.known[slot.path]
        read = [
            row
            for lora, fetcher in enumerate(self._fetchers)
            for row in read_pieces([p for p in slot.pieces if p.lora == lora], fetcher)
        ]
        based = self._based(read, slot)
        weights = [row for row in read if not is_value(row[0], slot)]
        for path, rows in known.rows.items():
            members = [
                self._member(*row, rows, based.get(id(row[0])))
                for row in weights
                if covers(row[0], rows)
            ]
            if members:
                self._write_pair(path, members, known.sides, writer)
        if self._plan.options.diffs:
            values = list(self._slot_values(read, based, slot))
            self._with_deltas |= {value.piece.lora for value in values}
            self._write_values(sum_values(values, known), writer)

    def _based(
        self, read: Sequence[tuple[Piece, dict[str, Tensor]]], slot: SlotPlan
    ) -> dict[int, BasedDelta]:
        """The deltas that are made of the base weight, by the identity of their pieces."""
        base = self._plan.base
        own = [row for row in read if needs_base(row[0]) and not is_value(row[0], slot)]
        if base is None or not own:
            return {}
        weight = base.weight(self._plan.known[slot.path])
        return {id(piece): BasedDelta(piece, tensors, weight) for piece, tensors in own}

    def _slot_values(
        self,
        read: Sequence[tuple[Piece, dict[str, Tensor]]],
        based: Mapping[int, BasedDelta],
        slot: SlotPlan,
    ) -> Iterator[Value]:
        """The deltas of stored values in a slot."""
        base, known = self._plan.base, self._plan.known[slot.path]
        for piece, tensors in read:
            strength = self._strength(piece)
            if is_value(piece, slot):
                if needs_base(piece) and base is not None:
                    with self._naming(piece.lora):
                        piece, tensors = replaced_value(piece, tensors, base.value(known))
                yield Value(piece, tensors, strength)
            elif scales_bias(piece) and base is not None:
                rows = (piece.row_begin, piece.row_begin + piece.row_count)
                if not base.has_bias(known, rows):
                    continue
                with self._naming(piece.lora):
                    made = based[id(piece)].made
                assert made.diagonal is not None, "it scales the bias"
                delta = made.diagonal.values.double() * base.bias(known, rows)
                yield Value(scaled_bias(piece), {"vector": delta}, strength)

    @contextlib.contextmanager
    def _naming(self, lora: int) -> Iterator[None]:
        """Say in an error on values which source has them, where there are several."""
        try:
            yield
        except NonFiniteError as error:
            if len(self._plan.names) == 1:
                raise
            raise NonFiniteError(f"`{self._plan.names[lora]}`: {error}") from error

    def report(self, output: Path, size_bytes: int, seconds: float) -> MergeReport:
        """The report of a merge whose file is written."""
        inherited = self._plan.inherited
        dropped = [
            tuple(name for at, name in inherited.dropped if at == lora)
            for lora in range(len(inherited.listed))
        ]
        return MergeReport(
            path=str(output),
            size_bytes=size_bytes,
            dtype=NAMES[self._plan.dtype],
            loras=self._loras(),
            modules=tuple(self._modules),
            values=tuple(self._values),
            zero=tuple(self._zero),
            vanished=tuple(self._vanished),
            seconds=seconds,
            metadata_kept=tuple(inherited.kept),
            metadata_listed=tuple(map(tuple, inherited.listed)),
            metadata_dropped=tuple(dropped),
            base=self._base_report(),
        )

    def _base_report(self) -> BaseReport | None:
        """What was read of the base; None where nothing was."""
        base, needed = self._plan.base, self._plan.needed
        if base is None or not needed.modules:
            return None
        return BaseReport(base.name, base.form.value, len(needed.modules), len(needed.estimated))

    def _loras(self) -> tuple[LoraReport, ...]:
        plan = self._plan
        return tuple(
            LoraReport(
                name=plan.names[index],
                strength=spec.strength,
                modules_applied=plan.applied[index],
                skipped=tuple(skip for skip in plan.skipped if skip.lora == index),
                notes=(*source.plan.notes, *((THIRDED,) if index in self._thirded else ())),
                zero_slots=tuple(self._zero_deltas[index]),
                all_zero=index not in self._with_deltas,
                blocks=str(spec.factors),
                blocks_note=spec.factors.outside(plan.block_count),
            )
            for index, (spec, source) in enumerate(zip(plan.specs, plan.sources, strict=True))
        )

    def _strength(self, piece: Piece) -> float:
        return self._plan.specs[piece.lora].strength_at(piece.target)

    def _member(
        self,
        piece: Piece,
        tensors: dict[str, Tensor],
        rows: tuple[int, int],
        delta: BasedDelta | None,
    ) -> ModuleDelta:
        if delta is not None:
            begin, count = rows[0] - piece.row_begin, rows[1] - rows[0]
            return BasedMember(delta, self._strength(piece), begin, count)
        factor = factor_at(piece.scale, self._strength(piece))
        member = Member(piece, tensors, factor, rows[0] - piece.row_begin, rows[1] - rows[0])
        if member.is_thirded:
            self._thirded.add(piece.lora)
        return member

    def _write_pair(
        self,
        path: str,
        members: Sequence[ModuleDelta],
        sides: tuple[int, int],
        writer: SafetensorsWriter,
    ) -> None:
        own = []
        for member in members:
            with self._naming(member.piece.lora):
                is_none = member.is_zero
            if is_none:
                self._zero_deltas[member.piece.lora].append(path)
            else:
                self._with_deltas.add(member.piece.lora)
                own.append(member)
        joined = self._joined(path, own, sides) if own else None
        if joined is None or is_zero(joined.down, joined.up):
            self._zero.append(path)
            return
        pair = round_pair(joined, self._plan.dtype)
        for half in (pair.down, pair.up):
            self._check_finite(path, half, own)
        if is_zero(pair.down, pair.up):
            self._vanished.append(path)
            return
        shapes = pair_shapes(path, (sides[0], joined.rank, sides[1]), self._plan.dtype)
        for (key, _, _), tensor in zip(shapes, (pair.down, pair.up, pair.alpha), strict=True):
            writer.add(key, tensor)
        self._modules.append(ModuleReport(path, joined.rank, joined.energy, joined.energy_lost))

    def _joined(self, path: str, members: Sequence[ModuleDelta], sides: tuple[int, int]) -> Joined:
        try:
            return combine(members, sides, self._plan.options.cut)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise self._not_finite(path, members) from error

    def _check_finite(self, path: str, rounded: Tensor, members: Sequence[ModuleDelta]) -> None:
        if not is_finite(rounded):
            raise self._not_finite(path, members)

    def _write_values(self, sums: Mapping[str, Tensor], writer: SafetensorsWriter) -> None:
        for key, values in sums.items():
            rounded = values.to(value_dtype(values, self._plan.dtype))
            self._check_finite(key, rounded, ())
            if bool(rounded.any()):
                writer.add(PREFIX + key, rounded)
                self._values.append(key)
            else:
                (self._vanished if bool(values.any()) else self._zero).append(key)

    def _not_finite(self, path: str, members: Sequence[ModuleDelta]) -> NonFiniteError:
        for member in members:
            if not member.is_finite:
                name = self._plan.names[member.piece.lora]
                return damaged(path, f"`{name}`")
        hint = "a strength is too high, or the dtype too narrow (`--dtype bf16`, `fp32`)"
        return non_finite_in(path, NAMES[self._plan.dtype], hint=hint)
