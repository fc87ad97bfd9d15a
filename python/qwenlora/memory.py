"""What device memory is free: asked before it is taken, since some drivers spill, not fail."""

from __future__ import annotations

import torch

__all__ = ["DEVICE_RESERVE", "free_bytes", "is_free"]

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
