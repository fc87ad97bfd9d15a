"""Slots that are alike, composed at once: one path over all blocks, with the same LoRAs in each.

Trainers give every block the same modules, ranks and scales. Then the tensors of one module over
all blocks can be read into one stack, moved to the device in few copies and packed by one kernel,
bit-equal to doing it slot by slot.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.layout import RANK_MULTIPLE, TILE, LowRankSide, RowOrder, round_up
from qwenlora.plan import PieceKind, SlotKind
from qwenlora.source import DTYPES

if TYPE_CHECKING:
    from qwenlora.plan import Piece, SlotPlan, TensorRef
    from qwenlora.targets import Target

__all__ = ["Group", "Member", "Stack", "group_slots"]

_DTYPES = ("BF16", "F16", "F32")
"""Dtypes that are packed as they are; others are converted slot by slot."""
_FUSED = ("to_qkv", "add_qkv_proj")


@dataclass(frozen=True)
class Member:
    """One module of one LoRA, in every slot of a group.

    Attributes:
        rank: Its rank.
        scale: Factor on the raw product without the strength.
        row_begin: First of the slot's logical rows that it changes.
        row_count: How many it changes.
        dtype: Dtype of both factors in the file.
        in_features: Columns of `down`.
        refs: `down` (rank, in) and `up` (rows, rank) in the file, slot by slot.
    """

    rank: int
    scale: float
    row_begin: int
    row_count: int
    dtype: torch.dtype
    in_features: int
    refs: dict[LowRankSide, tuple[TensorRef, ...]]

    def shape(self, side: LowRankSide) -> tuple[int, int]:
        """Logical shape of one factor."""
        if side is LowRankSide.DOWN:
            return (self.rank, self.in_features)
        return (self.row_count, self.rank)

    def nbytes(self, side: LowRankSide) -> int:
        """Bytes of one factor in one slot."""
        return math.prod(self.shape(side)) * self.dtype.itemsize


@dataclass(frozen=True)
class Stack:
    """One LoRA's members in a group.

    Attributes:
        lora: Index of the LoRA.
        members: Its modules, in the order of their rows.
    """

    lora: int
    members: tuple[Member, ...]

    def starts(self, sharing: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Where each member's ranks begin, and the ranks of all.

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


@dataclass(frozen=True)
class Group:
    """Slots of one path that get deltas of the same shapes and scales.

    Attributes:
        slots: The slots with their plans, in model order; without a plan they return to their base.
        stacks: What each LoRA brings, in the order of the stack.
        row_order: The order of the slots' output rows.
    """

    slots: tuple[tuple[Target, SlotPlan | None], ...]
    stacks: tuple[Stack, ...] = ()
    row_order: RowOrder = RowOrder.PLANAR

    @property
    def targets(self) -> tuple[Target, ...]:
        """The slots without their plans."""
        return tuple(target for target, _ in self.slots)


def group_slots(
    members: Iterable[tuple[Target, SlotPlan | None]],
) -> tuple[list[Group], list[tuple[Target, SlotPlan | None]]]:
    """Sort the slots of one path into groups and those that are composed one by one.

    Args:
        members: Slots with their plans; None where a slot returns to its base.

    Returns:
        The groups, and what is in none: slots with another adapter than plain LoRA, or whose ranks
        may exceed their limit, and those without a plan that need no new tensor.
    """
    alike: dict[Hashable, list[tuple[Target, SlotPlan | None]]] = defaultdict(list)
    rest: list[tuple[Target, SlotPlan | None]] = []
    for target, plan in members:
        signature = _bare(target) if plan is None else _signature(target, plan)
        (rest if signature is None else alike[signature]).append((target, plan))
    return [_group(tuple(slots)) for slots in alike.values()], rest


def _bare(target: Target) -> Hashable | None:
    """Equal for packed slots whose ranks leave them in the same way."""
    if target.kind is not SlotKind.SVDQ:
        return None
    down = target.module.proj_down
    rank = down.shape[1] if isinstance(down, torch.Tensor) else target.row.base_rank
    return None if rank == target.row.base_rank else (_sizes_of(target), rank)


def _sizes_of(target: Target) -> Hashable:
    row = target.row
    return (row.in_features, row.out_features, row.base_rank, target.dtype, target.device)


def _signature(target: Target, plan: SlotPlan) -> Hashable | None:
    """Equal for slots that can be composed together; None for one that cannot be."""
    pieces = tuple(_piece_signature(piece, target, plan) for piece in plan.pieces)
    if None in pieces or not _has_room(plan):
        return None
    return (_sizes_of(target), plan.row_order, pieces)


def _piece_signature(piece: Piece, target: Target, plan: SlotPlan) -> Hashable | None:
    if (
        piece.kind is not PieceKind.LOW_RANK
        or piece.adapter != "lora"
        or piece.tensors.keys() != {"down", "up"}
        or not (piece.scale and math.isfinite(piece.scale))
        # One delta for all three rows may have an alpha that is a third of what is meant.
        or piece.target.endswith(_FUSED)
    ):
        return None
    down, up = piece.tensors["down"], piece.tensors["up"]
    fits = (
        down.dtype == up.dtype
        and down.dtype in _DTYPES
        and _sizes(down) == (piece.rank, target.row.in_features)
        and _sizes(up) == (piece.row_count, piece.rank)
        and (plan.row_order is RowOrder.PLANAR or piece.row_count == target.row.out_features)
    )
    if not fits:
        return None
    return (piece.lora, piece.rank, piece.scale, piece.row_begin, piece.row_count, down.dtype)


def _sizes(ref: TensorRef) -> tuple[int, ...]:
    """A tensor's shape as a matrix; what tools store as a 1x1 convolution is one."""
    rows, *rest = ref.shape
    return (rows, math.prod(rest))


def _has_room(plan: SlotPlan) -> bool:
    """Whether all ranks fit as they are, even where no two members share any."""
    if plan.rank_limit is None:
        return True
    ranks: dict[int, int] = defaultdict(int)
    for piece in plan.pieces:
        ranks[piece.lora] += piece.rank
    taken = sum(round_up(rank, TILE) for rank in ranks.values())
    return sum(ranks.values()) <= plan.rank_limit and taken <= round_up(
        plan.rank_limit, RANK_MULTIPLE
    )


def _group(slots: tuple[tuple[Target, SlotPlan | None], ...]) -> Group:
    plans = [plan for _, plan in slots if plan is not None]
    if not plans:
        return Group(slots)
    members: dict[int, list[Member]] = defaultdict(list)
    for index, piece in enumerate(plans[0].pieces):
        members[piece.lora].append(_member(piece, [plan.pieces[index] for plan in plans]))
    return Group(
        slots=slots,
        stacks=tuple(Stack(lora, tuple(own)) for lora, own in members.items()),
        row_order=plans[0].row_order,
    )


def _member(piece: Piece, pieces: Sequence[Piece]) -> Member:
    return Member(
        rank=piece.rank,
        scale=piece.scale,
        row_begin=piece.row_begin,
        row_count=piece.row_count,
        dtype=DTYPES[piece.tensors["down"].dtype],
        in_features=_sizes(piece.tensors["down"])[1],
        refs={
            LowRankSide.DOWN: tuple(own.tensors["down"] for own in pieces),
            LowRankSide.UP: tuple(own.tensors["up"] for own in pieces),
        },
    )


def in_spans(count: int, bytes_each: int, limit_bytes: int) -> Iterator[range]:
    """Cut `count` slots into even runs of at most `limit_bytes`; at least one slot each."""
    most = max(1, limit_bytes // max(1, bytes_each))
    runs = -(-count // most)
    for run in range(runs):
        yield range(run * count // runs, (run + 1) * count // runs)
