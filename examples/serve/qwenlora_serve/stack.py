"""A stack of LoRAs as a request names it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Stack"]

_SEPARATOR = ","
_FORBIDDEN = {"", ".", ".."}
_BAD_REQUEST = 400


@dataclass(frozen=True)
class Stack:
    """LoRAs by name with their strengths, in the order of the names.

    A sum does not depend on its order, so stacks that differ in it are one stack.

    Attributes:
        loras: Names and strengths; no name is there twice, and no strength is 0.
    """

    loras: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, loras: Iterable[tuple[str, float]]) -> Stack:
        """Check names and strengths, and bring them into order.

        Raises:
            RequestError: A name is none or is there twice, or a strength is not finite.
        """
        given = sorted(loras)
        for name, count in Counter(name for name, _ in given).items():
            _check_name(name)
            if count > 1:
                raise RequestError(_BAD_REQUEST, f"LoRA {name!r} is named {count} times")
        for name, strength in given:
            if not math.isfinite(strength):
                raise RequestError(
                    _BAD_REQUEST, f"LoRA {name!r} has strength {strength}: it is finite"
                )
        return cls(tuple((name, strength) for name, strength in given if strength))

    @property
    def model_id(self) -> str:
        """The id by which Ray knows who holds the stack: the names alone.

        A replica that has the files' deltas has them for every strength.
        """
        return _SEPARATOR.join(name for name, _ in self.loras)


def _check_name(name: str) -> None:
    """Check that a name is a file's below the folder, in folders or not, without its ending.

    Raises:
        RequestError: It is not.
    """
    parts = name.split("/")
    odd = any(char in ":\\" or char == _SEPARATOR or not char.isprintable() for char in name)
    if odd or any(part in _FORBIDDEN for part in parts):
        raise RequestError(
            _BAD_REQUEST,
            f"{name!r} is no name of a LoRA: names are paths below the folder of LoRAs, as"
            " 'style' or 'painters/style', without '..', ':', ',' and backslashes",
        )
