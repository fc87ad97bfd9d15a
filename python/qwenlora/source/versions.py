"""Tensors that count how often they were written to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["counts_writes"]


def counts_writes(tensor: Tensor) -> bool:
    """Tell if a tensor counts how often it was written to.

    One that was made in inference mode does not. Nor does one of that mode that was moved outside
    of it, although it says that it is a normal one.
    """
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False
