"""The base's low-rank branch of a quantized layer, as matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qwenlora.model.target import factors_of
from qwenlora.packing.factor import unpack_factor
from qwenlora.packing.layout import FRAGMENT, TILE, LowRankSide

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qwenlora.model.target import Target

__all__ = ["BaseBranch"]


class BaseBranch(NamedTuple):
    """The low-rank branch that a layer has of its own: up @ down is added to its weight.

    Attributes:
        down: (r, K) float32.
        up: (N, r) float32.
    """

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, target: Target, device: torch.device) -> BaseBranch | None:
        """The branch of a slot, without what is composed behind it; None where it has none.

        Args:
            target: The slot.
            device: Where the matrices are given.
        """
        if target.place is None:
            return None
        rank = target.row.base_rank
        down, up = (_unpacked(target, side, rank, device) for side in LowRankSide)
        return cls(down, up)


def _unpacked(target: Target, side: LowRankSide, rank: int, device: torch.device) -> Tensor:
    (factor,) = factors_of([target], side)
    channels = factor.shape[0]
    # (C, R) nominal -> (C/16, R/16, 256): the base's fragments are the first ones
    fragments = factor.detach().view(channels // TILE, -1, FRAGMENT)[:, : rank // TILE]
    packed = fragments.reshape(channels, rank).to(device)
    return unpack_factor(packed, side).float()
