"""A diagonal on a weight: every row, or every column, times a number of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.parts import PartKind, PartShape, ScaledPart
from qwenlora.delta.strength import factor_at
from qwenlora.plan.documents import Side

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

__all__ = ["DiagonalDelta", "bias_rows", "summed"]


@dataclass(frozen=True)
class DiagonalDelta:
    """W' - W of a diagonal D, without strength: (D - 1) W on rows, W (D - 1) on columns.

    Attributes:
        side: Whether it multiplies rows (OUT) or columns (IN).
        row_begin: First of the layer's logical rows that it changes.
        row_count: How many.
        values: D - 1 in float32: (row_count,) on rows, (K,) on columns.
        scales_bias: Whether D multiplies the layer's bias, too; on rows alone.
    """

    side: Side
    row_begin: int
    row_count: int
    values: Tensor
    scales_bias: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes

    @property
    def zero(self) -> bool:
        """True where it changes nothing."""
        return not bool(self.values.any())

    def scaled_parts(
        self,
        strength: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bias: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[ScaledPart, ...]:
        """The part that adds strength times this delta to what the layer computes.

        Args:
            strength: Factor on the whole delta.
            dtype: The slot's dtype; the product with the strength is formed in float32.
            device: The slot's device.
            bias: (N,) what the layer adds at x = 0, logical rows; None where it adds nothing.
            kept: (N,) what of it the layer that this was trained on does not add, so that no
                diagonal scales it; None for nothing.

        Returns:
            One FACTOR with t (D - 1), or one INPUT_FACTOR with it.
        """
        factor = (self.values * factor_at(1.0, strength)).to(device, dtype)
        rows = (self.row_begin, self.row_count)
        if self.side is Side.IN:
            shape = PartShape(PartKind.INPUT_FACTOR, *rows, (len(factor),))
            return (ScaledPart(shape, {"factor": factor}),)
        still = bias_rows(kept if self.scales_bias else bias, *rows, dtype, device)
        shape = PartShape(PartKind.FACTOR, *rows, ())
        return (ScaledPart(shape, {"factor": factor, "bias": still}),)


def summed(diagonals: Sequence[tuple[DiagonalDelta, float]]) -> list[DiagonalDelta]:
    """The sums of diagonals, each times its strength, in as few as act alike.

    Factors on rows are one diagonal of the rows from the first to the last that any of them
    changes. Factors on columns stay apart by the rows that they are for.

    Args:
        diagonals: Each with its strength.

    Returns:
        The sums, whose strength is 1.
    """
    own: dict[Hashable, list[tuple[DiagonalDelta, float]]] = {}
    for delta, strength in diagonals:
        rows = (delta.row_begin, delta.row_count) if delta.side is Side.IN else None
        own.setdefault((delta.side, delta.scales_bias, rows), []).append((delta, strength))
    return [_sum(alike) for alike in own.values()]


def _sum(alike: Sequence[tuple[DiagonalDelta, float]]) -> DiagonalDelta:
    first = alike[0][0]
    begin = min(delta.row_begin for delta, _ in alike)
    end = max(delta.row_begin + delta.row_count for delta, _ in alike)
    count = end - begin
    length = len(first.values) if first.side is Side.IN else count
    total = torch.zeros(length, dtype=torch.float64, device=first.values.device)
    for delta, strength in alike:
        at = 0 if delta.side is Side.IN else delta.row_begin - begin
        total[at : at + len(delta.values)] += delta.values.to(total) * strength
    return DiagonalDelta(first.side, begin, count, total.float(), first.scales_bias)


def bias_rows(
    bias: Tensor | None, begin: int, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Some rows (count,) of a layer's bias (N,); zeros where it has none."""
    if bias is None:
        return torch.zeros(count, dtype=dtype, device=device)
    return bias[begin : begin + count].to(device, dtype)
