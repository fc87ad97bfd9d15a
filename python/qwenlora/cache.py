"""Caches between compositions: file plans, strength-free deltas, and models' own shelves.

All are bounded and dropped oldest first. None steers a result: cached deltas are the tensors that
reading the file again would give.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Protocol

from qwenlora.source.read_ahead import files

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from qwenlora import _core

__all__ = [
    "PieceCache",
    "PlanCache",
    "Shelf",
    "begin_composition",
    "clear_cache",
    "clear_devices",
    "forget",
    "kept_bytes",
    "on_device",
    "pieces",
    "plans",
    "register",
    "shelved_bytes",
]

_MAX_PLANS = 64


class PlanCache:
    """File plans by path, valid for one identity of the file."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._plans: dict[str, _core.FilePlan] = {}
        self._lock = threading.Lock()

    def get(self, path: str, identity: Hashable) -> _core.FilePlan | None:
        """The plan of the file at `path`, where it is kept and the file has this identity."""
        with self._lock:
            plan = self._plans.get(path)
            if plan is None or plan.identity != identity:
                return None
            self._plans[path] = self._plans.pop(path)
            return plan

    def put(self, path: str, plan: _core.FilePlan) -> None:
        """Keep a plan."""
        with self._lock:
            self._plans.pop(path, None)
            self._plans[path] = plan
            while len(self._plans) > self._limit:
                del self._plans[next(iter(self._plans))]

    def clear(self) -> None:
        """Drop all plans."""
        with self._lock:
            self._plans.clear()


class Kept(Protocol):
    """A value that the cache can hold."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""


class Shelf(Protocol):
    """The tensors that one model keeps for itself."""

    def nbytes(self, *, on_host: bool) -> int:
        """Bytes held, on the host or on devices."""

    def clear_devices(self) -> None:
        """Drop what is on devices."""

    def clear(self) -> None:
        """Drop all."""


class PieceCache:
    """Deltas by (identity of the LoRA, what they are), bounded in bytes of memory.

    What a composition has used is not dropped for what it uses next: a stack that is larger than
    the cache would otherwise find nothing of itself the next time.
    """

    def __init__(self) -> None:
        # An `OrderedDict` breaks where an exception comes while it asks a key for its hash.
        self._kept: dict[Hashable, tuple[Kept, int]] = {}
        # None while it changes, and after an interrupt in between: it is counted anew then.
        self._bytes: int | None = 0
        self._turn = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return self._counted()

    def values(self) -> list[Kept]:
        """The cached values, oldest first."""
        with self._lock:
            return [kept for kept, _ in self._kept.values()]

    def bytes_where(self, chosen: Callable[[Hashable], bool]) -> int:
        """Bytes held of deltas whose keys are chosen."""
        with self._lock:
            return sum(kept.nbytes for key, (kept, _) in self._kept.items() if chosen(key))

    def drop_where(self, chosen: Callable[[Hashable], bool]) -> None:
        """Drop the deltas whose keys are chosen."""
        with self._lock:
            for key in [key for key in self._kept if chosen(key)]:
                self._drop(key)

    def turn(self) -> None:
        """A composition begins."""
        with self._lock:
            self._turn += 1

    def get(self, key: Hashable) -> Kept | None:
        """The deltas, if they are kept."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            before, self._bytes = self._counted(), None
            del self._kept[key]
            self._kept[key] = (found[0], self._turn)
            self._bytes = before
            return found[0]

    def put(self, key: Hashable, deltas: Kept, *, limit_bytes: int) -> bool:
        """Keep deltas where they fit, dropping the oldest of earlier compositions.

        Returns:
            Whether they are kept.
        """
        with self._lock:
            self._drop(key)
            while self._kept and self._counted() + deltas.nbytes > limit_bytes:
                oldest, (_, turn) = next(iter(self._kept.items()))
                if turn == self._turn and self._counted() <= limit_bytes:
                    return False
                self._drop(oldest)
            after = self._counted() + deltas.nbytes
            if after > limit_bytes:
                return False
            self._bytes = None
            self._kept[key] = (deltas, self._turn)
            self._bytes = after
            return True

    def fit(self, limit_bytes: int) -> None:
        """Drop the oldest until no more than this is held."""
        with self._lock:
            while self._kept and self._counted() > limit_bytes:
                self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Drop all deltas."""
        with self._lock:
            self._bytes = None
            self._kept.clear()

    def _counted(self) -> int:
        if self._bytes is None:
            self._bytes = sum(kept.nbytes for kept, _ in self._kept.values())
        return self._bytes

    def _drop(self, key: Hashable) -> None:
        found = self._kept.get(key)
        if found is not None:
            after = self._counted() - found[0].nbytes
            self._bytes = None
            del self._kept[key]
            self._bytes = after


plans = PlanCache(_MAX_PLANS)
"""Plans of the files read last, shared by all models of the process."""
pieces = PieceCache()
"""Deltas of the LoRAs composed last, in host memory, shared by all models of the process."""
on_device = PieceCache()
"""The same on devices, where much memory is free."""


_FORGOTTEN: deque[Hashable] = deque()


def forget(identity: Hashable) -> None:
    """Have the deltas of a LoRA dropped at the next composition.

    Finalizers may call it: it takes no lock.
    """
    _FORGOTTEN.append(identity)


def begin_composition() -> None:
    """A composition begins: what was forgotten goes, and what it uses now stays while it lasts."""
    for identity in set(_taken(_FORGOTTEN)):
        pieces.drop_where(partial(_is_of, identity))
        on_device.drop_where(partial(_is_on_device_of, identity))
    pieces.turn()
    on_device.turn()


def _taken(queue: deque[Hashable]) -> Iterator[Hashable]:
    """What a queue holds, taken out of it; another thread may take some of it."""
    while True:
        try:
            yield queue.popleft()
        except IndexError:
            return


def kept_bytes(identity: Hashable) -> int:
    """Bytes of one LoRA's deltas that are kept, in host memory and on devices."""
    there = on_device.bytes_where(partial(_is_on_device_of, identity))
    return pieces.bytes_where(partial(_is_of, identity)) + there


def _is_of(identity: Hashable, key: Hashable) -> bool:
    return isinstance(key, tuple) and bool(key[0] == identity)


def _is_on_device_of(identity: Hashable, key: Hashable) -> bool:
    return isinstance(key, tuple) and _is_of(identity, key[0])


_SHELVES: weakref.WeakSet[Shelf] = weakref.WeakSet()
_SHELVES_LOCK = threading.Lock()


def register(shelf: Shelf) -> None:
    """Know of more that is kept, for as long as it lives."""
    with _SHELVES_LOCK:
        _SHELVES.add(shelf)


def _shelves() -> list[Shelf]:
    with _SHELVES_LOCK:
        return list(_SHELVES)


def shelved_bytes(*, on_host: bool) -> int:
    """Bytes that all models' shelves hold, on the host or on devices."""
    return sum(shelf.nbytes(on_host=on_host) for shelf in _shelves())


def clear_devices() -> bool:
    """Drop what is kept on devices; whether there was anything."""
    held = on_device.nbytes + shelved_bytes(on_host=False)
    on_device.clear()
    for shelf in _shelves():
        shelf.clear_devices()
    return held > 0


def clear_cache() -> None:
    """Drop all that is kept: file plans, deltas, sets that were left. No model is changed.

    Files are no longer read ahead.
    """
    files.clear()
    plans.clear()
    pieces.clear()
    on_device.clear()
    for shelf in _shelves():
        shelf.clear()
