"""Mapping: slot by slot read and measured."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.pieces import read_pieces
from qwenlora.delta.strength import factor_at
from qwenlora.errors import NothingToApplyError
from qwenlora.lora_set import LoraSet
from qwenlora.map.change import DeltaMap, ModuleChange, State
from qwenlora.map.energy import energy_of
from qwenlora.merge.based_member import needs_base
from qwenlora.merge.diffs import Value, is_value, sum_values
from qwenlora.merge.folder import check_folder
from qwenlora.merge.known import known_slots
from qwenlora.merge.member import Member
from qwenlora.merge.plan import carrying, common_model, covers
from qwenlora.plan.documents import SlotKind, StackItem, plan_stack, slot_map
from qwenlora.spec import ComposeOptions

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.merge.known import KnownSlot
    from qwenlora.plan.documents import Piece, Skip, SlotPlan
    from qwenlora.source.source import TensorFetcher
    from qwenlora.spec import LoraSpec

__all__ = ["map_loras"]

Progress = Callable[[int, int], None]
"""Called as `progress(done, all)` before each slot."""
_Read = tuple["Piece", dict[str, "Tensor"]]
_ANY_MODEL = "qwen-image"
"""On its slots files are planned that are for no known model, to be refused."""


def map_loras(
    specs: Sequence[LoraSpec],
    *,
    title: str | None = None,
    progress: Progress = lambda _done, _all: None,
    known: Mapping[str, KnownSlot] | None = None,
) -> DeltaMap:
    """Measure how strongly each module is changed by the sum of LoRAs at their strengths.

    The tensors of one slot are in memory at a time.

    Args:
        specs: Files and PEFT folders with strengths; at least one is not 0.
        title: What the map is called; by default the LoRAs' names and strengths.
        progress: Called before each slot.
        known: The model's slots by path; by default those of the released model that the LoRAs
            are for.

    Raises:
        LoraReadError: A file cannot be read, or changed meanwhile.
        LoraFileError: A file is malformed.
        OtherModelError: A LoRA is for a model that is not known, or for another one than the LoRAs
            before it.
        NothingToApplyError: Nothing of a LoRA has a place in the model.
    """
    for spec in specs:
        if not isinstance(spec.source, Mapping):
            check_folder(Path(spec.source))
    plan = _Plan.of(specs, known)
    found = _Findings(plan.known)
    with contextlib.ExitStack() as closing, torch.no_grad(), _one_thread():
        fetchers = []
        for source in plan.wanted.sources:
            fetchers.append(source.open())
            closing.callback(fetchers[-1].close)
        for done, slot in enumerate(plan.slots):
            progress(done, len(plan.slots))
            found.measure(slot, _read(slot, fetchers), plan.wanted.specs)
        for fetcher in fetchers:
            fetcher.finish()
    for skip in plan.skipped:
        found.leave_out(skip)
    return DeltaMap(
        title=plan.title if title is None else title,
        model=plan.model,
        paths=tuple(found.paths),
        modules=found.in_model_order(),
        left_out=found.left_out,
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute on this thread alone.

    Its threads wait for each other in every operation, of which there are hundreds. Where something
    else keeps the cores busy, each wait takes a time slice: a map takes ten times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Plan:
    """LoRAs on the slots of their model."""

    wanted: LoraSet
    model: str
    known: Mapping[str, KnownSlot]
    slots: tuple[SlotPlan, ...]
    skipped: tuple[Skip, ...]

    @classmethod
    def of(cls, specs: Sequence[LoraSpec], known: Mapping[str, KnownSlot] | None) -> _Plan:
        wanted = LoraSet.of(list(specs))
        if not wanted.specs:
            raise NothingToApplyError("every strength is 0: there is nothing to map")
        documents = [json.loads(source.plan.to_json()) for source in wanted.sources]
        model = common_model(wanted.names, documents) or _ANY_MODEL
        known = known_slots(model) if known is None else known
        items = [
            StackItem(name, source.plan, spec.strength, spec.modulation, spec.factors.zeros(known))
            for name, spec, source in zip(wanted.names, wanted.specs, wanted.sources, strict=True)
        ]
        slots = slot_map(carrying(known))
        stack = plan_stack(items, slots, max_rank=None, strict=False, options=ComposeOptions())
        skipped = tuple(skip for skip in stack.skipped if skip.matters)
        return cls(wanted, model, known, stack.slots, skipped)

    @property
    def title(self) -> str:
        names = zip(self.wanted.names, self.wanted.specs, strict=True)
        if len(self.wanted.specs) == 1 and self.wanted.specs[0].strength == 1:
            return self.wanted.names[0]
        return " + ".join(f"{name} x {spec.strength:g}" for name, spec in names)


def _read(slot: SlotPlan, fetchers: Sequence[TensorFetcher]) -> list[_Read]:
    """The slot's pieces with their tensors; with none where they need the base weight."""
    read: list[_Read] = []
    for lora, fetcher in enumerate(fetchers):
        own = [piece for piece in slot.pieces if piece.lora == lora]
        read += read_pieces([piece for piece in own if not needs_base(piece)], fetcher)
        read += [(piece, {}) for piece in own if needs_base(piece)]
    return read


class _Findings:
    """What has been measured so far."""

    def __init__(self, known: Mapping[str, KnownSlot]) -> None:
        self._known = known
        self._found: dict[str, ModuleChange] = {}
        # Each once, in order.
        self.paths = dict.fromkeys(path for slot in known.values() for path in slot.rows)
        self.left_out = 0

    def measure(self, slot: SlotPlan, read: Sequence[_Read], specs: Sequence[LoraSpec]) -> None:
        """Measure the modules of a slot."""
        known = self._known[slot.path]
        values = _values(slot, read, specs, known)
        for path, rows in known.rows.items():
            own = [row for row in read if covers(row[0], rows)]
            based = dict.fromkeys(piece.adapter for piece, _ in own if needs_base(piece))
            if based:
                reason = f"its delta is made of the base weight ({', '.join(based)})"
                self._found[path] = ModuleChange(State.NEEDS_BASE, reason=reason)
            elif own:
                weights = [row for row in own if not is_value(row[0], slot)]
                members = [_member(*row, rows, specs) for row in weights]
                weight = energy_of(members, known.sides) if members else 0.0
                self._found[path] = _change(known, weight, values.get(path, 0.0))

    def leave_out(self, skip: Skip) -> None:
        """Note a module, or a tensor, that is not applied."""
        if skip.name in self.paths and skip.name not in self._found:
            self._found[skip.name] = ModuleChange(State.LEFT_OUT, reason=skip.reason)
        else:
            self.left_out += 1

    def in_model_order(self) -> dict[str, ModuleChange]:
        """All that was found, in the order of the model."""
        return {path: self._found[path] for path in self.paths if path in self._found}


def _values(
    slot: SlotPlan, read: Sequence[_Read], specs: Sequence[LoraSpec], known: KnownSlot
) -> dict[str, float]:
    """Squared norms of what is added to stored values, by the module's path."""
    values = [
        Value(piece, tensors, specs[piece.lora].strength_at(piece.target))
        for piece, tensors in read
        if tensors and is_value(piece, slot)
    ]
    squares: dict[str, float] = {}
    for key, delta in sum_values(values, known).items():
        path, _, _ = key.rpartition(".")
        squares[path] = squares.get(path, 0.0) + float(delta.square().sum())
    return squares


def _change(known: KnownSlot, weight: float, value: float) -> ModuleChange:
    """How a module is changed, of the squared norms of the deltas of its weight and values."""
    if not math.isfinite(weight + value):
        return ModuleChange(State.DAMAGED, reason="a tensor holds NaN or infinity")
    if weight + value == 0:
        return ModuleChange(State.ZERO)
    out, columns = known.sides
    count = out * columns if known.row.kind == SlotKind.EMBEDDING.value else out
    return ModuleChange(State.CHANGED, math.sqrt((weight + value) / count), math.sqrt(weight))


def _member(
    piece: Piece, tensors: Mapping[str, Tensor], rows: tuple[int, int], specs: Sequence[LoraSpec]
) -> Member:
    factor = factor_at(piece.scale, specs[piece.lora].strength_at(piece.target))
    return Member(piece, tensors, factor, rows[0] - piece.row_begin, rows[1] - rows[0])
