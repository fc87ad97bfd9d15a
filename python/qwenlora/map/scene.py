"""The picture of maps as rectangles, lines and texts: what every format of a picture draws."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unicodedata import east_asian_width

from qwenlora.console import plain
from qwenlora.map.change import DeltaMap, State
from qwenlora.map.grid import Grid
from qwenlora.map.scale import Color, Scale, color_at, percent
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

__all__ = ["MEANING", "Line", "Rect", "Scene", "Text", "scene_of", "scene_of_text", "summary"]

MEANING = "rms of the delta; 100 % is a typical weight, of rms 1 / sqrt(inputs)"
"""What the numbers are."""

_GROUND: Color = (22, 24, 29)
_TEXT: Color = (230, 232, 235)
_QUIET: Color = (160, 168, 178)
_EMPTY: Color = (40, 44, 52)
_HATCHED: Color = (58, 64, 74)
_MARK: Color = (214, 219, 226)
_ALARM: Color = (255, 128, 114)
_CELL, _PITCH = 16, 18
_MARGIN, _LABELS = 20, 140
_BETWEEN_LISTS = 14
_SMALL, _NORMAL, _LARGE = 11, 13, 16
_OUTSIDE_WIDTH = 152
_LEGEND_WIDTH, _LEGEND_STEPS = 360, 60
_TICK_DISTANCE = 30
_MIN_WIDTH = 900
_TITLE_WIDTH = 9
"""Width of a letter of the title, at most."""


@dataclass(frozen=True)
class Rect:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    fill: Color


@dataclass(frozen=True)
class Line:
    """A line from one point to another."""

    x: float
    y: float
    to_x: float
    to_y: float
    color: Color
    width: float = 1.0


@dataclass(frozen=True)
class Text:
    """A text on one line; `y` is its base line, `anchor` "start", "middle" or "end"."""

    x: float
    y: float
    text: str
    size: int
    color: Color
    anchor: str = "start"


Shape: TypeAlias = "Rect | Line | Text"


@dataclass
class Scene:
    """Shapes in the order in which they are drawn, on a ground of one colour."""

    width: int = _MIN_WIDTH
    height: int = 0
    ground: Color = _GROUND
    shapes: list[Shape] = field(default_factory=list)


def scene_of(maps: Sequence[DeltaMap]) -> Scene:
    """Draw maps one below the other, so that their blocks are in line, on one scale."""
    scale = Scale.of(strength for own in maps for strength in own.strengths.values())
    grids = [Grid.of(own.paths, own.modules) for own in maps]
    scene = Scene(width=max(_MIN_WIDTH, *map(_width, grids)))
    y = float(_MARGIN)
    for own, grid in zip(maps, grids, strict=True):
        y = _Panel(scene, own, grid, scale).draw(y) + _MARGIN
    scene.height = int(_legend(scene, maps, scale, y) + _MARGIN)
    return scene


def scene_of_text(title: str, text: str) -> Scene:
    """A picture of words, where there is nothing to draw."""
    scene = Scene()
    y: float = _MARGIN + _LARGE
    scene.shapes.append(Text(_MARGIN, y, _short(title, scene.width), _LARGE, _TEXT))
    for line in text.splitlines():
        y += 22
        scene.shapes.append(Text(_MARGIN, y, _short(line, scene.width), _NORMAL, _QUIET))
    scene.height = int(y) + _MARGIN
    return scene


def _width(grid: Grid) -> int:
    between = _BETWEEN_LISTS * max(0, len(grid.columns) - 1)
    return 2 * _MARGIN + _LABELS + grid.width * _PITCH + between


class _Panel:
    """One map in a picture."""

    def __init__(self, scene: Scene, own: DeltaMap, grid: Grid, scale: Scale) -> None:
        self._scene, self._map, self._grid, self._scale = scene, own, grid, scale
        self._left = _MARGIN + _LABELS

    def draw(self, y: float) -> float:
        """Draw it from here on; where it ends."""
        y += _LARGE
        self._text(_MARGIN, y, _short(self._map.title, self._scene.width), _LARGE, _TEXT)
        y += 20
        self._text(_MARGIN, y, _short(summary(self._map), self._scene.width), _NORMAL, _QUIET)
        y += 24 if len(self._grid.columns) == 1 else 40
        self._columns(y)
        y += 7
        for row in self._grid.rows:
            self._text(self._left - 10, y + _CELL - 4, row.label, _NORMAL, _TEXT, anchor="end")
            for x, path in self._places(row.tail):
                self._cell(x, y, path)
            y += _PITCH
        return self._outside(y + 10)

    def _columns(self, y: float) -> None:
        """The numbers of the blocks, and the names of lists where there are several."""
        x = float(self._left)
        for columns in self._grid.columns:
            if len(self._grid.columns) > 1:
                self._text(x, y - 14, columns.label, _SMALL, _QUIET)
            for number in range(columns.count):
                if number % 5 == 0:
                    at = x + number * _PITCH + _CELL / 2
                    self._text(at, y, str(number), _SMALL, _QUIET, anchor="middle")
            x += columns.count * _PITCH + _BETWEEN_LISTS

    def _places(self, tail: str) -> list[tuple[float, str]]:
        places = []
        x = float(self._left)
        for columns in self._grid.columns:
            for number in range(columns.count):
                path = f"{columns.path}.{number}.{tail}"
                if path in self._known:
                    places.append((x, path))
                x += _PITCH
            x += _BETWEEN_LISTS
        return places

    @property
    def _known(self) -> frozenset[str]:
        return frozenset(self._map.paths)

    def _outside(self, y: float) -> float:
        """The modules outside of the blocks, in lines of cells with their names."""
        if not self._grid.outside:
            return y
        self._text(
            self._left - 10, y + _CELL - 4, "outside of blocks", _NORMAL, _TEXT, anchor="end"
        )
        per_line = max(1, (self._scene.width - self._left - _MARGIN) // _OUTSIDE_WIDTH)
        for at, (label, path) in enumerate(self._grid.outside):
            x = self._left + (at % per_line) * _OUTSIDE_WIDTH
            top = y + (at // per_line) * (_PITCH + 2)
            self._cell(x, top, path)
            self._text(x + _CELL + 6, top + _CELL - 4, label, _SMALL, _QUIET)
        lines = -(-len(self._grid.outside) // per_line)
        return y + lines * (_PITCH + 2)

    def _cell(self, x: float, y: float, path: str) -> None:
        change = self._map.modules.get(path)
        if change is not None and change.state is State.CHANGED:
            fill = self._scale.color(change.strength)
            self._scene.shapes.append(Rect(x, y, _CELL, _CELL, fill))
        else:
            self._scene.shapes += _marked_cell(x, y, None if change is None else change.state)

    def _text(
        self, x: float, y: float, text: str, size: int, color: Color, anchor: str = "start"
    ) -> None:
        self._scene.shapes.append(Text(x, y, text, size, color, anchor))


def _marked_cell(x: float, y: float, state: State | None) -> list[Shape]:
    """A cell without a colour of the scale; None where its module is not trained."""
    far_x, far_y = x + _CELL, y + _CELL
    ground = Rect(x, y, _CELL, _CELL, _HATCHED if state is State.NEEDS_BASE else _EMPTY)
    if state is State.NEEDS_BASE:
        half = _CELL / 2
        return [
            ground,
            Line(x, y + half, x + half, y, _MARK),
            Line(x, far_y, far_x, y, _MARK),
            Line(x + half, far_y, far_x, y + half, _MARK),
        ]
    if state is State.ZERO:
        return [ground, Rect(x + _CELL / 2 - 2, y + _CELL / 2 - 2, 4, 4, _MARK)]
    if state is State.LEFT_OUT:
        middle = y + _CELL / 2
        return [ground, Line(x + 3, middle, far_x - 3, middle, _MARK, 2)]
    if state is State.DAMAGED:
        return [
            ground,
            Line(x + 3, y + 3, far_x - 3, far_y - 3, _ALARM, 2),
            Line(x + 3, far_y - 3, far_x - 3, y + 3, _ALARM, 2),
        ]
    return [ground]


_LEGEND: tuple[tuple[State | None, str], ...] = (
    (None, "not trained"),
    (State.ZERO, "zero"),
    (State.NEEDS_BASE, "needs the base weight"),
    (State.LEFT_OUT, "not applied"),
    (State.DAMAGED, "NaN or infinity"),
)


def _legend(scene: Scene, maps: Sequence[DeltaMap], scale: Scale, y: float) -> float:
    """The colours and marks in use; where they end."""
    x = float(_MARGIN + _LABELS)
    step = _LEGEND_WIDTH / _LEGEND_STEPS
    for at in range(_LEGEND_STEPS):
        color = color_at(at / (_LEGEND_STEPS - 1))
        scene.shapes.append(Rect(x + at * step, y, step + 0.5, _CELL - 4, color))
    before = -float(_TICK_DISTANCE)
    for tick in scale.ticks():
        along = _LEGEND_WIDTH * scale.place(tick)
        if along - before < _TICK_DISTANCE:
            continue
        before = along
        scene.shapes.append(Line(x + along, y + _CELL - 4, x + along, y + _CELL, _QUIET))
        label = percent(tick)
        scene.shapes.append(Text(x + along, y + _CELL + 12, label, _SMALL, _QUIET, "middle"))
    scene.shapes.append(Text(x + _LEGEND_WIDTH + 24, y + 10, MEANING, _SMALL, _QUIET))
    own = {None} | {change.state for own in maps for change in own.modules.values()}
    y += _CELL + 26
    for state, label in _LEGEND:
        if state in own:
            scene.shapes += _marked_cell(x, y, state)
            scene.shapes.append(Text(x + _CELL + 6, y + _CELL - 4, label, _SMALL, _QUIET))
            x += _OUTSIDE_WIDTH
    return y + _CELL


def summary(own: DeltaMap) -> str:
    """A map in one line."""
    strongest = own.strongest
    parts = [counted(len(own.modules), "module")]
    if strongest is not None:
        parts += [
            f"median {percent(own.median)}",
            f"strongest {strongest[0]} ({percent(strongest[1])})",
        ]
    names = {State.ZERO: "zero", State.NEEDS_BASE: "of unknown size", State.DAMAGED: "damaged"}
    parts += [f"{own.count(state)} {name}" for state, name in names.items() if own.count(state)]
    left_out = own.left_out + own.count(State.LEFT_OUT)
    return ", ".join(parts + ([f"{left_out} left out"] if left_out else []))


def _short(text: str, width: float) -> str:
    """As much of a text as surely fits, on one line; letters of some scripts are twice as wide."""
    most = (width - 2 * _MARGIN) / _TITLE_WIDTH
    own = plain(text)
    ends = list(itertools.accumulate(2 if east_asian_width(c) in "WF" else 1 for c in own))
    if not ends or ends[-1] <= most:
        return own
    return own[: sum(end <= most - 3 for end in ends)] + "..."
