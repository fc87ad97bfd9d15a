"""The table of parts. A new kind is a row here, and a function in the file of its family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.delta.parts import PartKind
from qwenlora.slots.parts.diagonal import factor_change, with_input_factor
from qwenlora.slots.parts.product import dense_change, kron_change
from qwenlora.slots.parts.rotation import (
    butterfly_change,
    rotation_change,
    with_input_rotation,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from qwenlora.slots.parts.part import Held

__all__ = ["OF_INPUT", "OF_OUTPUT", "ON_INPUT"]


OF_INPUT: Mapping[PartKind, Callable[[Held, Tensor], Tensor]] = {
    PartKind.KRON: kron_change,
    PartKind.DENSE: dense_change,
}
"""What a part adds to its rows, from the raw input (..., K)."""
OF_OUTPUT: Mapping[PartKind, Callable[[Held, Tensor], Tensor]] = {
    PartKind.FACTOR: factor_change,
    PartKind.ROTATION: rotation_change,
    PartKind.BUTTERFLY: butterfly_change,
}
"""What a part adds to its rows, from these rows of the layer's output on the raw input."""
ON_INPUT: Mapping[PartKind, Callable[[Held, Tensor, Tensor], Tensor]] = {
    PartKind.INPUT_FACTOR: with_input_factor,
    PartKind.INPUT_ROTATION: with_input_rotation,
    PartKind.PASS: with_input_rotation,
}
"""A sum (..., K) with what a part adds to the layer's input, from the raw input."""
