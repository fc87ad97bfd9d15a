"""A few threads that carry out jobs, and can be left at any instruction.

`concurrent.futures` and `threading.Thread` wait with conditions that are written in Python: an
exception that arrives as one is entered leaves it locked, and threads wait for ever. Here every
wait is for one lock of the interpreter's own, and a thread that nobody knows of ends by itself.
"""

from __future__ import annotations

import threading
from _thread import start_new_thread
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Job", "Jobs"]


T = TypeVar("T")


class Job(Generic[T]):
    """One call, on another thread."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call: Callable[[], T] | None = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._undone = threading.Lock()
        self._undone.acquire()

    def result(self) -> T:
        """Wait for what the call gives; raises what it raises."""
        self.wait()
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self
        return self._results[0]

    def wait(self) -> None:
        """Return when it is done, whatever became of it."""
        with self._undone:
            pass

    def run(self) -> None:
        """Do it."""
        call, self._call = self._call, None
        undone = self._undone
        try:
            if call is not None:
                self._results.append(call())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result raises it
            self._error = error
            # The error refers to this frame, which must not refer to the error.
            del call, self
        finally:
            undone.release()

    def leave(self) -> None:
        """Never do it; asking for the result raises RuntimeError."""
        self._error = RuntimeError("the job was given up before it began")
        self._undone.release()


class Jobs:
    """Threads that take jobs in the order in which they come; they end with this, or before."""

    def __init__(self, threads: int) -> None:
        self._shared = _Shared()
        self._left = threads

    def submit(self, call: Callable[[], T]) -> Job[T]:
        """Begin a job, or let it wait for one of the threads."""
        job = Job(call)
        self._shared.waiting.put(job)
        if self._left:
            self._left -= 1
            start_new_thread(self._shared.work, ())
        return job

    def close(self) -> None:
        """Begin no job any more, and return when none runs."""
        shared = self._shared
        shared.is_closed = True
        shared.waiting.put(None)
        # A thread that was started and has not begun yet ends by itself.
        for undone in tuple(shared.undone):
            with undone:
                pass

    def __del__(self) -> None:
        shared = self.__dict__.get("_shared")
        if shared is not None:
            shared.waiting.put(None)


class _Shared:
    """The state that the threads share; it does not refer to the `Jobs` that gives them work."""

    def __init__(self) -> None:
        self.waiting: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self.undone: list[threading.Lock] = []
        """One for each thread, held until it ends."""
        self.is_closed = False

    def work(self) -> None:
        """Do what is waiting, until there is nothing any more."""
        undone = threading.Lock()
        undone.acquire()
        # Said before it is asked whether all is closed: whoever closes asks the other way.
        self.undone.append(undone)
        try:
            while (job := self.waiting.get()) is not None:
                if self.is_closed:
                    job.leave()
                else:
                    job.run()
                del job
        finally:
            # Each thread that ends tells the next one.
            self.waiting.put(None)
            undone.release()
