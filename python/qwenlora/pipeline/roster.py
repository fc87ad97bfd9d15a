"""The adapters of one transformer, and how a change of them reaches it."""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenlora.compose.planning import look_ahead
from qwenlora.errors import ModelStateError, QwenLoraError
from qwenlora.lora_set import LoraSet
from qwenlora.model.state import read_default
from qwenlora.model.transformer import transformer_of
from qwenlora.pipeline.adapter import Adapter
from qwenlora.pipeline.adapters import NO_ADAPTERS, Adapters
from qwenlora.runtime import ComfyQwenImageWrapper
from qwenlora.spec import LoraSpec
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from qwenlora.pipeline.weight import Weight
    from qwenlora.report import ComposeReport, LoraReport
    from qwenlora.spec import Source

__all__ = ["ROSTER", "Roster", "roster_of"]

_log = logging.getLogger("qwenlora")

ROSTER = "_qwenlora_roster"
"""Attribute of an attached transformer."""


class Roster:
    """The adapters of one transformer: one value at a time, and whoever shares them.

    Attributes:
        adapters: What is loaded, active and enabled now.
        eager: Whether a change is composed at once, instead of at the next forward.
        sharers: The handles of the pipelines that are attached to the transformer.
        brought_runtime: Whether the transformer had no wrapper before.
    """

    def __init__(self, *, brought_runtime: bool) -> None:
        self.adapters = NO_ADAPTERS
        self.eager = False
        self.sharers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.brought_runtime = brought_runtime
        self._lock = threading.Lock()

    def change(
        self, transformer: nn.Module, made: Callable[[Adapters], Adapters]
    ) -> ComposeReport | None:
        """Make another value of the adapters the one that is wanted.

        Args:
            transformer: The transformer.
            made: The new value from the old one.

        Returns:
            What was composed, where that is done at once.

        Raises:
            QwenLoraError: It cannot be; the adapters are then what they were before.
        """
        runtime = ComfyQwenImageWrapper.of(transformer)
        # Not while composing: a forward of another thread may be running, and change them, too.
        with self._lock:
            before, wanted_before = self.adapters, read_default(transformer)
            after = made(before)
            wanted = after.wanted(runtime.max_rank, runtime.options)
            self.adapters = after
            runtime.want(wanted)
        if not self.eager:
            return None
        try:
            runtime.reconcile()
        except BaseException:
            with self._lock:
                if self.adapters is after:
                    self.adapters = before
                    if isinstance(wanted_before, LoraSet):
                        runtime.want(wanted_before)
            raise
        return runtime.report

    def plan(self, transformer: nn.Module, name: str, source: Source) -> Adapter:
        """Plan a LoRA on the transformer; no tensor of a file is read.

        Raises:
            QwenLoraError: It cannot be read, or nothing of it can be applied.
        """
        options = ComfyQwenImageWrapper.of(transformer).options
        alone = LoraSet.of(LoraSpec(source, name=name), options=options)
        outlook = look_ahead(transformer, alone)
        (report,) = outlook.report.loras
        _log_loaded(report)
        return Adapter(name, alone.specs[0], alone.sources[0], report, outlook.targets)

    def __deepcopy__(self, memo: dict[int, Any]) -> Roster:
        # The copy of the transformer has the same adapters. Pipelines around it say so themselves.
        copied = Roster(brought_runtime=self.brought_runtime)
        copied.adapters, copied.eager = self.adapters, self.eager
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        loaded = self.adapters.loaded.values()
        rows = [(own.spec, own.report, own.targets, own.weight) for own in loaded]
        rest = replace(self.adapters, loaded={})
        return (_planned_again, (rows, rest, self.eager, self.brought_runtime))


def roster_of(transformer: object) -> Roster:
    """The roster of an attached transformer.

    Raises:
        ModelStateError: It is not attached.
    """
    roster = vars(transformer_of(transformer)).get(ROSTER)
    if not isinstance(roster, Roster):
        raise ModelStateError(
            "this transformer is not attached: the pipeline got another one"
            "\nhint: call qwenlora.attach(pipeline) again"
        )
    return roster


def _log_loaded(report: LoraReport) -> None:
    """Say what a LoRA has for the transformer, and name what is left out."""
    _log.info("loaded `%s`: %s", report.name, counted(report.modules_applied, "module"))
    for (reason, matters), names in _by_reason(report).items():
        level, what = (
            (logging.WARNING, "not applied") if matters else (logging.INFO, "left out of the file")
        )
        _log.log(
            level, "`%s`: %s: %d x %s (e.g. `%s`)", report.name, what, len(names), reason, names[0]
        )


def _by_reason(report: LoraReport) -> dict[tuple[str, bool], list[str]]:
    found: dict[tuple[str, bool], list[str]] = {}
    for skip in report.skipped:
        found.setdefault((skip.reason, skip.matters), []).append(skip.name)
    return found


def _planned_again(
    rows: list[tuple[LoraSpec, LoraReport, frozenset[str], Weight]],
    rest: Adapters,
    eager: bool,
    brought_runtime: bool,
) -> Roster:
    """A roster that was pickled; a LoRA whose file cannot be read is not loaded any more."""
    loaded = {}
    for spec, report, targets, weight in rows:
        try:
            alone = LoraSet.of(spec)
        except QwenLoraError as error:
            _log.warning("adapter `%s` is gone: %s", report.name, error)
            continue
        loaded[report.name] = Adapter(report.name, spec, alone.sources[0], report, targets, weight)
    active = tuple(name for name in rest.active if name in loaded)
    roster = Roster(brought_runtime=brought_runtime)
    roster.adapters, roster.eager = replace(rest, loaded=loaded, active=active), eager
    return roster
