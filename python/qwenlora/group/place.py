"""The places of a group's deltas in its slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.scale import factors_at
from qwenlora.group.arena import Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.group.group import Group, Share
    from qwenlora.group.load import Load, Staged

__all__ = ["PlacedGroup", "ShareLayout", "may_overflow", "part_of", "scales_of"]


@dataclass(frozen=True)
class ShareLayout:
    """The place of one LoRA's ranks in a group's arena."""

    sharing: tuple[int, ...]
    starts: tuple[int, ...]
    rank: int
    rank_begin: int
    factors: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class PlacedGroup:
    """A group as it lies in its slots.

    Attributes:
        group: The group.
        layouts: By LoRA, where its ranks lie.
        differing: Slots of the group that are not in its arena.
    """

    group: Group
    layouts: Mapping[int, ShareLayout]
    differing: frozenset[int]


def scales_of(share: Share, strength: float) -> tuple[float, ...]:
    """Each module's scale times the strength, by the rule of all deltas."""
    scales = torch.tensor([member.scale for member in share.members], dtype=torch.float64)
    return tuple(factors_at(scales, strength).tolist())


def part_of(load: Load, buffer: Tensor, layout: ShareLayout) -> Part:
    """A load's tensors in a buffer, as an arena takes them."""
    values = {block.dtype: buffer.view(block.dtype) for block in load.blocks}
    tensors = [block.of(values[block.dtype]) for block in load.blocks]
    return Part(
        slots=load.slots,
        members=load.share.members,
        downs=tensors[::2],
        ups=tensors[1::2],
        factors=layout.factors,
        starts=layout.starts,
        rank=layout.rank,
        rank_begin=layout.rank_begin,
    )


def may_overflow(staged: Staged, layout: ShareLayout, dtype: torch.dtype) -> bool:
    """Tell if scaled values may leave a dtype's range, or are not finite; unknown counts as yes."""
    peak = staged.findings.peak
    largest = max(1.0, *(abs(factor) for factor in layout.factors))
    # Rounding may reach the next number, but not twice the number; NaN is less than nothing.
    return peak is None or not peak * largest < torch.finfo(dtype).max / 2
