"""Medians, spreads and high-water marks of one action."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Times of one action in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half took longer."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """From the 10th to the 90th percentile."""
        ordered = sorted(self.seconds)
        cut = len(ordered) // 10
        return ordered[-1 - cut] - ordered[cut]

    def document(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "median_s": self.median,
            "spread_s": self.spread,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "n": len(self.seconds),
        }


@dataclass(frozen=True)
class HighWater:
    """Bytes held before, at most during and after one action."""

    before: int
    peak: int
    after: int

    @property
    def extra(self) -> int:
        """What was held for a while only: beyond what was there before, or is there after."""
        return max(0, self.peak - max(self.before, self.after))

    def document(self) -> dict[str, int]:
        """JSON-able."""
        return {
            "before": self.before,
            "peak": self.peak,
            "after": self.after,
            "extra": self.extra,
        }


@dataclass(frozen=True)
class Action:
    """What is measured, and what brings about the state that it starts from."""

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


class Meter:
    """Takes measurements on one device.

    Attributes:
        device: "cpu" or "cuda".
        repeat: Times that an action is timed.
        budget: Seconds after which an action is not timed again, once it was `least` times.
        least: See `budget`.
    """

    def __init__(self, device: str, *, repeat: int, budget: float, least: int = 3) -> None:
        self.device = device
        self.least = least
        self.repeat = repeat
        self.budget = budget

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def once(self, action: Action) -> float:
        """Seconds of one run."""
        action.before()
        self.wait()
        started = time.perf_counter()
        action.run()
        self.wait()
        return time.perf_counter() - started

    def time(self, action: Action, *, warm_up: int = 1) -> Timing:
        """Time it until there are enough times, or the budget is spent."""
        gc.collect()
        for _ in range(warm_up):
            self.once(action)
        began = time.perf_counter()
        times: list[float] = []
        while len(times) < self.repeat:
            times.append(self.once(action))
            if len(times) >= self.least and time.perf_counter() - began > self.budget:
                break
        return Timing(tuple(times))

    def memory(self, action: Action) -> dict[str, Any]:
        """High-water marks of one run: device (torch's allocator), pinned, resident host memory."""
        action.before()
        self.wait()
        gc.collect()
        marks: dict[str, HighWater] = {}
        with contextlib.ExitStack() as open_:
            host = open_.enter_context(_host_peak())
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                device_before, pinned_before = torch.cuda.memory_allocated(), _pinned("current")
                _reset_pinned_peak()
            action.run()
            self.wait()
            if self.device == "cuda":
                marks["device"] = HighWater(
                    device_before,
                    torch.cuda.max_memory_allocated(),
                    torch.cuda.memory_allocated(),
                )
                if pinned_before is not None:
                    peak, after = _pinned("peak"), _pinned("current")
                    marks["pinned"] = HighWater(pinned_before, peak or 0, after or 0)
        marks["host"] = HighWater(*host)
        return {name: mark.document() for name, mark in marks.items()}

    def measure(self, action: Action) -> dict[str, Any]:
        """Times and high-water marks."""
        return {**self.time(action).document(), "memory": self.memory(action)}


def _pinned(which: str) -> int | None:
    """Bytes of torch's pinned allocator, in versions that count them."""
    stats = getattr(torch.cuda, "host_memory_stats", None)
    if stats is None:
        return None
    return stats().get(f"allocated_bytes.{which}", 0)


def _reset_pinned_peak() -> None:
    reset = getattr(torch.cuda, "reset_peak_host_memory_stats", None)
    if reset is not None:
        reset()


@contextlib.contextmanager
def _host_peak() -> Iterator[list[int]]:
    """Fills the list with resident bytes before, at most during and after the block."""
    _trim()
    found: list[int] = []
    before = _resident("VmRSS")
    if _reset_mark(before):
        yield found
        peak = _resident("VmHWM")
    else:
        with _Sampler() as sampler:
            yield found
        peak = max(sampler.peak, before)
    # What was let go is still resident until the heap gives it back.
    gc.collect()
    _trim()
    found += [before, peak, _resident("VmRSS")]


def _reset_mark(before: int) -> bool:
    """Whether the system's own high-water mark could be set to what is held now."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return 0 < _resident("VmHWM") < before + (1 << 20)


def _resident(field: str) -> int:
    """A figure of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(v.split()[1]) << 10 for v in lines if v.startswith(f"{field}:")), 0)


class _Sampler:
    """Looks at the resident bytes every millisecond, where the system keeps no mark."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _resident("VmRSS"))

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _trim() -> None:
    """Give freed heap back, so that what is resident is what is held."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def geometric(low: int, high: int) -> list[int]:
    """Doublings from `low`, and `high` itself."""
    count = max(0, math.ceil(math.log2(high / low)))
    return [low << i for i in range(count)] + [high]
