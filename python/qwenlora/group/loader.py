"""From files to the device: tensors of one LoRA in several slots, read ahead of their use.

A *load* is what is read, copied and packed at a time: one LoRA's tensors in some slots of a group,
module by module, each module's `down` of all these slots and then its `up`. Reading scatters them
to that order, so that files of any order are one strided copy per module afterwards.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from qwenlora import _core, cache
from qwenlora.group.load import Findings, Staged
from qwenlora.packing.host_bytes import new_bytes
from qwenlora.source.dtypes import NAMES
from qwenlora.work.jobs import Jobs
from qwenlora.work.threads import readers_for
from qwenlora.work.workers import employed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

    from qwenlora.group.load import Load
    from qwenlora.source.source import LoraSource, TensorFetcher
    from qwenlora.work.workers import Readers, Reading

__all__ = ["Copied", "Loader"]


_AHEAD = 3
"""Loads of full size that are being read or wait to be used; of smaller ones more."""
_STARTERS = 3
"""Threads that make buffers and copy tensors in memory; files are read by Rust's."""


class Copied(Protocol):
    """A buffer's contents have left it: what `torch.cuda.Event` says."""

    def query(self) -> bool:
        """Tell if they have."""

    def synchronize(self) -> None:
        """Wait until they have."""


class Loader:
    """Reads loads ahead of their use, in order, within bounds of memory."""

    def __init__(
        self,
        loads: Sequence[Load],
        sources: Sequence[LoraSource],
        fetchers: Sequence[TensorFetcher],
        *,
        threads: int | None,
        pinned: bool,
    ) -> None:
        self._waiting = deque(loads)
        self._ahead_bytes = _AHEAD * max((load.nbytes for load in loads), default=0)
        self._begun: deque[tuple[Load, Callable[[], Staged]]] = deque()
        self._sources = sources
        self._fetchers = fetchers
        self._pinned = pinned
        self._threads = readers_for(threads)
        self._readers: Readers | None = None
        self._from_cache: set[Load] = set()
        self._used: deque[tuple[Tensor, Copied | None]] = deque()
        self._lock = threading.Lock()
        self._pool = Jobs(_STARTERS)

    def begin(self) -> None:
        """Begin to read."""
        self._read_ahead()

    def take(self, load: Load) -> Staged:
        """The next load, read; raises what reading it raised."""
        self._read_ahead()
        expected, finish = self._begun.popleft()
        if expected is not load:
            raise RuntimeError("loads are taken in the order in which they were announced")
        staged = finish()
        self._read_ahead()
        return staged

    def release(
        self, load: Load, staged: Staged, copied: Copied | None, *, keep_bytes: int
    ) -> None:
        """Keep a load that has been used, where the cache has room, or reuse its buffer.

        Args:
            load: What it is.
            staged: Its tensors.
            copied: When the buffer is no longer read from; None where it is free already.
            keep_bytes: Most bytes that the cache may hold with it; 0 keeps nothing.
        """
        if not staged.on_host:
            return
        key = self.key(load) if keep_bytes else None
        kept = key is not None and cache.pieces.put(key, staged, limit_bytes=keep_bytes)
        # Others may use what came from the cache: only buffers of our own are written to again.
        if not kept and load not in self._from_cache:
            whole = staged.bytes._base
            with self._lock:
                self._used.append((staged.bytes if whole is None else whole, copied))

    def key(self, load: Load) -> Hashable | None:
        """The load's key among those of all LoRAs; None where reading it again costs nothing."""
        source = self._sources[load.share.lora]
        return (source.identity, load.key) if source.cacheable else None

    def close(self) -> None:
        """Stop reading; what is being read is waited for, since it writes into buffers of ours."""
        self._waiting.clear()
        # First: threads of the pool wait for what is being read.
        try:
            if self._readers is not None:
                self._readers.close()
        finally:
            self._pool.close()
        self._begun.clear()
        while self._used:
            _, copied = self._used.popleft()
            if copied is not None:
                copied.synchronize()

    def _read_ahead(self) -> None:
        begun_bytes = sum(load.nbytes for load, _ in self._begun)
        while self._waiting and begun_bytes + self._waiting[0].nbytes <= self._ahead_bytes:
            load = self._waiting.popleft()
            begun_bytes += load.nbytes
            kept = self._kept(load)
            if kept is None:
                finish = self._begin(load)
            else:
                self._from_cache.add(load)
                finish = partial(_given, kept)
            self._begun.append((load, finish))

    def _kept(self, load: Load) -> Staged | None:
        key = self.key(load)
        if key is None:
            return None
        found = cache.on_device.get((key, load.device)) or cache.pieces.get(key)
        return found if isinstance(found, Staged) else None

    def _begin(self, load: Load) -> Callable[[], Staged]:
        """Begin to read a load; returns what waits for it."""
        self._readers = readers = self._readers or employed().readers(self._threads)
        fetcher = self._fetchers[load.share.lora]

        def start(buffer: Tensor) -> tuple[Tensor, Reading]:
            reading = fetcher.read_into(load.runs(), buffer, readers, measure=load.measured)
            return buffer, reading

        if not self._sources[load.share.lora].cacheable:
            # Tensors in memory are copied by whoever starts, and measured by whoever finishes.
            read = self._pool.submit(lambda: _finish(load, *start(self._buffer(load.nbytes))))
            return read.result
        ready = self._take_used(load.nbytes, at_once=True)
        if ready is not None:
            return partial(_finish, load, *start(ready))
        # New pinned memory takes its time, and so may a buffer that is still in use.
        started = self._pool.submit(lambda: start(self._buffer(load.nbytes)))
        return lambda: _finish(load, *started.result())

    def _buffer(self, nbytes: int) -> Tensor:
        used = self._take_used(nbytes, at_once=False)
        if used is not None:
            return used
        with torch.inference_mode(False):
            return _host_buffer(self._room(nbytes), pinned=self._pinned)[:nbytes]

    def _room(self, nbytes: int) -> int:
        """Bytes of the buffer for as many: pinned memory is given out in powers of two."""
        return 1 << (nbytes - 1).bit_length() if self._pinned else nbytes

    def _take_used(self, nbytes: int, *, at_once: bool) -> Tensor | None:
        """A used buffer that is just large enough: a load that is cached keeps its whole buffer.

        Args:
            nbytes: Bytes that are needed.
            at_once: Take only one that is free now; else wait until it is.
        """
        with self._lock:
            for index, (buffer, copied) in enumerate(self._used):
                free = copied is None or copied.query()
                if buffer.nbytes == self._room(nbytes) and (free or not at_once):
                    del self._used[index]
                    break
            else:
                return None
        if copied is not None:
            copied.synchronize()
        return buffer[:nbytes]


def _given(staged: Staged) -> Staged:
    return staged


def _finish(load: Load, buffer: Tensor, reading: Reading) -> Staged:
    return _look(load, buffer, reading.wait())


def _host_buffer(nbytes: int, *, pinned: bool) -> Tensor:
    if pinned:
        # Where the system pins no more memory, copies merely become synchronous.
        with contextlib.suppress(RuntimeError):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return new_bytes(nbytes)


def _look(load: Load, buffer: Tensor, peak: float | None) -> Staged:
    """See which members share a `down`, which slots may have no delta, and a peak not yet known."""
    slots = len(load.slots)
    blocks = [(b.begin, b.nbytes // slots, NAMES[b.dtype]) for b in load.blocks]
    measure = peak is None and load.device.type != "cuda"
    sharing, zero, found = _core.look_at(buffer.numpy(), blocks, slots, measure=measure)
    return Staged(buffer, Findings(slots, sharing, zero, found if peak is None else peak))
