"""Stand-in for Nunchaku's block offload, which also runs where there is no GPU."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NUM_BUFFERS = 2
"""One buffer block computes while the other one is filled."""


class CPUOffloadManager:
    """Runs the blocks of a transformer that lie on the host through two buffer blocks.

    Names, arguments and behaviour are those of the class in `nunchaku.models.utils`, its traps
    included; the device may be the CPU, too. There the two sides are distinct storages of one
    memory, the copies run in line, and there is no stream and no event.

    What decides whether code that changes blocks is right:

    - The buffers are deep copies of block 0, made once. A hook, an attribute or a changed shape
      that blocks get later does not reach them.
    - Every offloaded block is copied again in each forward, tensor by tensor in the order of
      `parameters()` and `buffers()`, whatever the tensors are called; see `copy_params_into`.
    - An offloaded block is itself never called.
    - `step` counts blocks on its own: a forward that ends in an exception leaves the count where it
      was, and all later forwards load the wrong blocks until `current_block_idx` is set to 0.
    - `set_device` makes a new `memory_stream`, and "cuda" and "cuda:0" are different devices to it:
      a model that was made ready for "cuda" gets a new stream at its first forward.
    - On CUDA it cannot be deep-copied, nor can the transformer that holds it: streams cannot be.

    Attributes:
        blocks: The transformer's own blocks: the object that was given, not a copy.
        buffer_blocks: What runs in place of offloaded blocks: block i in buffer i % 2.
        device: Where blocks run.
        use_pin_memory: Whether offloaded blocks were asked to be pinned. Without CUDA they are not.
        on_gpu_modules: The modules that lie on `device` besides the blocks.
        num_blocks_on_gpu: Number of blocks, from the first, that lie on `device` themselves.
        memory_stream: Stream of the copies; None on the CPU.
        compute_done: Recorded before the block that runs now was queued; None on the CPU.
        memory_done: Recorded after the last copy; None on the CPU.
        current_block_idx: The block that runs now.
        forward_counter: Forwards that ran to their end.
        empty_cache_freq: Forwards between two calls of `torch.cuda.empty_cache`; 0 for none.
        bytes_per_forward: Not in Nunchaku, and None unless set. Given a list, every forward appends
            the bytes that it copied from the host.
    """

    buffer_blocks: list[nn.Module]
    device: torch.device | None
    memory_stream: torch.cuda.Stream | None
    compute_done: torch.cuda.Event | None
    memory_done: torch.cuda.Event | None
    bytes_per_forward: list[int] | None

    def __init__(
        self,
        blocks: nn.ModuleList | list[nn.Module],
        device: torch.device | str | None = None,
        use_pin_memory: bool = True,
        on_gpu_modules: Sequence[nn.Module] = (),
        num_blocks_on_gpu: int = 1,
        empty_cache_freq: int = 0,
    ) -> None:
        """Make the buffers and move everything to its place.

        Args:
            blocks: Blocks of one structure and of tensors of one size.
            device: Where blocks run; None for "cuda" where there is one, else the CPU.
            use_pin_memory: Pin the offloaded blocks, where CUDA is available.
            on_gpu_modules: Further modules to keep on `device`.
            num_blocks_on_gpu: At least 1; blocks from the first that stay on `device`.
            empty_cache_freq: Forwards between two calls of `torch.cuda.empty_cache`; 0 for none.

        Raises:
            ValueError: No block is to stay on `device`, or it is neither a CPU nor a CUDA device.
        """
        if num_blocks_on_gpu < 1:
            raise ValueError(f"`num_blocks_on_gpu` must be at least 1, got: {num_blocks_on_gpu}")
        self.blocks = blocks
        self.use_pin_memory = use_pin_memory
        self.on_gpu_modules = on_gpu_modules
        self.num_blocks_on_gpu = num_blocks_on_gpu
        self.memory_stream = self.compute_done = self.memory_done = None
        self.buffer_blocks = [copy.deepcopy(blocks[0]) for _ in range(NUM_BUFFERS)]
        self.device = None
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.set_device(device)
        self.current_block_idx = 0
        self.forward_counter = 0
        self.empty_cache_freq = empty_cache_freq
        self.bytes_per_forward = None

    def set_device(self, device: torch.device | str, force: bool = False) -> None:
        """Move buffers and resident modules to a device and all other blocks to the host.

        Args:
            device: A CPU or CUDA device.
            force: Also when the device is the one of before.

        Raises:
            ValueError: It is another kind of device.
        """
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"`device` must be a CPU or CUDA device, got: {device}")
        if device == self.device and not force:
            return
        self.device = device
        self.memory_stream = self.compute_done = self.memory_done = None
        if device.type == "cuda":
            self.memory_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.compute_done, self.memory_done = _event(), _event()
        for module in (*self.buffer_blocks, *self.on_gpu_modules):
            module.to(device)
        for index, block in enumerate(self.blocks):
            if index < self.num_blocks_on_gpu:
                block.to(device)
                continue
            block.to("cpu")
            if self.use_pin_memory and torch.cuda.is_available():
                for tensor in chain(block.parameters(), block.buffers()):
                    tensor.data = tensor.data.pin_memory()

    def load_block(self, block_idx: int, non_blocking: bool = True) -> None:
        """Copy an offloaded block into its buffer, on the current stream.

        Args:
            block_idx: Number of the block; nothing is done for one that is resident or past the
                last.
            non_blocking: Do not wait for copies from pinned memory.

        Raises:
            RuntimeError: A tensor does not fit the one at its place in the buffer.
        """
        if not self.num_blocks_on_gpu <= block_idx < len(self.blocks):
            return
        block, buffer = self.blocks[block_idx], self._buffer_of(block_idx)
        copy_params_into(block, buffer, non_blocking=non_blocking)
        if self.bytes_per_forward is not None:
            if not self.bytes_per_forward:
                self.bytes_per_forward.append(0)
            self.bytes_per_forward[-1] += sum(source.nbytes for source, _ in _pairs(block, buffer))

    def step(self, compute_stream: torch.cuda.Stream | None = None) -> None:
        """Load the next block; called after each block was queued.

        The buffer that it goes to is the one that the block before the current one ran in.

        Args:
            compute_stream: Stream that blocks run on; None for the current one.
        """
        if self.memory_stream is None:
            self.load_block(self.current_block_idx + 1)
        else:
            if compute_stream is None:
                compute_stream = torch.cuda.current_stream(self.device)
            self._load_beside(compute_stream, self.memory_stream)
        self.current_block_idx += 1
        if self.current_block_idx < len(self.blocks):
            return
        self.current_block_idx = 0
        self.forward_counter += 1
        if self.empty_cache_freq > 0 and self.forward_counter % self.empty_cache_freq == 0:
            torch.cuda.empty_cache()

    def get_block(self, block_idx: int | None = None) -> nn.Module:
        """Return the module to call for a block: itself where it is resident, else its buffer.

        Args:
            block_idx: Number of the block; None for the current one.
        """
        if block_idx is None:
            block_idx = self.current_block_idx
        if block_idx < self.num_blocks_on_gpu:
            return self.blocks[block_idx]
        return self._buffer_of(block_idx)

    def initialize(self, stream: torch.cuda.Stream | None = None) -> None:
        """Record both events; called before the first block of each forward.

        It does not set `current_block_idx`.

        Args:
            stream: Stream that blocks run on; None for the current one.
        """
        if self.bytes_per_forward is not None:
            self.bytes_per_forward.append(0)
        for event in (self.compute_done, self.memory_done):
            if event is not None:
                event.record(torch.cuda.current_stream(self.device) if stream is None else stream)

    def _buffer_of(self, block_idx: int) -> nn.Module:
        return self.buffer_blocks[block_idx % NUM_BUFFERS]

    def _load_beside(
        self, compute_stream: torch.cuda.Stream, memory_stream: torch.cuda.Stream
    ) -> None:
        computed, copied = _event(), _event()
        computed.record(compute_stream)
        with torch.cuda.stream(memory_stream):
            # The event of one step before: the current block still runs, in the other buffer.
            if self.compute_done is not None:
                memory_stream.wait_event(self.compute_done)
            self.load_block(self.current_block_idx + 1)
            copied.record(memory_stream)
        compute_stream.wait_event(copied)
        self.compute_done, self.memory_done = computed, copied


@torch.no_grad()
def copy_params_into(source: nn.Module, target: nn.Module, non_blocking: bool = True) -> None:
    """Copy tensors by position, as `nunchaku.utils.copy_params_into` does.

    The n-th parameter goes to the n-th parameter and the n-th buffer to the n-th buffer. Names are
    not compared, the longer list's rest is left out without a word, a tensor that occurs twice
    counts once, and `Tensor.copy_` casts and broadcasts: one row fills all rows. Of other
    attributes only `wtscale` is carried over, which Nunchaku's layers keep as a plain number.

    Args:
        source: Module to copy from.
        target: Module to copy into.
        non_blocking: Do not wait for copies from pinned memory.

    Raises:
        RuntimeError: A tensor does not fit the one at its place.
        AssertionError: Of two modules at one place only one has a `wtscale`.
    """
    for theirs, ours in _pairs(source, target):
        ours.copy_(theirs, non_blocking=non_blocking)
    for module, twin in zip(source.modules(), target.modules(), strict=False):
        if hasattr(module, "wtscale") != hasattr(twin, "wtscale"):
            raise AssertionError(f"only one has a `wtscale`: {module!r} or {twin!r}")
        if hasattr(module, "wtscale"):
            twin.wtscale = module.wtscale


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _pairs(source: nn.Module, target: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(source.parameters(), target.parameters(), strict=False)
    yield from zip(source.buffers(), target.buffers(), strict=False)
