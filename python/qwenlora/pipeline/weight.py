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
    """

    strength: float = 1.0


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
    """Read one adapter's weight: a number, or None for 1.

    Raises:
        TypeError: It is neither.
        AdapterWeightError: It is not finite.
    """
    if given is None:
        return ONE
    if isinstance(given, Mapping) or not isinstance(given, SupportsFloat):
        raise TypeError(f"the weight of `{name}` is {given!r:.80}: it is a number or None")
    strength = float(given)
    if not math.isfinite(strength):
        raise AdapterWeightError(f"the weight of `{name}` is {strength}: it must be finite")
    return Weight(strength)
