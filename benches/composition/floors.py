"""What the machine allows: reading, pinning, transfer and copy, measured in the same run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from composition.files import drop_from_page_cache
from composition.measure import Action, Meter
from qwenlora import _core

if TYPE_CHECKING:
    from pathlib import Path

_CHUNK = 8 << 20


def measure_floors(path: Path, meter: Meter, threads: list[int]) -> dict[str, Any]:
    """Bytes per second of every stage that a file's bytes pass, by themselves.

    Args:
        path: A LoRA file, in the page cache.
        meter: Takes the times.
        threads: Numbers of threads to read with.
    """
    size = path.stat().st_size
    on_device = meter.device == "cuda"
    host = torch.ones(size, dtype=torch.uint8, pin_memory=on_device)
    read = {n: meter.time(Action(lambda n=n: _read(path, host, n))).median for n in threads}
    found: dict[str, Any] = {
        "bytes": size,
        "read": {str(n): size / seconds for n, seconds in read.items()},
    }
    if hasattr(os, "posix_fadvise"):
        cold = Action(lambda: _read(path, host, max(threads)), lambda: drop_from_page_cache(path))
        found["read_cold"] = size / meter.time(cold).median
    other = torch.ones(size, dtype=torch.uint8, device=meter.device)
    if on_device:
        send = Action(lambda: other.copy_(host, non_blocking=True))
        found["transfer"] = size / meter.time(send).median
        # An odd size: none of the allocator's kept blocks will do.
        pin = Action(lambda: torch.empty(size + 4097, dtype=torch.uint8, pin_memory=True))
        found["pin"] = size / meter.once(pin)
    there = torch.empty_like(other)
    found["copy"] = size / meter.time(Action(lambda: there.copy_(other))).median
    stages = [max(found["read"].values()), found.get("transfer", float("inf")), found["copy"]]
    found["slowest"] = min(stages)
    return found


def _read(path: Path, host: torch.Tensor, threads: int) -> None:
    size = len(host)
    ranges = [(begin, min(_CHUNK, size - begin), begin) for begin in range(0, size, _CHUNK)]
    reader = _core.TensorReader(path)
    reader.read_into(ranges, host.numpy(), threads=threads)
    reader.close()
