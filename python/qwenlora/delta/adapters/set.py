"""A stored value that takes the place of the base's: its delta is what it differs by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.delta.finite import damaged, is_finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["set_delta"]


def set_delta(value: Tensor, base: Tensor, *, module: str) -> Tensor:
    """The value less the base's, which at strength 1 is replaced.

    Args:
        value: What is stored, with as many elements as the base's.
        base: The parameter, or those of its rows that are replaced; rows as in files.
        module: Its name, for errors.

    Returns:
        Float64, in the shape and on the device of `base`. Base plus delta is the value exactly
        where it is formed in float64.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    if not is_finite(value):
        raise damaged(module, "its set_weight")
    return value.to(base.device).double().reshape(base.shape) - base.double()
