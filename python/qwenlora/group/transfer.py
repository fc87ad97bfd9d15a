"""Loads on the device that their slots are on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.group.filler import Filler
    from qwenlora.group.load import Staged
    from qwenlora.group.loader import Copied

__all__ = ["BUFFERS", "DeviceTransfer", "HostTransfer", "Transfer", "transfer_to"]


BUFFERS = 2
"""Device buffers: one is packed from while the other is filled, which takes longer."""


class Transfer(Protocol):
    """Brings loads to a device, one after the other."""

    def reserve(self) -> None:
        """Take the memory that bringing loads which are not kept needs."""

    def bring(self, staged: Staged, *, keep: bool) -> Tensor:
        """The load's bytes, (nbytes,) uint8 on the device.

        Args:
            staged: The load.
            keep: Whether they are wanted beyond the next load.
        """

    def used(self) -> Copied | None:
        """All work on the load that was brought last has been queued.

        Returns:
            When its host buffer is read no more; None where it is free already.
        """

    def close(self) -> None:
        """Free the device's memory, safely."""


def transfer_to(
    device: torch.device, buffer_bytes: int, *, filler: Filler | None = None
) -> Transfer:
    """Make the transfer that brings loads to this device.

    Args:
        device: Of the slots.
        buffer_bytes: Size of the largest load.
        filler: Fills host memory from loads; None where that is done at once.
    """
    return DeviceTransfer(device, buffer_bytes) if device.type == "cuda" else HostTransfer(filler)


class HostTransfer:
    """Slots in host memory are packed from where the load was read to."""

    def __init__(self, filler: Filler | None = None) -> None:
        self._filler = filler

    def reserve(self) -> None:
        """Nothing is needed."""

    def bring(self, staged: Staged, *, keep: bool) -> Tensor:
        """The buffer itself."""
        return staged.bytes

    def used(self) -> Copied | None:
        """The buffer is free when what is being filled now is done."""
        return None if self._filler is None else self._filler.begun()

    def close(self) -> None:
        """Do nothing: no memory was taken."""


class DeviceTransfer:
    """Copies on a separate stream, so that one load is copied while another is packed."""

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._current = torch.cuda.current_stream(device)
        self._buffers: list[Tensor] = []
        self._free: list[torch.cuda.Event] = []
        self._turn = 0
        self._copied: torch.cuda.Event | None = None
        self._in_ring = False

    def reserve(self) -> None:
        """Allocate the ring."""
        if not self._buffers:
            made = [self._allocate(self._buffer_bytes) for _ in range(BUFFERS)]
            self._buffers, self._free = [b for b, _ in made], [e for _, e in made]

    def bring(self, staged: Staged, *, keep: bool) -> Tensor:
        """Copy the load to the next buffer, or to a new one."""
        self._copied, self._in_ring = None, False
        if not staged.on_host:
            return staged.bytes
        if keep:
            buffer, free = self._allocate(staged.nbytes)
        else:
            self._in_ring = True
            self.reserve()
            buffer, free = self._buffers[self._turn][: staged.nbytes], self._free[self._turn]
        self._copied = _event()
        self._stream.wait_event(free)
        self._copy(buffer, staged.bytes)
        self._copied.record(self._stream)
        self._current.wait_event(self._copied)
        return buffer

    def _copy(self, buffer: Tensor, source: Tensor) -> None:
        # The context manager of streams asks the driver what devices there are, each time.
        device = torch.cuda.current_device()
        torch.cuda.set_stream(self._stream)
        try:
            buffer.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(self._current)
            torch.cuda.set_device(device)

    def used(self) -> Copied | None:
        """A buffer of the ring is free when what is queued now is done."""
        if self._in_ring:
            self._free[self._turn].record(self._current)
            self._turn = (self._turn + 1) % len(self._buffers)
        return self._copied

    def close(self) -> None:
        """Free the buffers. Work that takes their memory next runs after the last copy into it."""
        self._current.wait_stream(self._stream)
        self._buffers.clear()

    def _allocate(self, nbytes: int) -> tuple[Tensor, torch.cuda.Event]:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        free = _event()
        # Memory that was freed a moment ago may still be in use by work that is queued.
        free.record(self._current)
        return buffer, free


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
