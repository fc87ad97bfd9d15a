"""The slots of the released models: merging needs no model at hand."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qwenlora import _core
from qwenlora.plan.documents import SlotRow

__all__ = ["KnownSlot", "known_slots"]


@dataclass(frozen=True)
class KnownSlot:
    """A slot of a known model as Nunchaku quantizes it.

    Attributes:
        row: What planning needs to know of it.
        parts: Paths of the modules in it, by their names in diffusers; its rows are cut into as
            many equal parts.
    """

    row: SlotRow
    parts: tuple[str, ...]

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in) of each module."""
        return self.row.out_features // len(self.parts), self.row.in_features

    @property
    def rows(self) -> dict[str, tuple[int, int]]:
        """First row of each module in the slot, and the row after its last."""
        out, _ = self.sides
        return {part: (at * out, (at + 1) * out) for at, part in enumerate(self.parts)}


def known_slots(model: str) -> dict[str, KnownSlot]:
    """All slots of a model by path, in its order.

    Args:
        model: Its name as in a file's plan: `qwen-image` or `z-image`.
    """
    slots = {}
    for document in json.loads(_core.known_slots())[model]:
        parts = tuple(document.pop("parts"))
        row = SlotRow(**document)
        slots[row.path] = KnownSlot(row, parts)
    return slots
