"""The actions of a user, each measured for qwenlora and for the engines beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import qwenlora
from composition import options as known
from composition.files import Layout, LoraFile, drop_from_page_cache
from composition.measure import Action, Meter
from composition.options import UnavailableError, options
from qwenlora.source import read_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from composition.engines import Engine, Stack

SUITE = "table"
BY_BLOCK = "0-19:1, 20-39:0.5, 40-59:0.25; mod:0.5"
"""Factors in three runs of blocks, all on."""
TWO_THIRDS = "0-19:1, 20-39:0.5, 40-59:0"
"""The same with a third of the blocks turned off."""


@dataclass(frozen=True)
class Files:
    """The LoRA files of the actions."""

    first: Path
    other: Path
    three: tuple[Path, ...]
    irregular: Path
    modulation: Path

    @classmethod
    def write(cls, folder: Path, blocks: int, ranks: Sequence[int]) -> Files:
        """Write them where they are not yet; `ranks` are those of the three LoRAs."""

        def make(rank: int, **more: Any) -> Path:
            return LoraFile(blocks=blocks, rank=rank, **more).write(folder)

        return cls(
            first=make(ranks[0]),
            other=make(ranks[0], seed=1),
            three=tuple(make(rank) for rank in ranks),
            irregular=make(ranks[0], layout=Layout.IRREGULAR),
            modulation=make(ranks[0], modulation=True),
        )


class OurActions:
    """What users do, done with qwenlora."""

    def __init__(self, model: nn.Module, files: Files) -> None:
        self._model = model
        self._files = files
        self._turn = 0

    def all(self) -> Iterator[tuple[str, Callable[[], Action]]]:
        """Actions by name, each made when it is its turn; making one may find it impossible."""
        files = self._files
        yield "first", lambda: self.first([files.first])
        yield "first, bounded memory", lambda: self.first([files.first], **known.BOUNDED)
        yield "first, path by path", lambda: self.first([files.first], **known.BY_PATH)
        yield "first, irregular file", lambda: self.first([files.irregular])
        yield "first, modulations too", lambda: self.first([files.modulation])
        yield "first, factors by block", lambda: self.first([files.first], blocks=BY_BLOCK)
        yield (
            "first, a third of the blocks off",
            lambda: self.first([files.first], blocks=TWO_THIRDS),
        )
        yield "first, page cache cold", self._cold
        yield "first, page cache cold, read ahead", lambda: self._cold(ahead=True)
        yield "three LoRAs", lambda: self.first(files.three)
        yield "three LoRAs, bounded memory", lambda: self.first(files.three, **known.BOUNDED)
        yield "strength", self.strength
        yield "strength, factors by block", lambda: self.strength(blocks=BY_BLOCK)
        yield "strength, pieces in host memory", lambda: self.strength(**known.HOST_PIECES)
        yield "strength, pieces on the device", lambda: self.strength(**known.DEVICE_PIECES)
        yield "switch to a set used before", lambda: self._switch(cache_bytes=8 << 30)
        yield "switch, pieces in host memory", lambda: self._switch(**known.HOST_PIECES)
        yield "switch, pieces on the device", lambda: self._switch(**known.DEVICE_PIECES)
        yield "reset", self.reset
        yield "same stack again", self._same
        yield "forward, nothing changed", self._unchanged

    def first(self, paths: Sequence[Path], *, blocks: str = "", **wanted: object) -> Action:
        """From the base, with nothing kept of the files; buffers stay warm."""
        chosen = options(**wanted)
        stack = [qwenlora.LoraSpec(path, 0.8, blocks=blocks) for path in paths]
        return Action(
            lambda: qwenlora.compose_loras(self._model, stack, options=chosen),
            lambda: self._forget(chosen),
        )

    def strength(self, *, blocks: str = "", **wanted: object) -> Action:
        """Another strength of what is composed."""
        chosen = options(**wanted)
        self._forget()

        def change() -> None:
            self._turn += 1
            spec = qwenlora.LoraSpec(self._files.first, 0.5 + 0.001 * self._turn, blocks=blocks)
            qwenlora.compose_loras(self._model, spec, options=chosen)

        change()
        return Action(change)

    def reset(self) -> Action:
        """From a composed model to its base."""
        compose = lambda: qwenlora.compose_loras(self._model, (self._files.first, 0.8))  # noqa: E731
        return Action(lambda: qwenlora.reset_loras(self._model), compose)

    def _cold(self, *, ahead: bool = False) -> Action:
        """Nothing of the file in memory; or all of it read again, as nodes ask for, meanwhile."""
        if not hasattr(os, "posix_fadvise"):
            raise UnavailableError("this system does not let go of cached pages")
        first = self.first([self._files.first])

        def before() -> None:
            first.before()
            drop_from_page_cache(self._files.first)
            if ahead:
                qwenlora.LoraSet.of(self._files.first).read_ahead(limit_bytes=1 << 40)
                read_ahead.files.wait()

        return Action(first.run, before)

    def _switch(self, **wanted: object) -> Action:
        """To a set used before, and back."""
        chosen = options(**wanted)
        self._forget()

        def switch() -> None:
            self._turn += 1
            path = (self._files.first, self._files.other)[self._turn % 2]
            qwenlora.compose_loras(self._model, (path, 0.8), options=chosen)

        switch()
        switch()
        return Action(switch)

    def _same(self) -> Action:
        stack = (self._files.first, 0.8)
        qwenlora.compose_loras(self._model, stack)
        return Action(lambda: qwenlora.compose_loras(self._model, stack))

    def _unchanged(self) -> Action:
        wanted = qwenlora.LoraSet.of((self._files.first, 0.8))
        wrapper = qwenlora.ComfyQwenImageWrapper.of(self._model)
        return Action(lambda: wrapper.reconcile({"qwenlora": wanted}))

    def _forget(self, options: qwenlora.ComposeOptions | None = None) -> None:
        qwenlora.compose_loras(self._model, [], options=options)
        qwenlora.clear_cache()


def their_actions(engine: Engine, model: nn.Module, files: Files) -> Iterator[tuple[str, Action]]:
    """The same for another engine, as far as it does them; it starts and ends at the base."""
    one: Stack = [(files.first, 0.8)]
    turn = 0

    def change() -> None:
        nonlocal turn
        turn += 1
        engine.compose(model, [(files.first, 0.5 + 0.001 * turn)])

    def switch() -> None:
        nonlocal turn
        turn += 1
        engine.compose(model, [((files.first, files.other)[turn % 2], 0.8)])

    def base() -> None:
        engine.reset(model)

    yield "first", Action(lambda: engine.compose(model, one), base)
    three: Stack = [(path, 0.8) for path in files.three]
    yield "three LoRAs", Action(lambda: engine.compose(model, three), base)
    if engine.name == "repack":
        # It composes anew whatever changes, and has nothing to take back.
        return
    yield "strength", Action(change)
    yield "switch to a set used before", Action(switch)
    yield "reset", Action(base, lambda: engine.compose(model, one))


def measure_table(
    model: nn.Module,
    files: Files,
    others: Sequence[Engine],
    meter: Meter,
    *,
    only: Container[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the table, or some of its actions; a row that cannot be measured says why."""
    for action, make in OurActions(model, files).all():
        if only is not None and action not in only:
            continue
        row = {"suite": SUITE, "engine": "qwenlora", "action": action}
        try:
            yield row | meter.measure(make())
        except UnavailableError as error:
            yield row | {"skipped": str(error)}
    qwenlora.reset_loras(model)
    qwenlora.clear_cache()
    for engine in others:
        for action, steps in their_actions(engine, model, files):
            row = {"suite": SUITE, "engine": engine.name, "action": action}
            yield row | meter.measure(steps)
        engine.reset(model)
