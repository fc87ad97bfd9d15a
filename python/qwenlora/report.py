"""What was done, per LoRA and per slot: plain data, JSON-able."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenlora.plan import Skip

__all__ = ["ComposeReport", "LoraReport", "SlotReport"]


@dataclass(frozen=True)
class LoraReport:
    """One LoRA of the stack.

    Attributes:
        name: Its name.
        strength: Its strength.
        modules_applied: Modules whose deltas are in the model.
        skipped: What is left out, with reasons; tensors of other components included.
        notes: Remarks that change nothing.
        zero_slots: Slots in which its delta is all zero.
        all_zero: Whether its whole delta is zero.
    """

    name: str
    strength: float
    modules_applied: int
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]
    zero_slots: tuple[str, ...]
    all_zero: bool

    @property
    def complete(self) -> bool:
        """Whether nothing of the model's was left out."""
        return not any(skip.matters for skip in self.skipped)


@dataclass(frozen=True)
class SlotReport:
    """One slot that carries deltas.

    Attributes:
        path: Its path.
        kind: "svdq", "awq", "linear", "norm" or "embedding".
        base_rank: Rank of the base branch.
        rank: Ranks of the deltas, shared downs counted once, without padding.
        rank_added: Ranks that the slot holds beyond the base, with padding.
        energy_lost: 1 - |kept|^2 / |sum|^2 where the sum was truncated, else None.
        krons: Kronecker products that run beside the layer.
        dense: Whether a dense delta runs beside the layer.
        values: Names of the parameters whose values differ from the base's.
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


@dataclass(frozen=True)
class ComposeReport:
    """What is in the model.

    Attributes:
        loras: The LoRAs of the stack, in order.
        slots: The slots that carry deltas, in model order.
        added_bytes: Bytes that the model's tensors grew by.
        bus_bytes: Bytes that offload copies to the device more than before, in each forward.
        seconds: Time that composing took.
        failure: Set where a composition failed and the model was brought to the bare base.
    """

    loras: tuple[LoraReport, ...]
    slots: tuple[SlotReport, ...]
    added_bytes: int
    seconds: float
    failure: str | None = None
    bus_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether nothing of the model's was left out of any LoRA."""
        return self.failure is None and all(lora.complete for lora in self.loras)

    @property
    def energy_lost(self) -> float:
        """The worst loss of any slot; 0 where nothing was compressed."""
        return max((slot.energy_lost or 0.0 for slot in self.slots), default=0.0)

    def summary(self) -> str:
        """One line for a log."""
        if self.failure is not None:
            return f"base model: composing failed ({self.failure})"
        if not self.loras:
            return "base model: no LoRA"
        count = "1 LoRA" if len(self.loras) == 1 else f"{len(self.loras)} LoRAs"
        parts = [
            f"{count} on {len(self.slots)} slots",
            f"rank {_span(slot.rank_added for slot in self.slots)}",
            f"{self.added_bytes / 1e6:.1f} MB",
            f"{self.seconds:.2f} s",
        ]
        if self.bus_bytes:
            parts.append(f"{self.bus_bytes / 1e6:.1f} MB per forward over the bus")
        compressed = sum(slot.energy_lost is not None for slot in self.slots)
        if compressed:
            parts.append(f"{compressed} slots compressed, up to {self.energy_lost:.2%} energy lost")
        return f"{', '.join(parts)}; {'; '.join(self._remarks())}"

    def text(self) -> str:
        """Several lines for a person: the summary, then each LoRA with what it lacks."""
        lines = [self.summary()]
        for lora in self.loras:
            lines.append(f"  {lora.name} x {lora.strength:g}: {lora.modules_applied} modules")
            reasons = Counter((skip.reason, skip.matters) for skip in lora.skipped)
            for (reason, matters), count in reasons.most_common():
                example = next(skip.name for skip in lora.skipped if skip.reason == reason)
                mark = "not applied" if matters else "ignored"
                lines.append(f"    {mark}: {count} x {reason} (e.g. {example})")
            if lora.all_zero:
                lines.append("    its delta is all zero")
            lines.extend(f"    note: {note}" for note in lora.notes)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able data."""
        return {**asdict(self), "complete": self.complete, "summary": self.summary()}

    def _remarks(self) -> list[str]:
        remarks = []
        for lora in self.loras:
            left_out = [skip for skip in lora.skipped if skip.matters]
            if left_out:
                reason = Counter(skip.reason for skip in left_out).most_common(1)[0][0]
                remarks.append(f"`{lora.name}` lacks {len(left_out)} ({reason})")
            if lora.all_zero:
                remarks.append(f"`{lora.name}` is all zero")
        return remarks or ["complete"]


def _span(values: Iterable[int]) -> str:
    ordered = sorted(values)
    if not ordered:
        return "+0"
    low, high = ordered[0], ordered[-1]
    return f"+{low}" if low == high else f"+{low} to +{high}"
