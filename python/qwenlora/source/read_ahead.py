"""Files brought into the system's memory before anybody asks for their tensors.

A host makes a set long before the first forward that wants it: what is read meanwhile, while text
is encoded and models are loaded, need not be waited for then. The system keeps what was read, as it
keeps all files, as long as nothing else needs the memory; we keep nothing of it.
"""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from qwenlora import _core
from qwenlora.errors import LoraFileError, LoraReadError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ReadAhead", "files"]


_log = logging.getLogger("qwenlora")
_PART_BYTES = 4 << 20
"""Read at a time; in between it is asked whether the file is still wanted."""
_POLL_SECONDS = 0.002
"""Time between two looks of `wait`."""


class ReadAhead:
    """Reads whole files on one thread, one after the other, front to back: what disks do best.

    The thread runs while there is something to read.
    """

    def __init__(self) -> None:
        self._waiting: deque[Path] = deque()
        self._current: Path | None = None
        # The thread itself says that it runs, and that it ends: an interrupt where it is started
        # tells nobody whether it was, and leaves conditions of `threading` locked.
        self._working: object | None = None
        self._lock = threading.RLock()

    def add(self, path: Path) -> None:
        """Read a file, or a PEFT folder's weights, after those that wait; what fails is let be."""
        with self._lock:
            if path == self._current or path in self._waiting:
                return
            self._waiting.append(path)
            if self._working is not None:
                return
        self._start()

    def _start(self) -> None:
        # Nobody waits for it when the program ends.
        try:
            _thread.start_new_thread(self._work, ())
        except RuntimeError as error:
            # The system gives no more threads: whoever needs the file reads it.
            _log.debug("nothing is read ahead: %s", error)
            self.clear()

    def cancel(self, path: Path) -> None:
        """Read no more of a file: whoever needs it reads it now."""
        with self._lock:
            if path in self._waiting:
                self._waiting.remove(path)
            if path == self._current:
                self._current = None

    def clear(self) -> None:
        """Read no more of anything."""
        with self._lock:
            self._waiting.clear()
            self._current = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to read; False where that takes longer (in seconds)."""
        end = None if timeout is None else time.monotonic() + timeout
        while self._working is not None or self._waiting:
            if end is not None and time.monotonic() >= end:
                return False
            if self._working is None:
                # Whoever added it was interrupted, or the thread is about to say that it runs.
                self._start()
            time.sleep(_POLL_SECONDS)
        return True

    def _work(self) -> None:
        own = object()
        try:
            while (path := self._next(own)) is not None:
                self._try_to_read(path)
        except BaseException:
            with self._lock:
                self._end(own)
            raise

    def _next(self, own: object) -> Path | None:
        """The next file for a thread to read; None where it is not needed any more."""
        with self._lock:
            if self._working is None:
                self._working = own
            if self._working is not own:
                return None
            self._current = self._waiting.popleft() if self._waiting else None
            if self._current is None:
                self._end(own)
            return self._current

    def _end(self, own: object) -> None:
        if self._working is own:
            self._working = self._current = None

    def _try_to_read(self, path: Path) -> None:
        try:
            self._read(path)
        except (LoraReadError, LoraFileError) as error:
            # Whoever needs the file says so in its turn.
            _log.debug("not read ahead: %s", error)

    def _read(self, path: Path) -> None:
        reader = _core.TensorReader(path)
        try:
            (size, *_), _ = reader.identity
            part = np.empty(min(size, _PART_BYTES), dtype=np.uint8)
            for begin in range(0, size, _PART_BYTES):
                if self._current is not path:
                    return
                reader.read_into([(begin, min(size - begin, _PART_BYTES), 0)], part, threads=1)
        finally:
            reader.close()


files = ReadAhead()
"""The files that recently made sets are going to need."""
