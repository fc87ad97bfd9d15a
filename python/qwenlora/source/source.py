"""A LoRA's tensors, and how they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    import torch

    from qwenlora import _core
    from qwenlora.plan.documents import TensorRef
    from qwenlora.work.workers import Readers, Reading

__all__ = ["LoraSource", "Run", "TensorFetcher"]


class Run(NamedTuple):
    """Tensors of one size, and where they go in a buffer, one behind the other.

    Attributes:
        numbers: Which tensors of the source.
        offsets: Their first bytes in the file.
        nbytes: The size of each.
        begin: The first one's first byte in the buffer.
    """

    numbers: Sequence[int]
    offsets: Sequence[int]
    nbytes: int
    begin: int


class TensorFetcher(Protocol):
    """Reads tensors while one composition lasts."""

    def fetch(self, refs: Sequence[TensorRef]) -> list[torch.Tensor]:
        """Return host tensors in the file's dtype and shape, in the order of `refs`."""

    def read_into(
        self,
        runs: Iterable[Run],
        buffer: torch.Tensor,
        readers: Readers,
        *,
        measure: torch.dtype | None,
    ) -> Reading:
        """Begin to read the bytes of tensors into a (n,) uint8 host buffer.

        May be called from several threads at a time, each with its own buffer.

        Args:
            runs: The tensors, and where they go.
            buffer: Is filled; bytes between the tensors are left alone. Nobody may touch it
                before the reading is done.
            readers: Threads that read files.
            measure: The dtype of all these tensors, of which the largest magnitude is wanted, too,
                where it can be found while reading: float16, bfloat16 or float32.
        """

    def finish(self) -> None:
        """Raise where the source changed since it was opened, and close it."""

    def close(self) -> None:
        """Close without checking; closing twice is allowed."""


class LoraSource(Protocol):
    """One LoRA, planned, whose tensors can be fetched."""

    @property
    def plan(self) -> _core.FilePlan:
        """The file's plan."""

    @property
    def identity(self) -> Hashable:
        """Equal exactly while the contents are the same."""

    @property
    def cacheable(self) -> bool:
        """True where packed pieces are worth keeping: reading them again costs."""

    @property
    def nbytes(self) -> int:
        """Bytes to read; 0 where all is in memory."""

    def read_ahead(self) -> None:
        """Begin to bring the file into the system's memory, in the background."""

    def open(self) -> TensorFetcher:
        """Begin fetching."""
