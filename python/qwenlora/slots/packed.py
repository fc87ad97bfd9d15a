"""Slots that take deltas: they put tensors into a model's layers, and take them out again.

One small interface separates planning from leaf kinds: a slot prepares a `Change`, which can be
made and unmade by moving pointers. No tensor of the base model is written to. A slot's parts (its
packed low-rank branch, a side branch, stored values) are slots themselves.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

import torch

from qwenlora.model.target import FACTORS, factors_of
from qwenlora.packing.layout import FRAGMENT, TILE
from qwenlora.slots.point import point, point_all, point_back
from qwenlora.slots.slot import NoChange
from qwenlora.work.pending import Pending

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from typing import Any

    from torch import Tensor, nn

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
        self._module: Any = target.module
        self._base_rank = target.row.base_rank
        self.path = target.path

    def rank_added(self) -> int:
        """Ranks beyond the base that are in place now."""
        return int(self._module.proj_down.shape[1]) - self._base_rank

    def room(self) -> Hashable:
        """Ranks beyond the base."""
        return self.rank_added()

    def prepare(self, deltas: SlotDeltas) -> Change:
        """Allocate and fill both factors."""
        if deltas.rank_added == 0 and self.is_base():
            return NoChange()
        return self._change(deltas.pairs, deltas.rank_added)

    def _change(self, pairs: Sequence[ScaledPair], rank_added: int) -> PackedChange:
        down: Tensor = self._module.proj_down
        up: Tensor = self._module.proj_up
        return PackedChange(
            modules=[self._module],
            new=Pending.ready(
                (
                    [self._joined(down, [pair.down for pair in pairs], rank_added)],
                    [self._joined(up, [pair.up for pair in pairs], rank_added)],
                )
            ),
        )

    def is_base(self) -> bool:
        """Whether both factors have the base's rank."""
        return all(getattr(self._module, name).shape[1] == self._base_rank for name in FACTORS)

    def restore(self) -> None:
        """Put the base in place; through the host where the device is full."""
        try:
            self._change((), 0).make()
        except torch.OutOfMemoryError:
            for name in FACTORS:
                self._restore_by_host(name)

    def _restore_by_host(self, name: str) -> None:
        current: Tensor = getattr(self._module, name)
        channels, rank = current.shape
        tiles, base_tiles = channels // TILE, self._base_rank // TILE
        host = current.detach().cpu().view(tiles, rank // TILE, FRAGMENT)[:, :base_tiles]
        device = current.device
        # Let go of the composed tensor first: the smaller one then fits in its place. Until it is
        # there, the base is not where it belongs, but not lost.
        base = host.reshape(channels, self._base_rank)
        point(self._module, name, base)
        del current
        point(self._module, name, base.to(device))

    def _joined(self, current: Tensor, added: Sequence[Tensor], rank_added: int) -> Tensor:
        channels, rank = current.shape
        tiles, base_tiles = channels // TILE, self._base_rank // TILE
        # Pinned host memory stays pinned: offload copies from it asynchronously.
        joined = torch.empty(
            (channels, self._base_rank + rank_added),
            dtype=current.dtype,
            device=current.device,
            pin_memory=current.is_pinned(),
        )
        # (C, R) nominal -> (C/16, R/16, 256)
        fragments = joined.view(tiles, -1, FRAGMENT)
        base = current.detach().view(tiles, rank // TILE, FRAGMENT)[:, :base_tiles]
        fragments[:, :base_tiles].copy_(base)
        end = base_tiles
        for piece in added:
            piece_tiles = piece.shape[1] // TILE
            fragments[:, end : end + piece_tiles].copy_(piece.view(tiles, piece_tiles, FRAGMENT))
            end += piece_tiles
        fragments[:, end:].zero_()
        return joined


@dataclass
class PackedChange:
    """New factors of packed layers: `new` holds every layer's down, and every layer's up.

    `left` is what is in place, where that is known; `plain` says that none of the parameters was
    made in inference mode.
    """

    modules: Sequence[nn.Module]
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
        self.old = [factors_of(self.modules, name) for name in FACTORS]
        self.old_data = [[parameter.data for parameter in own] for own in self.old]

    def make(self) -> None:
        """Point every factor at its new tensor."""
        for name, old, new in zip(FACTORS, self.old, self.new.wait(), strict=True):
            point_all(self.modules, name, old, new, plain=self.plain)

    def unmake(self) -> None:
        """Point every factor at its old tensor."""
        for name, old, old_data in zip(FACTORS, self.old, self.old_data, strict=True):
            for module, parameter, data in zip(self.modules, old, old_data, strict=True):
                point_back(module, name, parameter, data)
