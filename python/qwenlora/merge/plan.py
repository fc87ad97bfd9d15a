"""The plan of a merge: sources planned on the slots of their released model; no tensor is read."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qwenlora.blocks import count_blocks
from qwenlora.console import size
from qwenlora.errors import NothingToApplyError, OtherModelError, ScheduleError
from qwenlora.lora_set import LoraSet
from qwenlora.merge.balanced import ALPHA_DTYPE
from qwenlora.merge.diffs import is_value, value_keys
from qwenlora.merge.known import KnownSlot, known_slots
from qwenlora.merge.member import has_full_rank, rank_bound
from qwenlora.merge.metadata import Inherited, inherit
from qwenlora.merge.needed import (
    BASELESS,
    DIFFS_REASON,
    VALUE,
    Needed,
    base_values,
    split_by_base,
)
from qwenlora.plan.documents import Skip, SlotPlan, StackItem, plan_stack, slot_map
from qwenlora.source.dtypes import DTYPES
from qwenlora.spec import ComposeOptions, LokrScale, LoraSpec
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from qwenlora.merge.base import MergeBase
    from qwenlora.merge.cut import Cut
    from qwenlora.merge.writer import TensorShape
    from qwenlora.plan.documents import Piece
    from qwenlora.source.source import LoraSource

__all__ = [
    "PREFIX",
    "MergeOptions",
    "MergePlan",
    "carrying",
    "common_model",
    "covers",
    "pair_shapes",
]

PREFIX = "diffusion_model."
"""The beginning of every key."""
_ANY_MODEL = "qwen-image"
"""On its slots files are planned that are for no known model, to be refused."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The options of a merge.

    Attributes:
        cut: How each module's sum is truncated; None is exact.
        dtype: Dtype of what is written; None is the narrowest that holds all of the sources'.
        diffs: Whether deltas of biases, norms and tables are written, too.
        force: Whether a file that is there is replaced.
        lokr_scale: The factor of a LoKr whose factors are both stored whole.
        base: The checkpoint whose weights adapters such as DoRA are merged with; None where they
            are left out.
    """

    cut: Cut | None = None
    dtype: torch.dtype | None = None
    diffs: bool = False
    force: bool = False
    lokr_scale: LokrScale = LokrScale.STANDARD
    base: Path | None = None


@dataclass(frozen=True)
class MergePlan:
    """Sources on the slots of the released model.

    Attributes:
        specs: The LoRAs, none of strength 0.
        names: What they are called, no two alike.
        sources: Their files, in the same order.
        slots: The slots that they reach, in model order.
        skipped: What is left out.
        applied: How many modules of each LoRA are written.
        options: How to merge.
        known: The slots of the model, by path.
        dtype: Dtype of what is written.
        inherited: What the file says in the sources' own words.
        base: Where the base weights are read; None where there is none.
    """

    specs: tuple[LoraSpec, ...]
    names: tuple[str, ...]
    sources: tuple[LoraSource, ...]
    slots: tuple[SlotPlan, ...]
    skipped: tuple[Skip, ...]
    applied: tuple[int, ...]
    options: MergeOptions
    known: Mapping[str, KnownSlot]
    dtype: torch.dtype
    inherited: Inherited
    base: MergeBase | None = None

    @classmethod
    def of(
        cls,
        specs: Sequence[LoraSpec] | LoraSet,
        options: MergeOptions,
        *,
        known: Mapping[str, KnownSlot] | None = None,
        base: MergeBase | None = None,
    ) -> MergePlan:
        """Plan a merge.

        Args:
            specs: The LoRAs, or a set of them.
            options: How to merge.
            known: The model's slots by path; by default those of the released model that the
                sources are for.
            base: Where the base weights are read; None where there is none.

        Raises:
            LoraReadError: A source cannot be read.
            LoraFileError: A source is malformed.
            OtherModelError: A source is for a model that is not known, or for another one than
                the sources before it, or than the base.
            NothingToApplyError: Nothing of a source can be merged.
            ScheduleError: A LoRA has a schedule, which a file cannot hold.
        """
        settings = ComposeOptions(lokr_scale=options.lokr_scale)
        wanted = _as_set(specs, settings)
        _require_one_strength(wanted)
        if not wanted.specs:
            raise NothingToApplyError("every strength is 0: there is nothing to merge")
        documents = [json.loads(source.plan.to_json()) for source in wanted.sources]
        model = common_model(wanted.names, documents)
        if base is not None and model is not None:
            base.check_model(model, wanted.names[0])
        known = known_slots(model or _ANY_MODEL) if known is None else known
        items = [
            StackItem(
                name,
                source.plan,
                spec.strength,
                spec.modulation and wanted.options.modulation,
                spec.factors.zeros(known),
            )
            for name, spec, source in zip(wanted.names, wanted.specs, wanted.sources, strict=True)
        ]
        stack = plan_stack(
            items, slot_map(carrying(known)), max_rank=None, strict=False, options=settings
        )
        slots, skipped = split_by_base(stack.slots, known, base, diffs=options.diffs)
        if not options.diffs:
            skipped += _skipped_values(slots)
        skipped = [*stack.skipped, *skipped]
        return cls(
            specs=wanted.specs,
            names=wanted.names,
            sources=wanted.sources,
            slots=slots,
            skipped=tuple(skipped),
            applied=_applied_modules(slots, wanted, skipped, diffs=options.diffs),
            options=options,
            known=known,
            dtype=options.dtype or _narrowest_dtype(slots, diffs=options.diffs),
            inherited=inherit(
                [
                    (document["metadata"], spec.strength)
                    for spec, document in zip(wanted.specs, documents, strict=True)
                ]
            ),
            base=base,
        )

    @cached_property
    def needed(self) -> Needed:
        """Which modules' deltas are made of the base weight."""
        return Needed.of(self.slots, self.known, self.base, diffs=self.options.diffs)

    @property
    def block_count(self) -> int:
        """How many numbered blocks the model has."""
        return count_blocks(self.known)

    def weights(self, slot: SlotPlan) -> dict[str, list[Piece]]:
        """The pieces of each module of a slot that are written as pairs, by the module's path."""
        pieces = [piece for piece in slot.pieces if not is_value(piece, slot)]
        found = {
            path: [piece for piece in pieces if covers(piece, rows)]
            for path, rows in self.known[slot.path].rows.items()
        }
        return {path: own for path, own in found.items() if own}

    def bounds(self) -> Iterator[TensorShape]:
        """All tensors that may be written, in their order, as large as they may be."""
        ranks = self.rank_bounds()
        for slot in self.slots:
            known = self.known[slot.path]
            out, columns = known.sides
            for path in self.weights(slot):
                yield from pair_shapes(path, (out, ranks[path], columns), self.dtype)
            if self.options.diffs:
                values = [piece for piece in slot.pieces if is_value(piece, slot)]
                values += base_values(slot)
                shapes = dict(row for piece in values for row in value_keys(piece, known))
                # Small values are written in float32.
                yield from ((PREFIX + key, torch.float32, shape) for key, shape in shapes.items())

    def rank_bounds(self) -> dict[str, int]:
        """The most ranks that each module may have, by its path."""
        return {
            path: self._rank_bound(pieces, min(self.known[slot.path].sides))
            for slot in self.slots
            for path, pieces in self.weights(slot).items()
        }

    def notes(self) -> Iterator[str]:
        """What is worth knowing before the work begins."""
        if self.base is not None and not self.needed.modules:
            yield f"nothing needs the base: of `{self.base.name}` no weight is read"
        yield from self.size_notes()

    def size_notes(self) -> Iterator[str]:
        """Notes on the result's size, before it is made."""
        if self.options.cut is not None:
            return
        full: dict[str, set[str]] = {}
        for slot in self.slots:
            side = min(self.known[slot.path].sides)
            for path, pieces in self.weights(slot).items():
                found = {piece.adapter for piece in pieces if has_full_rank(piece, side)}
                full |= {path: found} if found else {}
        if full:
            adapters = ", ".join(sorted(set().union(*full.values())))
            most = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.bounds())
            modules = counted(len(full), "module has", "modules have")
            yield (
                f"{modules} full rank ({adapters}): written exactly, the file takes up to"
                f" {size(most)}"
                "\nhint: `--energy 0.99` or `--rank 128` makes it smaller, and says what is lost"
            )

    def _rank_bound(self, pieces: Sequence[Piece], side: int) -> int:
        rank = sum(rank_bound(piece, side) for piece in pieces)
        if len(pieces) > 1:
            rank = min(rank, side)
        cut = self.options.cut
        return rank if cut is None or cut.rank is None else min(rank, cut.rank)


def _as_set(specs: Sequence[LoraSpec] | LoraSet, settings: ComposeOptions) -> LoraSet:
    if isinstance(specs, LoraSet):
        return specs
    return LoraSet.of(list(specs), options=settings)


def covers(piece: Piece, rows: tuple[int, int]) -> bool:
    """Tell if a piece changes all of these rows of its slot."""
    begin, end = rows
    return piece.row_begin <= begin and end <= piece.row_begin + piece.row_count


def pair_shapes(
    path: str, sides: tuple[int, int, int], dtype: torch.dtype
) -> tuple[TensorShape, TensorShape, TensorShape]:
    """The tensors of a module of (out, rank, in), in the order in which they are written."""
    out, rank, columns = sides
    stem = PREFIX + path
    return (
        (f"{stem}.lora_down.weight", dtype, (rank, columns)),
        (f"{stem}.lora_up.weight", dtype, (out, rank)),
        (f"{stem}.alpha", ALPHA_DTYPE, ()),
    )


def common_model(names: Sequence[str], documents: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the model that the sources are for; planning refuses those that are for none.

    Raises:
        OtherModelError: They are for several.
    """
    first = ""
    model = None
    for name, document in zip(names, documents, strict=True):
        own = document["model"]
        if own is None:
            continue
        if first and own != model:
            raise OtherModelError(
                f"`{name}` is a LoRA for `{own}`, but `{first}` is one for `{model}`"
                "\nhint: a merged file is for one model: merge the files of each by themselves"
            )
        first, model = first or name, own
    return model


def carrying(known: Mapping[str, KnownSlot]) -> Iterator[KnownSlot]:
    """The slots as what a file can carry: no kernel takes ranks alone in it."""
    for slot in known.values():
        yield replace(slot, row=slot.row._replace(opens=True))


def _skipped_values(slots: Sequence[SlotPlan]) -> Iterator[Skip]:
    """Values that a low-rank file does not carry."""
    for slot in slots:
        for piece in slot.pieces:
            if is_value(piece, slot):
                key = next(iter(piece.tensors.values())).key
                yield Skip(piece.lora, key, VALUE, DIFFS_REASON, piece.kind.value, True)


def _applied_modules(
    slots: Sequence[SlotPlan], wanted: LoraSet, skipped: Sequence[Skip], *, diffs: bool
) -> tuple[int, ...]:
    applied: list[set[str]] = [set() for _ in wanted.specs]
    for slot in slots:
        for piece in slot.pieces:
            if diffs or not is_value(piece, slot):
                applied[piece.lora].add(piece.target)
    for at, (name, modules) in enumerate(zip(wanted.names, applied, strict=True)):
        if not modules:
            own = [skip for skip in skipped if skip.lora == at]
            raise NothingToApplyError(
                f"nothing of `{name}` can be merged: {_why(own, wanted.specs[at])}"
            )
    return tuple(len(modules) for modules in applied)


def _require_one_strength(wanted: LoraSet) -> None:
    for name, spec in zip(wanted.names, wanted.specs, strict=True):
        if spec.schedule is not None:
            raise ScheduleError(
                f"`{name}` has the schedule `{spec.schedule}`: a file holds one strength"
                "\nhint: merge one step's strengths, with `LoraSpec.at(share)`"
            )


def _why(skipped: Sequence[Skip], spec: LoraSpec) -> str:
    """Why nothing of a source is merged, though some of it has a place in the model."""
    values = [skip for skip in skipped if skip.kind == VALUE]
    lacking = [skip for skip in skipped if skip.kind == BASELESS]
    if lacking:
        return lacking[0].reason
    if values:
        return (
            "all of it are deltas of biases, norms or tables\nhint: `--diffs` writes them;"
            " diffusers refuses such a file"
        )
    return f"its factors `{spec.factors}` turn all of it off"


def _narrowest_dtype(slots: Sequence[SlotPlan], *, diffs: bool) -> torch.dtype:
    """The narrowest dtype of the three that holds every stored value of what is merged."""
    stored = {
        DTYPES[ref.dtype]
        for slot in slots
        for piece in slot.pieces
        if diffs or not is_value(piece, slot)
        for ref in piece.tensors.values()
    }
    # Every float8 value is a bfloat16 value, too.
    halves = {torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in stored}
    promoted = functools.reduce(torch.promote_types, halves)
    return torch.float32 if promoted == torch.float64 else promoted
