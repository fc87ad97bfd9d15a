"""Memory: what a device has free, since some drivers spill and do not fail; new one on the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["DEVICE_RESERVE", "free_bytes", "host_bytes", "is_free", "new_bytes", "zero_bytes"]

DEVICE_RESERVE = 8 << 30
"""Device memory that must stay free beside what is cached there: for activations and the decoder.
"""


def is_free(device: torch.device, nbytes: int) -> bool:
    """Whether more than this much device memory can be had."""
    driver, _ = torch.cuda.mem_get_info(device)
    # What torch holds unused is slower to ask for.
    return nbytes < driver or nbytes < free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Device memory that can be had: what the driver has, and what torch holds unused."""
    driver, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(driver + held)


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
