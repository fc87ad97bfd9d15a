"""Keeps the model's record true while slots are written."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qwenlora.model.state import AppliedState, write_state
from qwenlora.model.steps import forget_steps
from qwenlora.report import NO_SLOTS, ComposeReport
from qwenlora.slots.whole import slot_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from qwenlora.compose.structure import Structure
    from qwenlora.model.target import Target
    from qwenlora.slots.slot import Change

__all__ = ["Journal", "restore_all"]


def restore_all(targets: Iterable[Target]) -> None:
    """Bring every slot to its base."""
    for target in targets:
        slot = slot_of(target)
        if not slot.is_base():
            slot.restore()


class Journal:
    """Keeps the recorded state truthful while slots are being written.

    From before the first write until the last the record says so, with every base rank: whatever
    interrupts the writing, and the cleaning up after it, a later call can find the base again.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, before: AppliedState, *, started: float
    ) -> None:
        """`started` is when the call began, on `time.perf_counter`."""
        self._started = started
        self._model = model
        self._structure = structure
        self._before = before
        report = ComposeReport((), NO_SLOTS, 0, 0.0, failure="interrupted while it was written")
        self._in_flight = AppliedState(None, structure.bare_records, report, in_flight=True)

    def begin(self) -> None:
        """Slots are about to be written."""
        if self._structure.layout is not None:
            self._structure.layout.synchronise()
        # What was computed with the stack before must not outlive it, whatever comes between.
        forget_steps(self._model)
        write_state(self._model, self._in_flight)

    def write(self, changes: Iterable[Change], state: AppliedState) -> None:
        """Make all changes, or none of them; `state` is what is in place with all of them made."""
        begun: list[Change] = []
        try:
            self.begin()
            for change in changes:
                begun.append(change)
                change.make()
            self.done(state)
        except BaseException:
            self.begin()
            for change in reversed(begun):
                change.unmake()
            self.undone()
            raise

    def done(self, state: AppliedState) -> None:
        """All slots are written."""
        write_state(self._model, state.taken(time.perf_counter() - self._started))

    def undone(self) -> None:
        """All slots are as they were before."""
        write_state(self._model, self._before)

    def to_base(self, error: BaseException) -> None:
        """Bring every slot to its base and say why."""
        restore_all(self._structure.with_twins())
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
        report = ComposeReport((), NO_SLOTS, 0, 0.0, failure=failure)
        write_state(self._model, AppliedState(stack=None, report=report))
