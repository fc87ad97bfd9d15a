"""What is kept between compositions: file plans and packed, strength-free pieces.

Both are bounded and dropped oldest first. Neither steers a result: a cached piece is the tensor
that reading the file again would give.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenlora import _core
    from qwenlora.pieces import LoraPieces

__all__ = ["PieceCache", "PlanCache", "clear_cache", "pieces", "plans"]

_MAX_PLANS = 64


class PlanCache:
    """File plans by path, valid for one identity of the file."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._plans: OrderedDict[str, _core.FilePlan] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, identity: Hashable) -> _core.FilePlan | None:
        """The plan of this very file, if it is kept."""
        with self._lock:
            plan = self._plans.get(path)
            if plan is None or plan.identity != identity:
                return None
            self._plans.move_to_end(path)
            return plan

    def put(self, path: str, plan: _core.FilePlan) -> None:
        """Keep a plan."""
        with self._lock:
            self._plans[path] = plan
            self._plans.move_to_end(path)
            while len(self._plans) > self._limit:
                self._plans.popitem(last=False)

    def clear(self) -> None:
        """Drop all plans."""
        with self._lock:
            self._plans.clear()


class PieceCache:
    """Deltas by (identity of the LoRA, slot and its layout), bounded in bytes of host memory."""

    def __init__(self) -> None:
        self._pairs: OrderedDict[Hashable, LoraPieces] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def get(self, key: Hashable) -> LoraPieces | None:
        """The pair, if it is kept."""
        with self._lock:
            pair = self._pairs.get(key)
            if pair is not None:
                self._pairs.move_to_end(key)
            return pair

    def put(self, key: Hashable, pair: LoraPieces, *, limit_bytes: int) -> None:
        """Keep a pair where it fits, dropping the oldest."""
        with self._lock:
            self._drop(key)
            if pair.nbytes <= limit_bytes:
                self._pairs[key] = pair
                self._bytes += pair.nbytes
            while self._bytes > limit_bytes:
                self._drop(next(iter(self._pairs)))

    def clear(self) -> None:
        """Drop all pairs."""
        with self._lock:
            self._pairs.clear()
            self._bytes = 0

    def _drop(self, key: Hashable) -> None:
        pair = self._pairs.pop(key, None)
        if pair is not None:
            self._bytes -= pair.nbytes


plans = PlanCache(_MAX_PLANS)
"""Plans of the files read last, shared by all models of the process."""
pieces = PieceCache()
"""Pieces of the LoRAs composed last, shared by all models of the process."""


def clear_cache() -> None:
    """Drop all cached file plans and packed pieces; composed models stay as they are."""
    plans.clear()
    pieces.clear()
