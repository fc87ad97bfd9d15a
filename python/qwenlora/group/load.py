"""Loads: the tensors read at a time for a group, and findings about their values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qwenlora.group.group import in_spans
from qwenlora.packing.layout import LowRankSide, round_up
from qwenlora.source.source import Run

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    import torch
    from torch import Tensor

    from qwenlora.group.group import Group, Share
    from qwenlora.model.target import Target

__all__ = ["Block", "Findings", "Load", "Staged", "loads_of"]


_ALIGNMENT = 256
"""Blocks begin at multiples of this: any dtype can be viewed there, and copies are whole lines."""


@dataclass(frozen=True)
class Block:
    """One factor of one module in all slots of a load.

    Attributes:
        member: Index of the module in its stack.
        side: Which factor.
        begin: Its first byte in the load's buffer.
        shape: (slots, rows, columns).
        dtype: As in the file.
    """

    member: int
    side: LowRankSide
    begin: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def of(self, values: Tensor) -> Tensor:
        """Its tensor in a buffer, which is given as values of its dtype."""
        _, rows, columns = self.shape
        begin = self.begin // self.dtype.itemsize
        return values.as_strided(
            self.shape, (rows * columns, columns, 1), values.storage_offset() + begin
        )


@dataclass(frozen=True, eq=False)
class Load:
    """One LoRA's tensors in some slots of a group.

    Attributes:
        targets: The slots of its group.
        share: The LoRA's members.
        slots: Which slots of the group.
        blocks: What lies where in its buffer.
        nbytes: Size of the buffer.
    """

    targets: tuple[Target, ...]
    share: Share
    slots: range
    blocks: tuple[Block, ...]
    nbytes: int

    @property
    def device(self) -> torch.device:
        """The device of its slots."""
        return self.targets[0].device

    @property
    def measured(self) -> torch.dtype | None:
        """The dtype of all values, where they are measured while they are read.

        A device finds the peak of what is copied there in no time.
        """
        dtypes = {block.dtype for block in self.blocks}
        return dtypes.pop() if len(dtypes) == 1 and self.device.type != "cuda" else None

    @cached_property
    def key(self) -> Hashable:
        """Its contents within one LoRA: its slots by their first tensors, and its modules."""
        first = self.share.members[0].tensors[LowRankSide.DOWN].indices
        shapes = tuple((block.side, block.shape, block.dtype) for block in self.blocks)
        return (tuple(first[self.slots.start : self.slots.stop]), shapes)

    def runs(self) -> Iterator[Run]:
        """All tensors, and where each goes in the buffer."""
        slots = slice(self.slots.start, self.slots.stop)
        for block in self.blocks:
            own = self.share.members[block.member].tensors[block.side]
            yield Run(own.indices[slots], own.offsets[slots], own.len_bytes, block.begin)


@dataclass(eq=False)
class Findings:
    """Facts about a load's values.

    Attributes:
        slots: How many slots the load has.
        sharing: For each member the index of the first one with an equal `down`; once where all
            slots share alike, else slot by slot. Rust finds it while it reads. One by one,
            `qwenlora.delta.pieces.stack_downs` finds the same.
        zero: Slots whose delta may be all zero.
        peak: Largest magnitude; NaN or infinity where there is one. None until it is asked for.
    """

    slots: int
    sharing: Sequence[tuple[int, ...]]
    zero: Sequence[int]
    peak: float | None = None

    def sharing_of(self, slot: int) -> tuple[int, ...]:
        """For each member of a slot the index of the first one with an equal `down`."""
        return self.sharing[0 if len(self.sharing) == 1 else slot]

    def first_sharing(self) -> tuple[int, ...]:
        """The same of the first slot with a delta; of the first one where none has any."""
        return self.sharing_of(next((i for i in range(self.slots) if i not in self.zero), 0))

    def differing(self, sharing: tuple[int, ...]) -> list[int]:
        """Slots that do not share as others do, or may have no delta."""
        if not self.zero and self.sharing == [sharing]:
            return []
        slots = range(self.slots)
        return [i for i in slots if i in self.zero or self.sharing_of(i) != sharing]


@dataclass(frozen=True, eq=False)
class Staged:
    """A load whose tensors have been read.

    Attributes:
        bytes: (nbytes,) uint8, in host memory or on a device.
        findings: What is known of its values.
    """

    bytes: Tensor
    findings: Findings

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.bytes.nbytes

    @property
    def on_host(self) -> bool:
        """True where it is in host memory."""
        return self.bytes.device.type == "cpu"


def loads_of(group: Group, limit_bytes: int) -> list[Load]:
    """The loads of a group, in the order in which they are used.

    Args:
        group: The group.
        limit_bytes: Most bytes of a load, unless one slot takes more.
    """
    return group.derived(("loads", limit_bytes), lambda: _loads_of(group, limit_bytes))


def _loads_of(group: Group, limit_bytes: int) -> list[Load]:
    spans = {share.lora: _spans(group, share, limit_bytes) for share in group.shares}
    rounds = max((len(own) for own in spans.values()), default=0)
    # The first load of every LoRA comes first: it tells which ranks are shared.
    return [
        _load(group, share, spans[share.lora][turn])
        for turn in range(rounds)
        for share in group.shares
        if turn < len(spans[share.lora])
    ]


def _spans(group: Group, share: Share, limit_bytes: int) -> list[range]:
    each = sum(m.nbytes(side) for m in share.members for side in LowRankSide)
    return list(in_spans(len(group.targets), each, limit_bytes))


def _load(group: Group, share: Share, slots: range) -> Load:
    blocks, end = [], 0
    for index, member in enumerate(share.members):
        for side in LowRankSide:
            block = Block(index, side, end, (len(slots), *member.shape(side)), member.dtype)
            blocks.append(block)
            end = round_up(end + block.nbytes, _ALIGNMENT)
    return Load(group.targets, share, slots, tuple(blocks), end)
