"""Threads that read files and fill host memory in the background, and their provider.

Rust's threads do it. A test puts others in their place, which do the same work later: whatever is
read before it was waited for then shows.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from qwenlora import _core

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    import numpy as np
    import numpy.typing as npt

__all__ = [
    "Fillers",
    "Filling",
    "Readers",
    "Reading",
    "RustWorkers",
    "Workers",
    "employ",
    "employed",
]


class Reading(Protocol):
    """Tensors on their way into a buffer; nobody touches the buffer until `wait` returned."""

    def wait(self) -> float | None:
        """Return when all is read: the largest magnitude where that was asked for."""


class Readers(Protocol):
    """Threads that read one buffer after another; see `_core.Readers`."""

    def read(
        self,
        reader: _core.TensorReader,
        runs: Sequence[tuple[Sequence[int], int, int]],
        dest: npt.NDArray[np.uint8],
        *,
        measure: str | None,
    ) -> Reading:
        """Begin to read."""

    def close(self) -> None:
        """Stop; what is under way is waited for."""


class Filling(Protocol):
    """Memory that is being filled; nobody touches it until `wait` returned."""

    def wait(self) -> None:
        """Return when all is filled; raises where that failed."""

    def query(self) -> bool:
        """Tell if nobody uses the memory any more."""

    def synchronize(self) -> None:
        """Wait until nobody does."""


class Fillers(Protocol):
    """Threads that carry out recipes of `fill_packed` in order; see `_core.Fillers`."""

    def fill(self, recipes: Sequence[tuple[Any, ...]]) -> Filling:
        """Begin to fill."""

    def close(self) -> None:
        """Wait until all that was begun is done; no more can be begun."""


class Workers(Protocol):
    """Provides threads, up to a number of them."""

    def readers(self, threads: int) -> Readers:
        """Threads that read."""

    def fillers(self, threads: int) -> Fillers:
        """Threads that fill."""


class RustWorkers:
    """Rust's own threads."""

    def readers(self, threads: int) -> Readers:
        """Threads that read."""
        return _core.Readers(threads=threads)

    def fillers(self, threads: int) -> Fillers:
        """Threads that fill."""
        return _core.Fillers(threads=threads)


_employed: Workers = RustWorkers()


def employed() -> Workers:
    """Whoever provides the threads of compositions that begin now."""
    return _employed


@contextmanager
def employ(workers: Workers) -> Iterator[None]:
    """Let others provide the threads of all compositions that begin in the `with` block."""
    global _employed
    before, _employed = _employed, workers
    try:
        yield
    finally:
        _employed = before
