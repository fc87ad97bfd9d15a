"""Base branches in host memory, kept while their slots are composed: a reset then moves pointers.

On a device the base is held once, in the composed tensors, and copied out of them. Host memory is
slower to copy than to keep, within the bounds of the cache of deltas.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora import cache
from qwenlora.deltas import GroupDeltas
from qwenlora.plan import SlotKind
from qwenlora.targets import FACTORS, factors_of

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.bulk import Group

__all__ = ["keep_base", "kept_base"]


@dataclass(frozen=True, eq=False)
class _KeptBase:
    """Both factors of several slots, packed, as they were before any delta joined them."""

    downs: Sequence[Tensor]
    ups: Sequence[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.downs, *self.ups))


def keep_base(group: Group, home: object, *, limit_bytes: int) -> None:
    """Keep the base of slots in host memory that hold nothing else, where the cache has room.

    Args:
        group: The slots.
        home: The model's structure as it is now: it is another one when anything moves.
        limit_bytes: Most bytes that the cache may hold.
    """
    target = group.targets[0]
    if target.kind is not SlotKind.SVDQ or group.device.type != "cpu":
        return
    downs, ups = (factors_of([t.module for t in group.targets], name) for name in FACTORS)
    if any(tensor.shape[1] != target.row.base_rank for tensor in (*downs, *ups)):
        return
    kept = _KeptBase([down.data for down in downs], [up.data for up in ups])
    cache.pieces.put(_key(group, home), kept, limit_bytes=limit_bytes)


def kept_base(group: Group, home: object) -> GroupDeltas | None:
    """The change that brings slots back to a base that is kept."""
    kept = cache.pieces.get(_key(group, home))
    if not isinstance(kept, _KeptBase):
        return None
    return GroupDeltas(group.targets, rank=0, rank_added=0, downs=kept.downs, ups=kept.ups)


def _key(group: Group, home: object) -> Hashable:
    first, last = group.targets[0], group.targets[-1]
    return ("base", home, first.path, last.path, len(group.targets))
