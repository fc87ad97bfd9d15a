"""The places of a group's deltas in its slots."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora.delta.strength import factors_at
from qwenlora.group.arena import Part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from qwenlora.group.group import Group, Share
    from qwenlora.group.load import Load, Staged
    from qwenlora.spec import LoraSpec

__all__ = [
    "FactorRun",
    "PlacedGroup",
    "ShareLayout",
    "factor_runs",
    "may_overflow",
    "parts_of",
]


class FactorRun(NamedTuple):
    """Neighbouring slots of a group in which a LoRA's modules have the same factors.

    Attributes:
        slots: Which slots of the group.
        factors: Scale times strength of each module.
    """

    slots: range
    factors: tuple[float, ...]


@dataclass(frozen=True)
class ShareLayout:
    """The place of one LoRA's ranks in a group's arena, and what they are multiplied by.

    Attributes:
        sharing: For each module the index of the first one with the same `down`.
        starts: Where each module's ranks begin, from `rank_begin` on.
        rank: Ranks of all.
        rank_begin: First of the arena's added ranks that the LoRA takes.
        runs: The factors in all slots of the group, run by run.
    """

    sharing: tuple[int, ...]
    starts: tuple[int, ...]
    rank: int
    rank_begin: int
    runs: tuple[FactorRun, ...]


@dataclass(frozen=True, eq=False)
class PlacedGroup:
    """A group as it lies in its slots.

    Attributes:
        group: The group.
        layouts: By LoRA, where its ranks lie.
        differing: Slots of the group that are not in its arena.
        filled: How many slots behind those of the group hold as many ranks, all zero.
    """

    group: Group
    layouts: Mapping[int, ShareLayout]
    differing: frozenset[int]
    filled: int = 0

    @property
    def count(self) -> int:
        """How many slots are in its arena and hold what they are to hold."""
        return len(self.group.targets) - len(self.differing) + self.filled


def factor_runs(group: Group, share: Share, spec: LoraSpec) -> tuple[FactorRun, ...]:
    """Each module's scale times the strength at its slot, by the rule of all deltas."""
    scales = torch.tensor([member.scale for member in share.members], dtype=torch.float64)
    count = len(group.targets)
    strengths = [spec.strength] * count
    if spec.blocks is not None:
        strengths = [spec.strength_at(target.path) for target in group.targets]
    runs, begin = [], 0
    for strength, own in groupby(strengths):
        end = begin + len([*own])
        factors = tuple(factors_at(scales, strength).tolist())
        runs.append(FactorRun(range(begin, end), factors))
        begin = end
    return tuple(runs)


def parts_of(load: Load, buffer: Tensor, layout: ShareLayout) -> Iterator[Part]:
    """A load's tensors in a buffer as an arena takes them: in slots of the same factors at once."""
    values = {block.dtype: buffer.view(block.dtype) for block in load.blocks}
    tensors = [block.of(values[block.dtype]) for block in load.blocks]
    first = load.slots.start
    for run in layout.runs:
        slots = range(max(first, run.slots.start), min(load.slots.stop, run.slots.stop))
        if not slots:
            continue
        own = slice(slots.start - first, slots.stop - first)
        yield Part(
            slots=slots,
            members=load.share.members,
            downs=[tensor[own] for tensor in tensors[::2]],
            ups=[tensor[own] for tensor in tensors[1::2]],
            factors=run.factors,
            starts=layout.starts,
            rank=layout.rank,
            rank_begin=layout.rank_begin,
        )


def may_overflow(staged: Staged, layout: ShareLayout, dtype: torch.dtype) -> bool:
    """Tell if scaled values may leave a dtype's range, or are not finite; unknown counts as yes."""
    peak = staged.findings.peak
    largest = max(1.0, *(abs(factor) for run in layout.runs for factor in run.factors))
    # Rounding may reach the next number, but not twice the number; NaN is less than nothing.
    return peak is None or not peak * largest < torch.finfo(dtype).max / 2
