"""The report of a composition, per LoRA and per slot: plain data, JSON-able."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, overload

from qwenlora.words import counted

if TYPE_CHECKING:
    from qwenlora.plan.documents import Skip

__all__ = [
    "NO_SLOTS",
    "THIRDED",
    "TURNED_OFF",
    "ComposeReport",
    "Exactness",
    "Inexact",
    "LoraReport",
    "SlotReport",
    "SlotReports",
]

THIRDED = (
    "its fused q, k, v are block-diagonal with an alpha of at most a third of the rank: if it seems"
    " too weak, its converter copied alpha from one projection; use three times the strength"
)
"""The note on a LoRA with `LoraPair.thirded` pairs."""
TURNED_OFF = "turned_off"
"""The kind of what is left out because the caller wished so."""


class Exactness(enum.Enum):
    """How exactly a module's delta is in the model."""

    EXACT = "exact"
    """With no more than the roundings that any LoRA has."""
    NORMS_ESTIMATED = "norms estimated"
    """DoRA's norms are those of the quantized weight, less what quantizing adds to them."""
    TRUNCATED = "truncated"
    """The layer carries fewer ranks than the delta has."""


@dataclass(frozen=True)
class Inexact:
    """A module whose delta is not exact.

    Attributes:
        module: Its path.
        exactness: In which way it is not, as an `Exactness` value.
        energy_lost: Share of its slot's energy that is lost; None where nothing is, or the plan
            alone cannot tell.
    """

    module: str
    exactness: str
    energy_lost: float | None = None

    @property
    def words(self) -> str:
        """The class, with what is lost."""
        if self.energy_lost is None:
            return self.exactness
        return f"{self.exactness}, {_share(self.energy_lost, 1)} lost"


@dataclass(frozen=True)
class LoraReport:
    """One LoRA of the stack.

    Attributes:
        name: Its name; no other of the stack has it.
        strength: Its strength.
        modules_applied: Modules whose deltas are in the model.
        skipped: What is left out, with reasons; tensors of other components included.
        notes: Remarks that change nothing.
        zero_slots: Slots in which its delta is all zero.
        all_zero: Whether its whole delta is zero.
        blocks: Its factors by block and kind, as text; empty where all are 1.
        schedule: Its factors over the course of sampling, as text; empty where none is to come.
        blocks_note: A sentence on blocks that these name and the model lacks; empty where none.
        inexact: Of the modules that are applied, those that are not exact.
    """

    name: str
    strength: float
    modules_applied: int
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]
    zero_slots: tuple[str, ...]
    all_zero: bool
    blocks: str = ""
    blocks_note: str = ""
    inexact: tuple[Inexact, ...] = ()
    schedule: str = ""

    @property
    def exactness(self) -> dict[str, int]:
        """How many of its modules are of each class, as words; the largest class first."""
        classes = Counter(own.words for own in self.inexact)
        classes[Exactness.EXACT.value] = self.modules_applied - len(self.inexact)
        return {words: count for words, count in classes.most_common() if count > 0}

    @property
    def complete(self) -> bool:
        """True where nothing for this model was left out, except what the caller turned off."""
        return not any(skip.matters for skip in self.skipped)

    @property
    def weight_text(self) -> str:
        """Its strength, and its factors by block and over the steps where these are not all 1."""
        text = f"{self.strength:g} ({self.blocks})" if self.blocks else f"{self.strength:g}"
        return f"{text} over the steps ({self.schedule})" if self.schedule else text

    @property
    def turned_off(self) -> tuple[Skip, ...]:
        """The skips of what the caller turned off."""
        return tuple(skip for skip in self.skipped if skip.kind == TURNED_OFF)


@dataclass(frozen=True)
class SlotReport:
    """One slot that carries deltas.

    Attributes:
        path: Its path.
        kind: "svdq", "awq", "linear", "norm" or "embedding".
        base_rank: Rank of the base branch.
        rank: Ranks of the deltas, shared downs counted once, without padding.
        rank_added: Ranks that the slot holds beyond the base, with padding.
        energy_lost: |delta - kept|^2 / |delta|^2 of the slot's whole delta where a part of it was
            truncated, else None. Infinite where no bound can be given.
        energy: |delta|^2 where it had to be known.
        rank_exact: Ranks that the exact sum would hold beyond the base, with padding.
        krons: Kronecker products in the layer's side branch.
        dense: Whether a dense delta runs in the layer's side branch.
        values: Names of the parameters whose values differ from the base's.
        energy_is_bound: Whether `energy_lost` and `energy` are at most so, instead of measured.
    """

    path: str
    kind: str
    base_rank: int
    rank: int
    rank_added: int
    energy_lost: float | None
    krons: int = 0
    dense: bool = False
    values: tuple[str, ...] = ()
    energy: float | None = None
    rank_exact: int = 0
    energy_is_bound: bool = False


class SlotReports(Sequence[SlotReport]):
    """The reports of slots, in model order, made when they are looked at.

    Slots that were composed together differ in nothing but their paths.
    """

    def __init__(self, alike: Iterable[tuple[SlotReport, Mapping[str, int]]]) -> None:
        """Take one report for several slots.

        Args:
            alike: A report, and the paths that it holds for with their places in the model.
        """
        self._alike = tuple(alike)
        self._all: tuple[SlotReport, ...] | None = None

    @classmethod
    def of(cls, slots: Iterable[SlotReport]) -> SlotReports:
        """Take reports one by one, in their order."""
        return cls((slot, {slot.path: place}) for place, slot in enumerate(slots))

    def counted(self) -> list[tuple[SlotReport, int]]:
        """Reports, and for how many slots each stands."""
        return [(report, len(paths)) for report, paths in self._alike]

    def __iter__(self) -> Iterator[SlotReport]:
        return iter(self._expanded())

    @overload
    def __getitem__(self, index: int) -> SlotReport: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SlotReport, ...]: ...
    def __getitem__(self, index: int | slice) -> SlotReport | tuple[SlotReport, ...]:
        return self._expanded()[index]

    def __len__(self) -> int:
        return sum(len(paths) for _, paths in self._alike)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (SlotReports, tuple, list)):
            return NotImplemented
        return self._expanded() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._expanded())

    def __repr__(self) -> str:
        return repr(self._expanded())

    def _expanded(self) -> tuple[SlotReport, ...]:
        if self._all is None:
            placed = [
                (place, replace(report, path=path))
                for report, paths in self._alike
                for path, place in paths.items()
            ]
            self._all = tuple(report for _, report in sorted(placed, key=lambda row: row[0]))
        return self._all


@dataclass(frozen=True)
class ComposeReport:
    """The LoRAs and deltas in the model, and what composing them took.

    Attributes:
        loras: The LoRAs of the stack, in order.
        slots: The slots that carry deltas, in model order.
        added_bytes: Bytes that the model's tensors grew by.
        bus_bytes: Bytes that offload copies to the device more than before, in each forward.
        seconds: Time that composing took.
        saved_bytes: Bytes that the exact sums would take beyond these.
        saved_bus_bytes: Of these, bytes that offload would copy in each forward.
        failure: Set where a composition failed and the model was brought to the bare base.
    """

    loras: tuple[LoraReport, ...]
    slots: SlotReports
    added_bytes: int
    seconds: float
    failure: str | None = None
    bus_bytes: int = 0
    saved_bytes: int = 0
    saved_bus_bytes: int = 0

    @property
    def complete(self) -> bool:
        """True where every LoRA is complete, and the composition did not fail."""
        return self.failure is None and all(lora.complete for lora in self.loras)

    @property
    def energy_lost(self) -> float:
        """The worst loss of any slot; 0 where nothing was compressed."""
        return max((slot.energy_lost or 0.0 for slot, _ in self.slots.counted()), default=0.0)

    @property
    def total_energy_lost(self) -> float:
        """The share that all slots whose energy is known lost together; 0 where none is."""
        known = [slot for slot in self.slots if slot.energy is not None]
        measured = [slot for slot in known if not slot.energy_is_bound]
        energy, lost = _energies(measured)
        # A slot that lost more than the rest weighs the more, the larger it is.
        bounds = [slot for slot in known if slot.energy_is_bound]
        for slot in sorted(bounds, key=lambda slot: slot.energy_lost or 0.0, reverse=True):
            if (slot.energy_lost or 0.0) * energy > lost or not energy:
                own, own_lost = _energies([slot])
                energy, lost = energy + own, lost + own_lost
        return lost / energy if energy > 0 else 0.0

    @property
    def energy_is_bound(self) -> bool:
        """True where some slot's energy lost is a bound: then both figures are upper bounds."""
        return any(slot.energy_is_bound for slot, _ in self.slots.counted())

    def summary(self) -> str:
        """One line for a log."""
        if self.failure is not None:
            return f"base model: composing failed ({self.failure})"
        if not self.loras:
            return "base model: no LoRA"
        parts = [*self._extent(), f"{self.seconds:.2f} s"]
        if self.bus_bytes:
            parts.append(f"{self.bus_bytes / 1e6:.1f} MB per forward over the bus")
        compressed = sum(
            count for slot, count in self.slots.counted() if slot.energy_lost is not None
        )
        if compressed:
            lost = _share(self.energy_lost, 2)
            lost += " energy" if math.isfinite(self.energy_lost) else " of the energy"
            parts.append(f"{counted(compressed, 'slot')} compressed, up to {lost} lost")
            if self.energy_is_bound:
                parts[-1] += " (a bound)"
        if self.saved_bytes:
            parts.append(f"{self.saved_bytes / 1e6:.1f} MB saved")
        return f"{', '.join(parts)}; {'; '.join(self._remarks())}"

    def headline(self) -> str:
        """One line for little room: whether all is applied stands first, then the extent."""
        if self.failure is not None or not self.loras:
            return self.summary()
        return f"{'; '.join(self._remarks())}: {', '.join(self._extent())}"

    def text(self) -> str:
        """Several lines for a person: the summary, then each LoRA with what it lacks."""
        lines = [self.summary(), *self._compression()]
        for lora in self.loras:
            modules = counted(lora.modules_applied, "module")
            line = f"  {lora.name} x {lora.weight_text}: {modules}"
            lines.append(f"{line}, {_classes(lora)}" if lora.modules_applied else line)
            reasons = Counter((skip.reason, _mark(skip)) for skip in lora.skipped)
            for (reason, mark), count in reasons.most_common():
                example = next(skip.name for skip in lora.skipped if skip.reason == reason)
                lines.append(f"    {mark}: {count} x {reason} (e.g. {example})")
            if lora.all_zero:
                lines.append("    its delta is all zero")
            notes = filter(None, (*lora.notes, lora.blocks_note))
            lines.extend(f"    note: {note}" for note in notes)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data; a number that is not finite is a string."""
        return {
            **asdict(replace(self, slots=NO_SLOTS)),
            "loras": [_lora_row(lora) for lora in self.loras],
            "slots": [_finite(asdict(slot)) for slot in self.slots],
            "complete": self.complete,
            "summary": self.summary(),
        }

    def _extent(self) -> list[str]:
        return [
            f"{counted(len(self.loras), 'LoRA')} on {counted(len(self.slots), 'slot')}",
            f"rank {_span(slot.rank_added for slot, _ in self.slots.counted())}",
            f"{self.added_bytes / 1e6:.1f} MB",
        ]

    def _compression(self) -> list[str]:
        cut = [slot for slot in self.slots if slot.energy_lost is not None]
        if not cut:
            return []
        most = "at most " if self.energy_is_bound else ""
        total, worst = (_share(lost, 3) for lost in (self.total_energy_lost, self.energy_lost))
        line = (
            f"  compressed: rank {_span(slot.rank_exact for slot in cut)} to"
            f" {_span(slot.rank_added for slot in cut)} on {len(cut)} of"
            f" {counted(len(self.slots), 'slot')},"
            f" {most}{total} of the energy lost in all, {most}{worst} at worst;"
            f" {self.saved_bytes / 1e6:.1f} MB less than exact"
        )
        if self.saved_bus_bytes:
            line += f", {self.saved_bus_bytes / 1e6:.1f} MB less per forward over the bus"
        return [line]

    def _remarks(self) -> list[str]:
        remarks = []
        for lora in self.loras:
            left_out = [skip for skip in lora.skipped if skip.matters]
            if left_out:
                reason = Counter(skip.reason for skip in left_out).most_common(1)[0][0]
                remarks.append(f"`{lora.name}` lacks {len(left_out)} ({reason})")
            wishes = Counter(skip.reason for skip in lora.turned_off)
            for reason, count in wishes.items():
                remarks.append(f"`{lora.name}` without {count} ({reason})")
            if lora.blocks_note:
                remarks.append(f"`{lora.name}`: {lora.blocks_note}")
            if lora.all_zero:
                remarks.append(f"`{lora.name}` is all zero")
        return remarks or ["complete", *self._estimates()]

    def _estimates(self) -> list[str]:
        """What is applied whole, and is estimated in part."""
        wanted = Exactness.NORMS_ESTIMATED.value
        counts = {
            lora.name: sum(own.exactness == wanted for own in lora.inexact) for lora in self.loras
        }
        return [
            f"`{name}`: norms of {counted(count, 'module')} estimated"
            for name, count in counts.items()
            if count
        ]


def _classes(lora: LoraReport) -> str:
    """How exact a LoRA's modules are: one word where all are alike."""
    classes = lora.exactness
    if len(classes) == 1:
        return next(iter(classes))
    return ", ".join(f"{count} {words}" for words, count in classes.items())


def _mark(skip: Skip) -> str:
    if skip.kind == TURNED_OFF:
        return "left out as wished"
    return "not applied" if skip.matters else "ignored"


NO_SLOTS = SlotReports(())
"""The slots of a base model: none."""


def _energies(slots: Iterable[SlotReport]) -> tuple[float, float]:
    """The energy of slots' deltas, and what of it is lost."""
    known = [(slot.energy or 0.0, slot.energy_lost or 0.0) for slot in slots]
    return sum(energy for energy, _ in known), sum(energy * share for energy, share in known)


def _share(value: float, digits: int) -> str:
    return f"{value:.{digits}%}" if math.isfinite(value) else "an unknown share"


def _lora_row(lora: LoraReport) -> dict[str, Any]:
    """A LoRA's report as JSON-able data, with its classes."""
    inexact = [_finite(asdict(own)) for own in lora.inexact]
    return {**asdict(lora), "inexact": inexact, "exactness": lora.exactness}


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row in which numbers that are not finite are strings."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _span(values: Iterable[int]) -> str:
    ordered = sorted(values)
    if not ordered:
        return "+0"
    low, high = ordered[0], ordered[-1]
    return f"+{low}" if low == high else f"+{low} to +{high}"
