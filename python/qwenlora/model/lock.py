"""One transformer's lock: from before a forward or composition until after it.

An exception may arrive between any two instructions: a keyboard interrupt does, and so does what a
host raises in one of its threads. So holding the lock and being known as the holder are one fact,
which one atomic operation makes true. Nothing else counts, and there is no lock inside the lock.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

from qwenlora.errors import ModelStateError

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from torch import nn

__all__ = ["ModelLock", "lock_of"]


_POLL_SECONDS = 0.5
"""Time between two looks of a waiting thread whether the holder is still there."""
_LOOK_AGAIN_SECONDS = 0.01
"""Time until it looks again where the holder seemed to be gone."""
_NEXT = "next"


class ModelLock:
    """Threads wait for each other; one thread cannot enter twice.

    Whoever takes the lock leaves a claim. It is over when it is released, or when its frame is on
    no stack any more: a forward holds the lock between two hooks, and some exceptions skip the
    second one. A claim that is over can be followed by one other, which then holds the lock.
    """

    def __init__(self) -> None:
        self._claim = _Claim(None)
        self._bells: deque[threading.Lock] = deque()

    def acquire(self, frame: FrameType) -> None:
        """Wait for the lock and hold it for as long as `frame` runs, or until `release`.

        Raises:
            ModelStateError: The calling thread holds it already.
        """
        claim = _Claim(frame)
        missed: _Claim | None = None
        while True:
            last = self._last()
            runs = last.runs()
            if runs and last.is_mine():
                raise ModelStateError(
                    "the model is being composed or run by this very thread"
                    "\nhint: neither a progress callback nor a forward may compose or run it again"
                )
            # Another thread's stack changes while it is looked at: one look may miss a frame.
            if runs or not (last.is_surely_over() or last is missed):
                missed = None if runs else last
                self._wait(last, _POLL_SECONDS if runs else _LOOK_AGAIN_SECONDS)
            elif last.following.setdefault(_NEXT, claim) is claim:
                self._claim = claim
                return

    def release(self, frame: FrameType | None) -> None:
        """Let go, where this thread holds it for this frame, or for one that runs no more."""
        claim = self._last()
        if claim.is_mine() and not claim.released and (claim.is_of(frame) or not claim.runs()):
            claim.released = True
            claim.unmark(frame)
            self._ring()

    def is_mine(self) -> bool:
        """Tell if this thread holds it."""
        claim = self._last()
        return claim.is_mine() and claim.runs()

    def _last(self) -> _Claim:
        """The claim that no other follows."""
        # An interrupted thread may have followed without saying so here.
        claim = self._claim
        while (following := claim.following.get(_NEXT)) is not None:
            claim = following
        return claim

    def _wait(self, claim: _Claim, seconds: float) -> None:
        """Wait until a claim is released, or so long. A wake-up that is lost costs only time."""
        bell = threading.Lock()
        bell.acquire()
        self._bells.append(bell)
        if not claim.released:
            bell.acquire(timeout=seconds)
        with contextlib.suppress(ValueError):
            self._bells.remove(bell)

    def _ring(self) -> None:
        while self._bells:
            try:
                bell = self._bells.popleft()
            except IndexError:
                return
            bell.release()

    def __enter__(self) -> None:
        self.acquire(sys._getframe(1))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release(sys._getframe(1))


class _Claim:
    """A frame's hold on a lock.

    The frame is not kept alive: its variables hold the model. Frames cannot be referred to weakly,
    so an object is put on it that lives as long as it does.

    Attributes:
        released: Whether it was released.
        following: The one claim that follows, under `_NEXT`. `setdefault` decides which it is.
    """

    __slots__ = ("_code", "_frame_id", "_kept", "_mark", "_thread", "following", "released")

    def __init__(self, frame: FrameType | None) -> None:
        """Without a frame it is over from the beginning."""
        self.released = frame is None
        self.following: dict[str, _Claim] = {}
        self._thread = threading.get_ident()
        self._frame_id = id(frame)
        self._code = None if frame is None else frame.f_code
        self._kept: FrameType | None = None
        self._mark: weakref.ref[_Mark] | None = None
        if frame is None:
            return
        mark = frame.f_trace
        if mark is None:
            mark = frame.f_trace = _Mark()
        if isinstance(mark, _Mark):
            self._mark = weakref.ref(mark)
        else:
            # A debugger's or a tracer's.
            self._kept = frame

    def is_mine(self) -> bool:
        """Tell if it is this thread's."""
        return self._thread == threading.get_ident()

    def is_of(self, frame: FrameType | None) -> bool:
        """Tell if this running frame is the claim's."""
        if frame is None or id(frame) != self._frame_id:
            return False
        if self._kept is not None or (self._mark is not None and self._mark() is not None):
            return True
        # A frame with another mark, or with none, has merely come to lie where the claim's own lay.
        # A debugger that was called while the frame ran has taken the mark's place.
        taken = frame.f_trace is not None and not isinstance(frame.f_trace, _Mark)
        return taken and frame.f_code is self._code

    def runs(self) -> bool:
        """Tell if it was not released, and its frame is on its thread's stack."""
        if self.released:
            return False
        frame = sys._getframe() if self.is_mine() else sys._current_frames().get(self._thread)
        while frame is not None:
            if self.is_of(frame):
                return True
            frame = frame.f_back
        return False

    def is_surely_over(self) -> bool:
        """Tell if a claim that seems not to run is over for certain.

        Another thread's stack may change while it is looked at, and hide a running frame.
        """
        return self.released or self.is_mine() or (self._mark is not None and self._mark() is None)

    def unmark(self, frame: FrameType | None) -> None:
        """Leave the frame as it was."""
        if frame is not None and self._mark is not None and frame.f_trace is self._mark():
            frame.f_trace = None


class _Mark:
    """Lives as long as the frame that it is on."""

    __slots__ = ("__weakref__",)

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """A tracer that left the frame alone would call it for every line."""


_LOCKS: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()


def lock_of(model: nn.Module) -> ModelLock:
    """The one lock of a transformer."""
    known = _LOCKS.get(model)
    # One of two threads that come first at once makes a lock in vain.
    return _LOCKS.setdefault(model, ModelLock()) if known is None else known
