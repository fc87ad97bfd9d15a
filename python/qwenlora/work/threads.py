"""Thread counts where the caller gives none: as many as there are cores, within reason."""

from __future__ import annotations

import os

__all__ = ["fillers_for", "readers_for"]


_MOST = 16
"""Beyond these memory is no faster."""


def readers_for(wanted: int | None) -> int:
    """Threads that read files while something else is done with what was read.

    They leave cores to the interpreter, which is as busy meanwhile.
    """
    return wanted or min(_MOST, -(-_cores() * 3 // 4))


def fillers_for(wanted: int | None) -> int:
    """Threads that work for whoever waits for them."""
    return wanted or min(_MOST, _cores())


def _cores() -> int:
    return os.cpu_count() or 1
