"""The weight of one adapter, in the forms that diffusers takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

from qwenlora.errors import AdapterWeightError

__all__ = ["ONE", "Weight", "one_for_each", "weight_of"]


@dataclass(frozen=True)
class Weight:
    """The strength of one adapter.

    Attributes:
        strength: Factor on the whole delta.
        by_name: Pairs of a part of a layer's path and a factor; the first that is in a path holds
            for it, and 1 for a path that has none of them.
    """

    strength: float = 1.0
    by_name: tuple[tuple[str, float], ...] = ()


ONE = Weight()


def one_for_each(names: Sequence[str], weights: object) -> list[object]:
    """Bring weights to a list with one for each name; a single weight is every name's.

    Raises:
        AdapterWeightError: There are more or fewer weights than names.
    """
    listed = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
    if len(listed) != len(names):
        raise AdapterWeightError(
            f"length of adapter names {len(names)} is not equal to the length of the weights"
            f" {len(listed)}"
        )
    return listed


def weight_of(name: str, given: object) -> Weight:
    """Read one adapter's weight: a number, None for 1, or numbers by parts of layers' paths.

    Raises:
        TypeError: It is of another form.
        AdapterWeightError: A number is not finite.
    """
    if given is None:
        return ONE
    if not isinstance(given, Mapping):
        return Weight(_number(name, given))
    for part in given:
        if not isinstance(part, str):
            raise TypeError(f"the weights of `{name}` are by parts of paths, not {part!r:.80}")
    return Weight(by_name=tuple((part, _number(name, own)) for part, own in given.items()))


def _number(name: str, given: object) -> float:
    if isinstance(given, Mapping) or not isinstance(given, SupportsFloat):
        raise TypeError(f"a weight of `{name}` is {given!r:.80}: it is a number")
    strength = float(given)
    if not math.isfinite(strength):
        raise AdapterWeightError(f"a weight of `{name}` is {strength}: it must be finite")
    return strength
