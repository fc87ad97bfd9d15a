"""Fills host memory in the background: composing goes on while memory is written."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from qwenlora.work.threads import fillers_for
from qwenlora.work.workers import employed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from qwenlora.group.loader import Copied
    from qwenlora.work.workers import Fillers, Filling

__all__ = ["Filler"]


_BEHIND = 3
"""Requests that are carried out or wait for it: enough that there is no pause between two."""


class Filler:
    """Carries out recipes of `fill_packed` in the order in which they come, on Rust's threads."""

    def __init__(self, *, threads: int | None = None) -> None:
        self._threads = fillers_for(threads)
        self._fillers: Fillers | None = None
        self._begun: deque[Filling] = deque()

    def fill(self, recipes: Sequence[tuple[Any, ...]]) -> None:
        """Fill when what was begun before is done; returns while little is begun.

        Nobody may touch the recipes' arrays before `wait`, or `begun` of this moment, says so.

        Raises:
            ValueError: A recipe does not fit its arrays.
        """
        while self._begun and (self._begun[0].query() or len(self._begun) >= _BEHIND):
            self._begun.popleft().wait()
        if self._fillers is None:
            self._fillers = employed().fillers(self._threads)
        self._begun.append(self._fillers.fill(recipes))

    def begun(self) -> Copied | None:
        """The last request that was begun, as something to wait for; None where nothing was."""
        return self._begun[-1] if self._begun else None

    def wait(self) -> None:
        """Return when all is done; raise what filling raised."""
        while self._begun:
            self._begun.popleft().wait()

    def close(self) -> None:
        """Wait for what is under way, whatever becomes of it."""
        if self._fillers is not None:
            self._fillers.close()
