"""Maps as text: coloured cells on a terminal that shows them, else a character for each."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from qwenlora.console import plain
from qwenlora.map.change import DeltaMap, State
from qwenlora.map.grid import Grid
from qwenlora.map.scale import Scale, color_at, percent
from qwenlora.map.scene import MEANING, summary

if TYPE_CHECKING:
    from qwenlora.map.scale import Color

__all__ = ["COLOR_CHOICES", "Colors", "colors_of", "draw"]

COLOR_CHOICES = ("auto", "always", "never")
"""The values of `--color`."""
_LEVELS = 10
_MARKS: Mapping[State | None, tuple[str, str]] = {
    None: (".", "not trained"),
    State.ZERO: ("o", "zero"),
    State.NEEDS_BASE: ("/", "needs the base weight"),
    State.LEFT_OUT: ("-", "not applied"),
    State.DAMAGED: ("!", "NaN or infinity"),
}
_GROUND: Color = (58, 64, 74)
_CUBE = (0, 95, 135, 175, 215, 255)
"""Values of the cube's sides."""
_WIDTH = 80
_RESET = "\x1b[0m"


class Colors(Enum):
    """The colours that a terminal shows."""

    NONE = "none"
    """None: digits stand for them."""
    INDEXED = "256"
    """Those of a cube of 6 x 6 x 6."""
    TRUE = "truecolor"
    """All."""


def colors_of(choice: str) -> Colors:
    """The colours for standard output.

    Args:
        choice: `auto`, `always` or `never`; "auto" follows the terminal and NO_COLOR.
    """
    if choice == "never" or (choice == "auto" and not _shows_colors()):
        return Colors.NONE
    has_all = os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit")
    return Colors.TRUE if has_all else Colors.INDEXED


def _shows_colors() -> bool:
    environ = os.environ
    # https://no-color.org: any value but the empty one counts.
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return False
    # An old console of Windows prints escape sequences as they are.
    return os.name != "nt" or any(name in environ for name in ("WT_SESSION", "ANSICON", "TERM"))


def draw(maps: Sequence[DeltaMap], colors: Colors) -> str:
    """Maps one below the other, on one scale; those of known models take 80 columns at most."""
    scale = Scale.of(strength for own in maps for strength in own.strengths.values())
    lines: list[str] = []
    for own in maps:
        lines += [*_panel(own, scale, colors), ""]
    return "\n".join([*lines, *_legend(maps, scale, colors)]) + "\n"


def _panel(own: DeltaMap, scale: Scale, colors: Colors) -> Iterator[str]:
    grid = Grid.of(own.paths, own.modules)
    known = frozenset(own.paths)
    labels = [row.label for row in grid.rows]
    margin = max(map(len, labels), default=0) + 2
    yield plain(own.title)
    yield from textwrap.wrap(plain(summary(own)), _WIDTH)
    yield from _heads(grid, margin)
    for row in grid.rows:
        lists = [
            "".join(
                _cell(own, f"{columns.path}.{number}.{row.tail}", scale, colors, known)
                for number in range(columns.count)
            )
            for columns in grid.columns
        ]
        yield f"{row.label:<{margin}}{'  '.join(lists)}".rstrip()
    yield from _outside(own, grid, scale, colors)


def _heads(grid: Grid, margin: int) -> Iterator[str]:
    """The numbers of the blocks, and the names of lists where there are several."""
    if len(grid.columns) > 1:
        names = ", ".join(f"{columns.label} 0-{columns.count - 1}" for columns in grid.columns)
        yield " " * margin + names
    lists = []
    for columns in grid.columns:
        head = "".join(f"{number:<10}" for number in range(0, columns.count, 10))
        lists.append(f"{head[: columns.count]:<{columns.count}}")
    yield (" " * margin + "  ".join(lists)).rstrip()


def _outside(own: DeltaMap, grid: Grid, scale: Scale, colors: Colors) -> Iterator[str]:
    line, used = "", 0
    for label, path in grid.outside:
        size = len(label) + 4
        if used and used + size > _WIDTH:
            yield line.rstrip()
            line, used = "", 0
        line += f"{_cell(own, path, scale, colors, None)} {label}  "
        used += size
    if line:
        yield line.rstrip()


def _cell(
    own: DeltaMap, path: str, scale: Scale, colors: Colors, known: frozenset[str] | None
) -> str:
    """One character; `known` are the paths that there are, where not all need be."""
    if known is not None and path not in known:
        return " "
    change = own.modules.get(path)
    if change is None or change.state is not State.CHANGED:
        return _mark(None if change is None else change.state, colors)
    place = scale.place(change.strength)
    if colors is Colors.NONE:
        return _digit(place)
    return f"{_background(color_at(place), colors)} {_RESET}"


def _digit(place: float) -> str:
    return str(min(_LEVELS - 1, int(place * _LEVELS)))


def _mark(state: State | None, colors: Colors) -> str:
    character, _ = _MARKS[state]
    if colors is Colors.NONE or state is None:
        return character
    return f"{_background(_GROUND, colors)}{character}{_RESET}"


def _background(color: Color, colors: Colors) -> str:
    if colors is Colors.TRUE:
        return "\x1b[48;2;{};{};{}m".format(*color)
    red, green, blue = (
        min(range(len(_CUBE)), key=lambda at: abs(_CUBE[at] - own)) for own in color
    )
    return f"\x1b[48;5;{16 + 36 * red + 6 * green + blue}m"


def _legend(maps: Sequence[DeltaMap], scale: Scale, colors: Colors) -> Iterator[str]:
    if colors is Colors.NONE:
        ratio = scale.high / scale.low
        steps = [percent(scale.low * ratio ** (at / _LEVELS)) for at in range(_LEVELS)]
        ramp = "  ".join(f"{at}: {step}" for at, step in enumerate(steps) if at % 3 == 0)
        yield f"from  {ramp}  to {percent(scale.high)}"
    else:
        cells = (f"{_background(color_at(at / 29), colors)} {_RESET}" for at in range(30))
        yield f"{percent(scale.low)} {''.join(cells)} {percent(scale.high)}"
    yield MEANING
    states = {None} | {change.state for own in maps for change in own.modules.values()}
    marks = [
        f"{_mark(state, colors)} {label}" for state, (_, label) in _MARKS.items() if state in states
    ]
    yield "  ".join(marks)
