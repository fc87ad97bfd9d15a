"""From files to the device: tensors of one LoRA in several slots, read ahead of their use.

A *load* is what is read, copied and packed at a time: one LoRA's tensors in some slots of a group,
module by module, each module's `down` of all these slots and then its `up`. Reading scatters them
to that order, so that files of any order are one strided copy per module afterwards.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from qwenlora import cache
from qwenlora.bulk import Group, Stack, in_spans
from qwenlora.layout import LowRankSide, round_up
from qwenlora.source import Run

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.source import LoraSource, TensorFetcher
    from qwenlora.spec import ComposeOptions
    from qwenlora.targets import Target

__all__ = ["Block", "Findings", "Load", "Loader", "Staged", "loads_of"]

Words: TypeAlias = "npt.NDArray[np.uint16] | npt.NDArray[np.uint32]"

_ALIGNMENT = 256
"""Blocks begin at multiples of this: any dtype can be viewed there, and copies are whole lines."""
_PROBE_BYTES = 64
"""Bytes of a tensor that mostly tell whether it is another's copy, or zero."""
_AHEAD = 4
"""Loads that are being read or wait to be used."""
_READERS = 2
"""Loads that are read at a time: one fills the gaps that the other's last reads leave."""


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
        stack: The LoRA's members.
        slots: Which slots of the group.
        blocks: What lies where in its buffer.
        nbytes: Size of the buffer.
    """

    targets: tuple[Target, ...]
    stack: Stack
    slots: range
    blocks: tuple[Block, ...]
    nbytes: int

    @property
    def device(self) -> torch.device:
        """Where its slots are."""
        return self.targets[0].device

    @cached_property
    def key(self) -> Hashable:
        """What it holds, within one LoRA: its slots by their first tensors, and its modules."""
        first = self.stack.members[0].tensors[LowRankSide.DOWN].indices
        shapes = tuple((block.side, block.shape, block.dtype) for block in self.blocks)
        return (tuple(first[self.slots.start : self.slots.stop]), shapes)

    def runs(self) -> Iterator[Run]:
        """All tensors, and where each goes in the buffer."""
        slots = slice(self.slots.start, self.slots.stop)
        for block in self.blocks:
            own = self.stack.members[block.member].tensors[block.side]
            begins = range(block.begin, block.begin + block.nbytes, own.len_bytes)
            yield Run(own.indices[slots], own.offsets[slots], begins, own.len_bytes)


@dataclass(eq=False)
class Findings:
    """What is known of a load's values.

    Attributes:
        sharing: Slot by slot, for each member the index of the first one with an equal `down`.
        zero: Slot by slot, whether the delta may be all zero.
        peak: Largest magnitude; NaN or infinity where there is one. None until it is asked for.
    """

    sharing: tuple[tuple[int, ...], ...]
    zero: tuple[bool, ...]
    peak: float | None = None

    def differing(self, sharing: tuple[int, ...]) -> list[int]:
        """Slots that do not share as others do, or may have no delta."""
        if self._alike == sharing:
            return []
        found = enumerate(zip(self.sharing, self.zero, strict=True))
        return [slot for slot, (own, zero) in found if zero or own != sharing]

    @cached_property
    def _alike(self) -> tuple[int, ...] | None:
        """How all slots share, where they all do alike and each has a delta."""
        alike = not any(self.zero) and len(set(self.sharing)) == 1
        return self.sharing[0] if alike else None


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
        """Whether it is in host memory."""
        return self.bytes.device.type == "cpu"


def loads_of(group: Group, limit_bytes: int) -> list[Load]:
    """What is read for a group, in the order in which it is used.

    Args:
        group: The group.
        limit_bytes: Most bytes of a load, unless one slot takes more.
    """
    known = _LOADS.setdefault(group, {}).get(limit_bytes)
    if known is None:
        known = _LOADS[group][limit_bytes] = _loads_of(group, limit_bytes)
    return known


_LOADS: weakref.WeakKeyDictionary[Group, dict[int, list[Load]]] = weakref.WeakKeyDictionary()


def _loads_of(group: Group, limit_bytes: int) -> list[Load]:
    spans = {stack.lora: _spans(group, stack, limit_bytes) for stack in group.stacks}
    rounds = max((len(own) for own in spans.values()), default=0)
    # The first load of every LoRA comes first: it tells which ranks are shared.
    return [
        _load(group, stack, spans[stack.lora][turn])
        for turn in range(rounds)
        for stack in group.stacks
        if turn < len(spans[stack.lora])
    ]


def _spans(group: Group, stack: Stack, limit_bytes: int) -> list[range]:
    each = sum(m.nbytes(side) for m in stack.members for side in LowRankSide)
    return list(in_spans(len(group.targets), each, limit_bytes))


def _load(group: Group, stack: Stack, slots: range) -> Load:
    blocks, end = [], 0
    for index, member in enumerate(stack.members):
        for side in LowRankSide:
            block = Block(index, side, end, (len(slots), *member.shape(side)), member.dtype)
            blocks.append(block)
            end = round_up(end + block.nbytes, _ALIGNMENT)
    return Load(group.targets, stack, slots, tuple(blocks), end)


class Loader:
    """Reads loads ahead of their use, in order, within bounds of memory."""

    def __init__(
        self,
        loads: Sequence[Load],
        sources: Sequence[LoraSource],
        fetchers: Sequence[TensorFetcher],
        options: ComposeOptions,
        *,
        pinned: bool,
    ) -> None:
        self._waiting = deque(loads)
        self._begun: deque[tuple[Load, Future[Staged] | Staged]] = deque()
        self._sources = sources
        self._fetchers = fetchers
        self._pinned = pinned
        self._cache_bytes = options.cache_bytes
        self._used: deque[tuple[Tensor, Callable[[], object] | None]] = deque()
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="qwenlora-read")

    def take(self, load: Load) -> Staged:
        """The next load, read; raises what reading it raised."""
        self._read_ahead()
        expected, found = self._begun.popleft()
        if expected is not load:
            raise RuntimeError("loads are taken in the order in which they were announced")
        staged = found if isinstance(found, Staged) else found.result()
        self._read_ahead()
        return staged

    def release(self, load: Load, staged: Staged, wait: Callable[[], object] | None) -> None:
        """Keep a load that has been used, where the cache has room, or reuse its buffer.

        Args:
            load: What it is.
            staged: Its tensors.
            wait: Returns when the buffer is no longer read from.
        """
        if not staged.on_host:
            return
        key = self.key(load)
        if key is None or not cache.pieces.put(key, staged, limit_bytes=self._cache_bytes):
            self._used.append((staged.bytes, wait))

    def key(self, load: Load) -> Hashable | None:
        """What a load is among all LoRAs; None where reading it again costs nothing."""
        source = self._sources[load.stack.lora]
        return (source.identity, load.key) if source.cacheable else None

    def close(self) -> None:
        """Stop reading; what is being read is waited for, since it writes into buffers of ours."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._begun.clear()
        while self._used:
            _, wait = self._used.popleft()
            if wait is not None:
                wait()

    def _read_ahead(self) -> None:
        while self._waiting and len(self._begun) < _AHEAD:
            load = self._waiting.popleft()
            self._begun.append((load, self._kept(load) or self._begin(load)))

    def _kept(self, load: Load) -> Staged | None:
        key = self.key(load)
        if key is None:
            return None
        found = cache.on_device.get((key, load.device)) or cache.pieces.get(key)
        return found if isinstance(found, Staged) else None

    def _begin(self, load: Load) -> Future[Staged]:
        fetcher = self._fetchers[load.stack.lora]
        buffer, wait = self._buffer(load.nbytes)

        def read() -> Staged:
            if wait is not None:
                wait()
            fetcher.read_into(load.runs(), buffer, share=_READERS)
            return _look(load, buffer)

        return self._pool.submit(read)

    def _buffer(self, nbytes: int) -> tuple[Tensor, Callable[[], object] | None]:
        for index, (used, wait) in enumerate(self._used):
            if used.nbytes == nbytes:
                del self._used[index]
                return used, wait
        return _host_buffer(nbytes, pinned=self._pinned), None


def _host_buffer(nbytes: int, *, pinned: bool) -> Tensor:
    if pinned:
        # Where the system pins no more memory, copies merely become synchronous.
        with contextlib.suppress(RuntimeError):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(nbytes, dtype=torch.uint8)


def _look(load: Load, buffer: Tensor) -> Staged:
    """See which members share a `down`, and which slots may have no delta."""
    words = [_words(block, buffer) for block in load.blocks]
    downs, ups = words[::2], words[1::2]
    zero = _all_zero(downs) | _all_zero(ups)
    # A device finds the peak of what is copied there in no time.
    peak = None if load.device.type == "cuda" else _largest(load, words)
    return Staged(buffer, Findings(_sharing(downs), tuple(zero.tolist()), peak))


def _largest(load: Load, words: Sequence[Words]) -> float:
    peaks = [_peak(own, block.dtype) for own, block in zip(words, load.blocks, strict=True)]
    return max(peaks, key=lambda peak: float("inf") if math.isnan(peak) else peak)


def _peak(words: Words, dtype: torch.dtype) -> float:
    """The largest magnitude, found in bit patterns, whose order is that of magnitudes.

    Negative numbers are the largest unsigned integers, positive ones the largest signed ones.
    """
    mask = (1 << (8 * words.itemsize - 1)) - 1
    signed, unsigned = int(words.view(f"int{8 * words.itemsize}").max()), int(words.max())
    bits = max(signed, unsigned & mask if unsigned > mask else 0)
    integer = torch.int16 if words.itemsize == 2 else torch.int32
    return float(torch.tensor([bits], dtype=integer).view(dtype).item())


def _words(block: Block, buffer: Tensor) -> Words:
    """(slots, words) of unsigned integers of the dtype's size."""
    values = buffer[block.begin : block.begin + block.nbytes].numpy()
    if block.dtype.itemsize == 2:
        return values.view(np.uint16).reshape(block.shape[0], -1)
    return values.view(np.uint32).reshape(block.shape[0], -1)


def _sharing(downs: Sequence[Words]) -> tuple[tuple[int, ...], ...]:
    firsts = np.tile(np.arange(len(downs)), (downs[0].shape[0], 1))  # (slots, members)
    for later in range(1, len(downs)):
        for earlier in reversed(range(later)):
            firsts[_equal(downs[earlier], downs[later]), later] = earlier
    return tuple(map(tuple, firsts.tolist()))


def _equal(a: Words, b: Words) -> npt.NDArray[np.bool_]:
    """Slot by slot, whether two members' factors are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.zeros(a.shape[0], dtype=np.bool_)
    probe = _PROBE_BYTES // a.itemsize
    alike: npt.NDArray[np.bool_] = (a[:, :probe] == b[:, :probe]).all(axis=1)
    for slot in np.flatnonzero(alike):
        alike[slot] = np.array_equal(a[slot], b[slot])
    return alike


def _all_zero(blocks: Sequence[Words]) -> npt.NDArray[np.bool_]:
    """Slot by slot, whether every one of these blocks is zero there."""
    zero: npt.NDArray[np.bool_] = np.logical_and.reduce([_is_zero(words) for words in blocks])
    return zero


def _is_zero(words: Words) -> npt.NDArray[np.bool_]:
    # All bits but the sign: a negative zero is zero.
    bits = words.dtype.type((1 << (8 * words.itemsize - 1)) - 1)
    probe = _PROBE_BYTES // words.itemsize
    zero: npt.NDArray[np.bool_] = np.logical_not((words[:, :probe] & bits).any(axis=1))
    for slot in np.flatnonzero(zero):
        zero[slot] = not (words[slot] & bits).any()
    return zero
