"""Packed low-rank branches of quantized layers: deltas join them in packed space."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

import torch

from qwenlora.model.target import LowRankPlace, factors_of
from qwenlora.packing.factor import join_factors
from qwenlora.packing.layout import FRAGMENT, TILE, LowRankSide
from qwenlora.plan.documents import Route
from qwenlora.slots.point import point, point_all, point_back
from qwenlora.slots.slot import NoChange
from qwenlora.work.pending import Pending

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

    from qwenlora.delta.scale import ScaledPair
    from qwenlora.delta.slot_deltas import SlotDeltas
    from qwenlora.group.arena import SlotFactors
    from qwenlora.group.sets import KeptGroup
    from qwenlora.model.target import Target
    from qwenlora.slots.slot import Change

__all__ = ["PackedChange", "PackedSlot"]


class PackedSlot:
    """A Nunchaku SVDQ layer: deltas join its low-rank branch in packed space.

    Stored tensors are (channels, R) in name; memory is (channels/16, R/16, 256), so ranks are
    appended by a strided copy and the base is never unpacked. While composed, the base is held
    once: as the first fragments of the composed tensors.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._base_rank = target.row.base_rank
        self.path = target.path

    def rank_added(self) -> int:
        """Ranks beyond the base that are in place now."""
        return int(self._factor(LowRankSide.DOWN).shape[1]) - self._base_rank

    def room(self) -> Hashable:
        """Ranks beyond the base."""
        return self.rank_added()

    def prepare(self, deltas: SlotDeltas) -> Change:
        """Allocate and fill both factors; where ranks run beside the layer, it holds its base."""
        is_inside = deltas.route is Route.INSIDE
        pairs, rank_added = (deltas.pairs, deltas.rank_added) if is_inside else ((), 0)
        if rank_added == 0 and self.is_base():
            return NoChange()
        return self._change(pairs, rank_added)

    def _change(self, pairs: Sequence[ScaledPair], rank_added: int) -> PackedChange:
        downs, ups = [pair.down for pair in pairs], [pair.up for pair in pairs]
        down = self._joined(LowRankSide.DOWN, downs, rank_added)
        up = self._joined(LowRankSide.UP, ups, rank_added)
        return PackedChange(targets=[self._target], new=Pending.ready(([down], [up])))

    def is_base(self) -> bool:
        """Tell if both factors have the base's rank."""
        ranks = {self._factor(side).shape[1] for side in LowRankSide}
        return ranks == {self._base_rank} and says_rank(self._target, self._base_rank)

    def restore(self) -> None:
        """Put the base in place; through the host where the device is full."""
        try:
            self._change((), 0).make()
        except torch.OutOfMemoryError:
            for side in LowRankSide:
                self._restore_by_host(side)
            say_rank(self._target, self._base_rank)

    def _factor(self, side: LowRankSide) -> Tensor:
        (factor,) = factors_of([self._target], side)
        return factor

    def _restore_by_host(self, side: LowRankSide) -> None:
        current = self._factor(side)
        owner, name = self._target.owner, name_of(self._target, side)
        channels, rank = current.shape
        tiles, base_tiles = channels // TILE, self._base_rank // TILE
        host = current.detach().cpu().view(tiles, rank // TILE, FRAGMENT)[:, :base_tiles]
        device = current.device
        # Let go of the composed tensor first: the smaller one then fits in its place. Until it is
        # there, the base is not where it belongs, but not lost.
        base = host.reshape(channels, self._base_rank)
        point(owner, name, base)
        del current
        point(owner, name, base.to(device))

    def _joined(self, side: LowRankSide, added: Sequence[Tensor], rank_added: int) -> Tensor:
        """The base's factor with logical ones behind it, each padded to whole fragments."""
        current = self._factor(side)
        # Pinned host memory stays pinned: offload copies from it asynchronously.
        joined = torch.empty(
            (current.shape[0], self._base_rank + rank_added),
            dtype=current.dtype,
            device=current.device,
            pin_memory=current.is_pinned(),
        )
        join_factors(joined, current, added, side, base_rank=self._base_rank)
        return joined


@dataclass
class PackedChange:
    """New factors of packed layers: `new` holds every layer's down, and every layer's up.

    `left` is what is in place, where that is known; `plain` says that none of the parameters was
    made in inference mode.
    """

    targets: Sequence[Target]
    new: Pending[SlotFactors]
    left: InitVar[KeptGroup | None] = None
    old: Sequence[Sequence[Tensor]] = field(init=False)
    old_data: Sequence[Sequence[Tensor]] = field(init=False)
    plain: bool = field(init=False, default=False)

    def __post_init__(self, left: KeptGroup | None) -> None:
        if left is not None:
            self.old = left.parameters
            self.old_data = left.deltas.factors.wait()
            self.plain = left.group.plain
            return
        self.old = [factors_of(self.targets, side) for side in LowRankSide]
        self.old_data = [[parameter.data for parameter in own] for own in self.old]

    def make(self) -> None:
        """Point every factor at its new tensor."""
        owners = [target.owner for target in self.targets]
        for side, old, new in zip(LowRankSide, self.old, self.new.wait(), strict=True):
            point_all(owners, name_of(self.targets[0], side), old, new, plain=self.plain)
        self._say_ranks(self.new.wait())

    def unmake(self) -> None:
        """Point every factor at its old tensor."""
        for side, old, old_data in zip(LowRankSide, self.old, self.old_data, strict=True):
            name = name_of(self.targets[0], side)
            for target, parameter, data in zip(self.targets, old, old_data, strict=True):
                point_back(target.owner, name, parameter, data)
        self._say_ranks(self.old_data)

    def _say_ranks(self, factors: Sequence[Sequence[Tensor]]) -> None:
        if require_place(self.targets[0]).rank is None:
            return
        for target, down in zip(self.targets, factors[0], strict=True):
            say_rank(target, down.shape[1])


def name_of(target: Target, side: LowRankSide) -> str:
    """The name of one factor of a packed slot."""
    return require_place(target).name(side)


def say_rank(target: Target, rank: int) -> None:
    """Set the attribute by which the layer's forward sizes buffers, where it has one."""
    name = require_place(target).rank
    if name is not None:
        setattr(target.owner, name, rank)


def says_rank(target: Target, rank: int) -> bool:
    """Tell if that attribute says this rank; True where there is none."""
    name = require_place(target).rank
    return name is None or getattr(target.owner, name) == rank


def require_place(target: Target) -> LowRankPlace:
    """The place of a slot's packed branch.

    Raises:
        TypeError: The slot has none.
    """
    if target.place is None:
        raise TypeError(f"`{target.path}` has no packed low-rank branch")
    return target.place
