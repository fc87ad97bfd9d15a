"""Memory: what a device has free, since some drivers spill and do not fail; new one on the host."""

from __future__ import annotations

import torch

__all__ = ["DEVICE_RESERVE", "DeviceMemory"]


DEVICE_RESERVE = 8 << 30
"""Device memory that must stay free besides what is cached there: for activations and the decoder.
"""


class DeviceMemory:
    """Free memory of devices; each is asked once, since the driver takes a millisecond for it."""

    def __init__(self) -> None:
        self._free: dict[torch.device, int] = {}

    def has(self, device: torch.device, nbytes: int) -> bool:
        """Tell if more than this can be had: from the driver, or from what torch holds unused."""
        self.ask(device)
        free = self._free[device]
        # What torch holds unused is slower to ask for.
        return nbytes < free or nbytes < free + _unused_bytes(device)

    def ask(self, device: torch.device) -> None:
        """Ask now what is asked only once: later the driver may be busy."""
        if device not in self._free:
            self._free[device], _ = torch.cuda.mem_get_info(device)

    def changed(self) -> None:
        """Forget the answers, so that devices are asked again: memory was freed."""
        self._free.clear()


def _unused_bytes(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
