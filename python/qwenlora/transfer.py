"""Loads on the device that their slots are on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.staging import Staged

__all__ = ["DeviceTransfer", "HostTransfer", "Transfer", "transfer_to"]

_BUFFERS = 3
"""Device buffers: one is packed from, one filled, one waits for its turn."""


class Transfer(Protocol):
    """Brings loads to a device, one after the other."""

    def bring(self, staged: Staged) -> Tensor:
        """The load's bytes, (nbytes,) uint8 on the device, valid until the next but one."""

    def used(self) -> None:
        """All work on the load that was brought last has been queued."""

    def host_is_free(self) -> Callable[[], object] | None:
        """What waits until the host buffer of the load brought last is read no more."""

    def close(self) -> None:
        """Let the device's memory go, safely."""


def transfer_to(device: torch.device, buffer_bytes: int) -> Transfer:
    """What brings loads to this device.

    Args:
        device: Of the slots.
        buffer_bytes: Size of the largest load.
    """
    return DeviceTransfer(device, buffer_bytes) if device.type == "cuda" else HostTransfer()


class HostTransfer:
    """Slots in host memory are packed from where the load was read to."""

    def bring(self, staged: Staged) -> Tensor:
        """The buffer itself."""
        return staged.host

    def used(self) -> None:
        """Nothing is queued on the host."""

    def host_is_free(self) -> None:
        """It is, as soon as the load has been packed."""

    def close(self) -> None:
        """Nothing to let go."""


class DeviceTransfer:
    """Copies on a stream of its own, so that one load is copied while another is packed."""

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._current = torch.cuda.current_stream(device)
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(_BUFFERS)
        ]
        self._free = [_event() for _ in self._buffers]
        for event in self._free:
            # Memory that was let go a moment ago may still be in use by work that is queued.
            event.record(self._current)
        self._turn = 0
        self._copied = _event()

    def bring(self, staged: Staged) -> Tensor:
        """Copy the load to the next buffer."""
        buffer = self._buffers[self._turn][: staged.host.nbytes]
        self._copied = _event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[self._turn])
            buffer.copy_(staged.host, non_blocking=True)
            self._copied.record(self._stream)
        self._current.wait_event(self._copied)
        return buffer

    def used(self) -> None:
        """The buffer is free when what is queued now is done."""
        self._free[self._turn].record(self._current)
        self._turn = (self._turn + 1) % len(self._buffers)

    def host_is_free(self) -> Callable[[], object]:
        """When the copy is done."""
        return self._copied.synchronize

    def close(self) -> None:
        """What the buffers' memory is given to next runs after the last copy into it."""
        self._current.wait_stream(self._stream)
        self._buffers.clear()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
