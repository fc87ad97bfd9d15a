"""The interface of a slot: it prepares a `Change`, which is made and unmade by moving pointers.

It separates planning from kinds of layers. No tensor of the base model is written to. A layer's
parts (its packed low-rank branch, a side branch, stored values) are slots themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from qwenlora.delta.slot_deltas import SlotDeltas

__all__ = ["Change", "Changes", "NoChange", "Slot"]


class Change(Protocol):
    """New tensors of one slot, allocated and filled, not yet in place."""

    def make(self) -> None:
        """Put the new tensors in place."""

    def unmake(self) -> None:
        """Put back what was there before; allowed before, during and after `make`."""


class Slot(Protocol):
    """One slot of the model at hand."""

    @property
    def path(self) -> str:
        """Its path in the transformer."""

    def prepare(self, deltas: SlotDeltas) -> Change:
        """Allocate and fill new tensors that hold the base and these deltas.

        `deltas.rank_added` is at least the pairs' padded ranks, and `room` at least the
        parts' shapes; what exceeds them is zero. With nothing in `deltas` the change restores the
        base.
        """

    def rank_added(self) -> int:
        """Ranks beyond the base that are in place now."""

    def room(self) -> Hashable:
        """The shapes in place beyond the base: offload needs them to be uniform."""

    def is_base(self) -> bool:
        """Tell if nothing is in place, not even one half of a change that was interrupted."""

    def restore(self) -> None:
        """Put the base in place, even where the device has no memory left."""


@dataclass
class Changes:
    """Changes of a slot's parts, made in order and unmade in reverse."""

    parts: Sequence[Change]

    def make(self) -> None:
        """Make every part."""
        for part in self.parts:
            part.make()

    def unmake(self) -> None:
        """Unmake every part."""
        for part in reversed(self.parts):
            part.unmake()


class NoChange:
    """A part that does not change."""

    def make(self) -> None:
        """Nothing to do."""

    def unmake(self) -> None:
        """Nothing to do."""
