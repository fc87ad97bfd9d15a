"""Stand-ins for a composition's background threads, as slow as they may ever be.

On a fast machine memory is often filled before anybody looks, whether or not anybody waited. With
these a look that comes too early sees NaN or what was there before, each time or now and then:

    from qwenlora.work.workers import employ

    with employ(LazyWorkers()):
        qwenlora.compose_loras(model, path)
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from qwenlora import _core
from qwenlora.errors import LoraReadError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from qwenlora.work.workers import Fillers, Readers

__all__ = ["LazyWorkers", "SleepyWorkers"]

_NAN_BYTE = 0xFF
"""Repeated, it is NaN in every floating dtype."""


class LazyWorkers:
    """Nothing is read or filled until it is waited for; until then new memory is NaN."""

    def readers(self, threads: int) -> Readers:
        """Read when waited for."""
        return _LazyReaders(threads)

    def fillers(self, threads: int) -> Fillers:
        """Fill when waited for."""
        return _LazyFillers(threads)


class SleepyWorkers:
    """Every piece of work begins after a sleep of random length."""

    def __init__(self, seed: int, *, longest_seconds: float = 0.002) -> None:
        """`seed` gives the lengths; none is longer than `longest_seconds`."""
        self._random = random.Random(seed)
        self._longest = longest_seconds

    def readers(self, threads: int) -> Readers:
        """Sleep before each reading."""
        return _SleepyReaders(threads, self._sleep)

    def fillers(self, threads: int) -> Fillers:
        """Sleep before each filling."""
        return _SleepyFillers(threads, self._sleep)

    def _sleep(self) -> None:
        time.sleep(self._random.random() * self._longest)


class _LazyReading:
    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read = read

    def wait(self) -> float | None:
        return self._read()


class _LazyReaders:
    def __init__(self, threads: int) -> None:
        self._own = _core.Readers(threads=threads)

    def read(
        self,
        reader: _core.TensorReader,
        runs: Sequence[tuple[Sequence[int], int, int]],
        dest: npt.NDArray[np.uint8],
        *,
        measure: str | None,
    ) -> _LazyReading:
        dest[:] = _NAN_BYTE
        return _LazyReading(lambda: self._own.read(reader, runs, dest, measure=measure).wait())

    def close(self) -> None:
        self._own.close()


class _LazyFilling:
    """One request; those before it are carried out first.

    Any thread may wait for it: the first one carries it out, the others wait until it is done.
    """

    def __init__(
        self, before: _LazyFilling | None, fill: Callable[[], None], lock: threading.RLock
    ) -> None:
        """`lock` is that of all requests of the same fillers."""
        self._before = before
        self._fill: Callable[[], None] | None = fill
        self._lock = lock
        self._done = False

    def wait(self) -> None:
        with self._lock:
            if self._before is not None:
                self._before.wait()
                self._before = None
            fill, self._fill = self._fill, None
            try:
                if fill is not None:
                    fill()
            finally:
                self._done = True

    def query(self) -> bool:
        return self._done

    def synchronize(self) -> None:
        self.wait()


class _LazyFillers:
    def __init__(self, threads: int) -> None:
        self._own = _core.Fillers(threads=threads)
        self._last: _LazyFilling | None = None
        self._lock = threading.RLock()

    def fill(self, recipes: Sequence[tuple[Any, ...]]) -> _LazyFilling:
        for memory, *_, columns in recipes:
            if not _keeps_any(columns):
                memory[:] = _NAN_BYTE
        self._last = _LazyFilling(self._last, lambda: self._own.fill(recipes).wait(), self._lock)
        return self._last

    def close(self) -> None:
        if self._last is not None:
            self._last.wait()
        self._own.close()


def _keeps_any(columns: Sequence[tuple[Any, ...]]) -> bool:
    """Tell if a part of the memory keeps its contents; see `_core.fill_packed`."""
    kept = [column for column in columns if column[0] == "keep" and column[1]]
    return bool(kept) or any(column[0] == "up over" for column in columns)


class _SleepyReading:
    def __init__(self, read: Future[float | None]) -> None:
        self._read = read

    def wait(self) -> float | None:
        try:
            return self._read.result()
        except CancelledError as error:
            raise LoraReadError("reading was stopped") from error


class _SleepyReaders:
    def __init__(self, threads: int, sleep: Callable[[], None]) -> None:
        self._own = _core.Readers(threads=threads)
        self._sleep = sleep
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="qwenlora-sleepy")

    def read(
        self,
        reader: _core.TensorReader,
        runs: Sequence[tuple[Sequence[int], int, int]],
        dest: npt.NDArray[np.uint8],
        *,
        measure: str | None,
    ) -> _SleepyReading:
        def read() -> float | None:
            self._sleep()
            return self._own.read(reader, runs, dest, measure=measure).wait()

        return _SleepyReading(self._pool.submit(read))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._own.close()


class _SleepyFilling:
    def __init__(self, fill: Future[None]) -> None:
        self._fill = fill

    def wait(self) -> None:
        self._fill.result()

    def query(self) -> bool:
        return self._fill.done()

    def synchronize(self) -> None:
        self._fill.exception()


class _SleepyFillers:
    def __init__(self, threads: int, sleep: Callable[[], None]) -> None:
        self._own = _core.Fillers(threads=threads)
        self._sleep = sleep
        # One thread: requests are carried out in order.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="qwenlora-sleepy")

    def fill(self, recipes: Sequence[tuple[Any, ...]]) -> _SleepyFilling:
        def fill() -> None:
            self._sleep()
            self._own.fill(recipes).wait()

        return _SleepyFilling(self._pool.submit(fill))

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._own.close()
