"""Host memory as bytes: that of a tensor, and new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["host_bytes", "new_bytes", "zero_bytes"]


def host_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A contiguous host tensor's memory, which they share."""
    return tensor.view(torch.uint8).numpy()


def new_bytes(nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8 of new host memory, with any content.

    NumPy asks the system for huge pages: the memory is then touched four times as fast.
    """
    return torch.from_numpy(np.empty(nbytes, dtype=np.uint8))


def zero_bytes(nbytes: int) -> torch.Tensor:
    """The same, all zero."""
    return torch.from_numpy(np.zeros(nbytes, dtype=np.uint8))
