"""Slots that are alike, composed at once: one path over all blocks, with the same LoRAs in each.

Trainers give every block the same modules, ranks and scales. Then the tensors of one module over
all blocks can be read into one stack, moved to the device in few copies and packed by one kernel,
bit-equal to doing it slot by slot. Which slots are alike is planned in Rust.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from qwenlora.model.target import factors_of
from qwenlora.packing.layout import LowRankSide, RowOrder
from qwenlora.source.dtypes import DTYPES
from qwenlora.source.versions import counts_writes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    import torch

    from qwenlora.model.target import Target
    from qwenlora.plan.documents import AlikeMember, AlikeSlots

__all__ = ["Group", "Located", "Member", "Share", "group_of", "in_spans"]


T = TypeVar("T")


class Located(NamedTuple):
    """The same tensor of a module in every slot of a group.

    Attributes:
        len_bytes: Bytes of each.
        offsets: Where each begins in the file, slot by slot.
        indices: Which tensor of the file each is.
    """

    len_bytes: int
    offsets: Sequence[int]
    indices: Sequence[int]

    def of_slots(self, slots: range) -> Located:
        """The tensors of some of the slots."""
        own = slice(slots.start, slots.stop)
        return Located(self.len_bytes, self.offsets[own], self.indices[own])


@dataclass(frozen=True, eq=False)
class Member:
    """One module of one LoRA, in every slot of a group.

    Attributes:
        rank: Its rank.
        scale: Factor on the raw product without the strength.
        row_begin: First of the slot's logical rows that it changes.
        row_count: How many it changes.
        dtype: Dtype of both factors in the file.
        in_features: Columns of `down`.
        tensors: `down` (rank, in) and `up` (rows, rank) in the file.
    """

    rank: int
    scale: float
    row_begin: int
    row_count: int
    dtype: torch.dtype
    in_features: int
    tensors: Mapping[LowRankSide, Located]

    def shape(self, side: LowRankSide) -> tuple[int, int]:
        """Logical shape of one factor."""
        if side is LowRankSide.DOWN:
            return (self.rank, self.in_features)
        return (self.row_count, self.rank)

    def of_slots(self, slots: range) -> Member:
        """The module in some of the slots."""
        return replace(
            self, tensors={side: own.of_slots(slots) for side, own in self.tensors.items()}
        )

    def nbytes(self, side: LowRankSide) -> int:
        """Bytes of one factor in one slot."""
        return math.prod(self.shape(side)) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Share:
    """One LoRA's members in a group.

    Attributes:
        lora: Index of the LoRA.
        members: Its modules, in the order of their rows.
    """

    lora: int
    members: tuple[Member, ...]

    def of_slots(self, slots: range) -> Share:
        """The members in some of the slots."""
        return replace(self, members=tuple(member.of_slots(slots) for member in self.members))

    def starts(self, sharing: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Place the members' ranks: the first rank of each, and the ranks of all.

        Args:
            sharing: For each member the index of the first one with the same `down`.
        """
        starts: list[int] = []
        end = 0
        for index, (member, first) in enumerate(zip(self.members, sharing, strict=True)):
            if first == index:
                starts.append(end)
                end += member.rank
            else:
                starts.append(starts[first])
        return tuple(starts), end


@dataclass(frozen=True, eq=False)
class Group:
    """Slots of one path, of one size, dtype and device, that get the same shapes and scales.

    Attributes:
        targets: The slots, in model order.
        shares: Each LoRA's share, in the order of the stack; none where the slots return to
            their base.
        row_order: The order of the slots' output rows.
    """

    targets: tuple[Target, ...]
    shares: tuple[Share, ...] = ()
    row_order: RowOrder = RowOrder.PLANAR
    _derived: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False)

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make` for this key, made once and kept with the group."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[return-value]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all deltas."""
        members = [member for share in self.shares for member in share.members]
        each = sum(member.nbytes(side) for member in members for side in LowRankSide)
        return each * len(self.targets)

    @property
    def packed(self) -> bool:
        """True where deltas join packed low-rank branches; otherwise they run in side branches."""
        return self.targets[0].place is not None

    @cached_property
    def plain(self) -> bool:
        """True where all of its packed parameters are normal ones, which count their writes."""
        factors = [factor for side in LowRankSide for factor in factors_of(self.targets, side)]
        return all(map(counts_writes, factors))

    @property
    def device(self) -> torch.device:
        """The device of the slots."""
        return self.targets[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the slots' tensors."""
        return self.targets[0].dtype

    def parts(self, limit_bytes: int) -> list[Group]:
        """The same in smaller groups, whose base branches take at most this much each."""
        spans = in_spans(len(self.targets), self.targets[0].base_bytes, limit_bytes)
        return [
            replace(
                self,
                targets=self.targets[span.start : span.stop],
                shares=tuple(share.of_slots(span) for share in self.shares),
            )
            for span in spans
        ]


def group_of(alike: AlikeSlots, targets: Sequence[Target]) -> Group | None:
    """A group as Rust tells it; None where its slots differ in what Rust does not know.

    Args:
        alike: The slots.
        targets: All slots that were planned for, in order.
    """
    own = tuple(map(targets.__getitem__, alike.slots))
    first = own[0]
    dtype, device = first.dtype, first.device
    if any(target.dtype != dtype or target.device != device for target in own):
        return None
    columns = first.row.in_features
    shares = tuple(
        Share(lora, tuple(_member(member, columns) for member in members))
        for lora, members in alike.stacks
    )
    return Group(own, shares, RowOrder(alike.row_order))


def _member(row: AlikeMember, in_features: int) -> Member:
    rank, scale, row_begin, row_count, dtype, down, up = row
    return Member(
        rank=rank,
        scale=scale,
        row_begin=row_begin,
        row_count=row_count,
        dtype=DTYPES[dtype],
        in_features=in_features,
        tensors={LowRankSide.DOWN: Located(*down), LowRankSide.UP: Located(*up)},
    )


def in_spans(count: int, bytes_each: int, limit_bytes: int) -> Iterator[range]:
    """Cut `count` slots into runs of at most `limit_bytes`: few, and of nearly one length."""
    most = max(1, limit_bytes // max(1, bytes_each))
    runs = -(-count // most)
    for run in range(runs):
        yield range(count * run // runs, count * (run + 1) // runs)
