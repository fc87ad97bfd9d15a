"""Files brought into the system's memory before anybody asks for their tensors.

A host makes a set long before the first forward that wants it: what is read meanwhile, while text
is encoded and models are loaded, need not be waited for then. The system keeps what was read, as it
keeps all files, as long as nothing else needs the memory; we keep nothing of it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from pathlib import Path

import numpy as np

from qwenlora import _core
from qwenlora.errors import LoraFileError, LoraReadError

__all__ = ["ReadAhead", "files"]

_log = logging.getLogger("qwenlora")

_PART_BYTES = 4 << 20
"""Read at a time; in between it is asked whether the file is still wanted."""


class ReadAhead:
    """Reads whole files on one thread, one after the other, front to back: what disks do best.

    The thread runs while there is something to read.
    """

    def __init__(self) -> None:
        self._waiting: deque[Path] = deque()
        self._current: Path | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def add(self, path: Path) -> None:
        """Read a file, or a PEFT folder's weights, after those that wait; what fails is let be."""
        with self._changed:
            if path == self._current or path in self._waiting:
                return
            if self._thread is not None or self._start():
                self._waiting.append(path)

    def _start(self) -> bool:
        # Nobody waits for it when the program ends.
        thread = threading.Thread(target=self._work, name="qwenlora-ahead", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            # The system gives no more threads: whoever needs the file reads it.
            _log.debug("nothing is read ahead: %s", error)
            return False
        self._thread = thread
        return True

    def cancel(self, path: Path) -> None:
        """Read no more of a file: whoever needs it reads it now."""
        with self._changed:
            if path in self._waiting:
                self._waiting.remove(path)
            if path == self._current:
                self._current = None

    def clear(self) -> None:
        """Read no more of anything."""
        with self._changed:
            self._waiting.clear()
            self._current = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to read; False where that takes longer (in seconds)."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout)

    def _work(self) -> None:
        try:
            while (path := self._next()) is not None:
                self._try_to_read(path)
        except BaseException:
            self._end()
            raise

    def _next(self) -> Path | None:
        with self._changed:
            self._current = self._waiting.popleft() if self._waiting else None
            if self._current is None:
                self._end()
            return self._current

    def _end(self) -> None:
        with self._changed:
            self._thread = self._current = None
            self._changed.notify_all()

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
"""What sets that were made lately are going to need."""
