"""The scale of strengths: logarithmic, one for all maps of a picture, and its colours.

The colours are those of viridis but for its darkest sixth, which the dark ground would swallow:
brighter is stronger, also for people who do not tell red from green, and in print.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Color", "Scale", "hex_of", "percent"]

Color = tuple[int, int, int]
"""Red, green and blue, each 0 to 255."""
_COLORS: tuple[Color, ...] = (
    (70, 50, 127),
    (59, 82, 139),
    (49, 104, 142),
    (39, 127, 142),
    (31, 150, 139),
    (53, 183, 121),
    (109, 205, 89),
    (180, 222, 44),
    (253, 231, 37),
)
_STEPS = (1, 2, 5)
_WIDEST = 1e3
"""The most that the strongest is above the end of the scale; what is below has its colour."""
_NARROWEST = 10
_UNKNOWN = (1e-3, 1e-2)
"""Where nothing is changed."""
_SLACK = 1 + 1e-9


@dataclass(frozen=True)
class Scale:
    """A logarithmic scale.

    Attributes:
        low: The strength at its dark end, 1, 2 or 5 times a power of ten; also of all below it.
        high: That at its bright end, likewise.
    """

    low: float
    high: float

    @classmethod
    def of(cls, strengths: Iterable[float]) -> Scale:
        """The scale that spans all strengths, as far as they are not tiny beside the strongest."""
        found = [own for own in strengths if own > 0 and math.isfinite(own)]
        if not found:
            return cls(*_UNKNOWN)
        high = _round(max(found), up=True)
        low = min(_round(min(found), up=False), high / _NARROWEST)
        return cls(max(low, high / _WIDEST), high)

    def place(self, strength: float) -> float:
        """Where a strength is on the scale: 0 to 1."""
        if strength <= self.low:
            return 0.0
        return min(1.0, math.log(strength / self.low) / math.log(self.high / self.low))

    def color(self, strength: float) -> Color:
        """The colour of a strength."""
        return color_at(self.place(strength))

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten on the scale, ascending."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (step * 10.0**power for power in range(first, last + 1) for step in _STEPS)
        return [own for own in steps if self.low / _SLACK <= own <= self.high * _SLACK]


def color_at(place: float) -> Color:
    """The colour at a place from 0 to 1."""
    at = min(max(place, 0.0), 1.0) * (len(_COLORS) - 1)
    first = min(int(at), len(_COLORS) - 2)
    share = at - first
    red, green, blue = (
        round(a + share * (b - a)) for a, b in zip(_COLORS[first], _COLORS[first + 1], strict=True)
    )
    return red, green, blue


def hex_of(color: Color) -> str:
    """A colour as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def percent(strength: float) -> str:
    """A strength in words, as a share of a typical weight."""
    share = 100 * strength
    return f"{share:.0f} %" if share >= 100 else f"{share:.2g} %"


def _round(strength: float, *, up: bool) -> float:
    """The next 1, 2 or 5 times a power of ten, above or below."""
    power = 10.0 ** math.floor(math.log10(strength))
    steps = [step * power * ten for ten in (0.1, 1, 10) for step in _STEPS]
    if up:
        return min(own for own in steps if own * _SLACK >= strength)
    return max(own for own in steps if own <= strength * _SLACK)
