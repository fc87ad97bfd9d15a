"""Texts of entries such as `name:number, name:number; name:number`, and where each part begins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Piece", "factor_of", "number_of", "number_text", "sections", "shown"]

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SHOWN = 40
_LARGEST = 3.4e38
"""Products of a few factors and a strength stay numbers below this, which float32 holds."""
_FACTOR = "a factor is a number such as 0.5 or -1"


@dataclass(frozen=True)
class Piece:
    """A piece of a text without white space around it, and where it begins there."""

    text: str
    begin: int

    @classmethod
    def of(cls, text: str, begin: int) -> Piece:
        """Leave out the white space around a text that begins at a place."""
        return cls(text.strip(), begin + len(text) - len(text.lstrip()))

    def split(self) -> tuple[Piece, Piece] | None:
        """What is before and behind the first colon; None where there is none."""
        name, colon, number = self.text.partition(":")
        if not colon:
            return None
        return Piece.of(name, self.begin), Piece.of(number, self.begin + len(name) + 1)


def sections(text: str) -> Iterator[list[Piece]]:
    """The entries of each section; sections are divided by `;`, entries by `,`.

    A section of white space alone has none. An entry may be empty.
    """
    begin = 0
    for section in text.split(";"):
        at, found = begin, []
        for entry in section.split(",") if section.strip() else ():
            found.append(Piece.of(entry, at))
            at += len(entry) + 1
        yield found
        begin += len(section) + 1


def number_of(text: str) -> float | None:
    """The number that a text is in decimals; None where it is none. Zero has one sign."""
    return float(text) + 0.0 if _NUMBER.fullmatch(text) else None


def factor_of(number: Piece, wrong: Callable[[Piece, str, str], Exception]) -> float:
    """The factor that a piece is.

    Args:
        number: The piece.
        wrong: Makes the error, of the piece, what is wrong with it, and the way out.
    """
    factor = number_of(number.text)
    if factor is None:
        raise wrong(number, "is no factor", _FACTOR)
    if abs(factor) > _LARGEST:
        raise wrong(number, "is too large a factor", _FACTOR)
    return factor


def number_text(number: float) -> str:
    """The shortest text of a number that reads as the same."""
    return repr(number).removesuffix(".0")


def shown(text: str) -> str:
    """A text on one line, cut where it is long."""
    text = " ".join(text[: 2 * _SHOWN].split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
