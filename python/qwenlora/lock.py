"""One transformer's lock: from before a forward or composition until after it."""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from qwenlora.errors import ModelStateError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ModelLock", "lock_of"]

_POLL_SECONDS = 0.5
"""How often a waiting thread looks whether the holder is still there."""


class ModelLock:
    """Threads wait for each other; one thread cannot enter twice.

    A forward holds the lock between two hooks, and some exceptions skip the second one (a keyboard
    interrupt does). So the lock remembers the frame that holds it: when that frame is on no stack
    any more, the lock was abandoned and is taken over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: tuple[int, FrameType] | None = None
        self._takeover = threading.Lock()

    def acquire(self, frame: FrameType) -> None:
        """Wait for the lock and hold it for as long as `frame` runs, or until `release`.

        Raises:
            ModelStateError: This very thread holds it.
        """
        while True:
            self._take_over_if_abandoned()
            holder = self._holder
            if holder is not None and holder[0] == threading.get_ident():
                raise ModelStateError(
                    "the model is being composed or run by this very thread"
                    "\nhint: neither a progress callback nor a forward may compose or run it again"
                )
            if self._lock.acquire(timeout=_POLL_SECONDS):
                self._holder = (threading.get_ident(), frame)
                return

    def release(self) -> None:
        """Let go, where this thread holds it."""
        if self.is_mine():
            self._holder = None
            self._lock.release()

    def is_mine(self) -> bool:
        """Whether this thread holds it."""
        holder = self._holder
        return holder is not None and holder[0] == threading.get_ident()

    def _take_over_if_abandoned(self) -> None:
        with self._takeover:
            holder = self._holder
            if holder is not None and not _is_running(*holder):
                self._holder = None
                self._lock.release()

    def __enter__(self) -> None:
        self.acquire(sys._getframe(1))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _is_running(thread: int, frame: FrameType) -> bool:
    current = sys._current_frames().get(thread)
    while current is not None:
        if current is frame:
            return True
        current = current.f_back
    return False


_LOCKS: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def lock_of(model: nn.Module) -> ModelLock:
    """The one lock of a transformer."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, ModelLock())
