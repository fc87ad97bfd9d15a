"""Weights that are stored as they are: plain linears, and the emulation without rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.weight.stored import RoundingSteps

__all__ = ["PlainWeight"]


class PlainWeight:
    """A matrix, divided by column, its rows reordered."""

    alignment = 1

    def __init__(
        self,
        weight: Tensor,
        device: torch.device,
        *,
        smooth: Tensor | None = None,
        stored_rows: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """Take the matrix.

        Args:
            weight: (N, K), any float dtype.
            device: Where rows are given.
            smooth: (K,) float32 on `device`: the divisor of each column; None for ones.
            stored_rows: (N,) int64: where each logical row is stored; None where the order is the
                same.
            factor: One factor on all values, any shape of one element; None for 1.
        """
        self._weight = weight.detach()
        self._device = device
        self._smooth = smooth
        self._stored_rows = stored_rows
        self._factor = factor

    def rows(self, begin: int, count: int) -> Tensor:
        """See `StoredWeight`."""
        if self._stored_rows is None:
            rows = self._weight[begin : begin + count]
        else:
            rows = self._weight[self._stored_rows[begin : begin + count].to(self._weight.device)]
        rows = rows.to(self._device, torch.float32)
        if self._factor is not None:
            rows = rows * self._factor.detach().to(self._device, torch.float32).reshape(())
        return rows if self._smooth is None else rows / self._smooth

    def steps(self, begin: int, count: int) -> RoundingSteps | None:
        """None: a plain weight is the one that adapters were trained on, or is no further off."""
        return None
