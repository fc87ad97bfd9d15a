"""Host memory, filled beside whatever else is done: composing goes on while memory is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from qwenlora import _core
from qwenlora.threads import fillers_for

if TYPE_CHECKING:
    from qwenlora.staging import Copied

__all__ = ["Filler"]


_BEHIND = 3
"""Recipes that are carried out or wait for it: enough that there is no pause between two."""


class Filler:
    """Carries out recipes of `fill_packed` in the order in which they come, one at a time."""

    def __init__(self, *, threads: int | None = None) -> None:
        self._threads = fillers_for(threads)
        self._pool: ThreadPoolExecutor | None = None
        self._begun: deque[Future[None]] = deque()

    def fill(self, recipes: Sequence[tuple[Any, ...]]) -> None:
        """Fill when what was begun before is done; returns while little is begun.

        Nobody may touch the recipes' arrays before `wait`, or `begun` of this moment, says so.

        Raises:
            ValueError: A recipe before this one does not fit its arrays.
        """
        while self._begun and (self._begun[0].done() or len(self._begun) >= _BEHIND):
            self._begun.popleft().result()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="qwenlora-fill")
        filling = self._pool.submit(_core.fill_packed, recipes, threads=self._threads)
        self._begun.append(filling)

    def begun(self) -> Copied | None:
        """When what is begun is done; None where nothing is."""
        return _Filled(self._begun[-1]) if self._begun else None

    def wait(self) -> None:
        """Return when all is done; raise what filling came upon."""
        while self._begun:
            self._begun.popleft().result()

    def close(self) -> None:
        """Wait for what is under way, whatever becomes of it."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)


class _Filled:
    """All recipes up to one are carried out, or have failed."""

    def __init__(self, filling: Future[None]) -> None:
        self._filling = filling

    def query(self) -> bool:
        """Whether they are."""
        return self._filling.done()

    def synchronize(self) -> None:
        """Wait until they are."""
        futures.wait([self._filling])
