"""The base weight of a slot, read from a checkpoint: the rows of one tensor, or of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora.delta.finite import is_finite
from qwenlora.errors import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from qwenlora.delta.adapters.weight import Weight
    from qwenlora.source.checkpoint import Checkpoint

__all__ = ["FileWeight", "JoinedWeight", "Segment"]

_PANEL_BYTES = 16 << 20
"""Bytes of one float32 panel."""


class FileWeight:
    """A matrix (N, K) of a checkpoint that is stored as it was trained; a `Weight`.

    Its norms are exact: nothing was quantized.
    """

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        """Name the matrix; nothing is read yet."""
        self._checkpoint = checkpoint
        self._key = key
        self.columns = checkpoint.tensors[key].shape[1]

    def panels(self, begin: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """See `Weight`."""
        step = max(_PANEL_BYTES // (4 * self.columns), 1)
        for first in range(begin, begin + count, step):
            rows = min(step, begin + count - first)
            panel = self._checkpoint.read(self._key, begin=first, count=rows)
            yield first, panel.to(torch.float32)

    def row_norms(self, begin: int, count: int) -> Tensor:
        """See `Weight`."""
        norms = [panel.double().square().sum(dim=1) for _, panel in self.panels(begin, count)]
        return torch.cat(norms)

    def column_norms(self, begin: int, count: int) -> Tensor:
        """See `Weight`."""
        total = torch.zeros(self.columns, dtype=torch.float64)
        for _, panel in self.panels(begin, count):
            total += panel.double().square().sum(dim=0)
        return total

    def times(self, x: Tensor, begin: int, count: int) -> Tensor:
        """See `Weight`."""
        x = x.to(torch.float32)
        return torch.cat([panel @ x for _, panel in self.panels(begin, count)])

    def times_left(self, b: Tensor, begin: int, count: int) -> Tensor:
        """See `Weight`."""
        left = b.to(torch.float32).T  # (r, count)
        product = torch.zeros(left.shape[0], self.columns)
        for first, panel in self.panels(begin, count):
            product.addmm_(left[:, first - begin : first - begin + len(panel)], panel)
        return product


class Segment(NamedTuple):
    """Some rows of a slot that one tensor, or one layer, of the checkpoint holds.

    Attributes:
        begin: First of the slot's rows.
        length: How many.
        weight: Makes what holds them, whose first row is the first of these.
    """

    begin: int
    length: int
    weight: Callable[[], Weight]


class JoinedWeight:
    """The weight of a slot, of one segment or of several; a `Weight`.

    A segment is read when some of its rows are asked for. Results are finite.
    """

    def __init__(self, path: str, columns: int, segments: Sequence[Segment]) -> None:
        """Take the segments, in the order of their rows.

        Args:
            path: The slot's, for errors.
            columns: K.
            segments: Those of the rows that will be asked for.
        """
        self.columns = columns
        self._path = path
        self._segments = segments
        self._held: dict[int, Weight] = {}

    def panels(self, begin: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """See `Weight`."""
        for offset, weight, first, rows in self._of(begin, count):
            for at, panel in weight.panels(first, rows):
                yield at + offset, self._finite(panel)

    def row_norms(self, begin: int, count: int) -> Tensor:
        """See `Weight`."""
        own = [weight.row_norms(first, rows) for _, weight, first, rows in self._of(begin, count)]
        return self._finite(torch.cat(own))

    def column_norms(self, begin: int, count: int) -> Tensor:
        """See `Weight`."""
        own = [weight.column_norms(at, rows) for _, weight, at, rows in self._of(begin, count)]
        return self._finite(torch.stack(own).sum(dim=0))

    def times(self, x: Tensor, begin: int, count: int) -> Tensor:
        """See `Weight`."""
        own = [weight.times(x, first, rows) for _, weight, first, rows in self._of(begin, count)]
        return torch.cat(own)

    def times_left(self, b: Tensor, begin: int, count: int) -> Tensor:
        """See `Weight`."""
        total = torch.zeros(b.shape[1], self.columns)
        for offset, weight, first, rows in self._of(begin, count):
            at = first + offset - begin
            total += weight.times_left(b[at : at + rows], first, rows)
        return total

    def _of(self, begin: int, count: int) -> Iterator[tuple[int, Weight, int, int]]:
        """The segments of some rows: their offset, what holds them, and which of its rows."""
        for number, segment in enumerate(self._segments):
            first = max(begin, segment.begin)
            end = min(begin + count, segment.begin + segment.length)
            if first >= end:
                continue
            if number not in self._held:
                self._held[number] = segment.weight()
            yield segment.begin, self._held[number], first - segment.begin, end - first

    def _finite(self, values: Tensor) -> Tensor:
        if not is_finite(values):
            raise NonFiniteError(f"`{self._path}`: the base's weight holds NaN or infinity")
        return values
