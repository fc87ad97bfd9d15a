"""The signed 4-bit weight of an SVDQuant layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.packing import pack
from qwenlora.weight.stored import RoundingSteps

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["INT4_GROUP", "Int4Weight"]

INT4_GROUP = 64
"""Columns that share one scale."""
_TILE_ROWS = 128


class Int4Weight:
    """values * scale / smooth, where the values are integers in [-8, 7]."""

    alignment = _TILE_ROWS

    def __init__(
        self,
        qweight: Tensor,
        wscales: Tensor,
        smooth: Tensor,
        device: torch.device,
        *,
        channel_scales: Tensor | None = None,
    ) -> None:
        """Take the layer's tensors.

        Args:
            qweight: (N, K/2) int8 packed.
            wscales: (K/64, N) packed.
            smooth: (K,) float32 on `device`, logical.
            device: Where rows are given.
            channel_scales: (N,) float32 on `device`, logical: the kernel's factor on each row; None
                for ones.
        """
        # (K/64, N) nominal -> (N/128, K/64 * 128): whole tiles of rows can be taken.
        self._qweight = qweight.detach()
        self._wscales = wscales.detach().reshape(qweight.shape[0] // _TILE_ROWS, -1)
        self._groups = wscales.shape[0]
        self._reciprocal = smooth.reciprocal()
        self._device = device
        self._channel_scales = channel_scales

    def rows(self, begin: int, count: int) -> Tensor:
        """See `StoredWeight`."""
        first, last = self._tiles(begin, count)
        packed = self._qweight[first * _TILE_ROWS : last * _TILE_ROWS].to(self._device)
        values = pack.unpack_svdq_qweight(packed)  # (rows, K)
        scales = self._scales(first, last)  # (rows, K/64)
        grouped = values.view(values.shape[0], self._groups, INT4_GROUP) * scales[..., None]
        rows = grouped.flatten(1) * self._reciprocal
        skipped = begin - first * _TILE_ROWS
        return rows[skipped : skipped + count]

    def steps(self, begin: int, count: int) -> RoundingSteps:
        """See `StoredWeight`."""
        first, last = self._tiles(begin, count)
        skipped = begin - first * _TILE_ROWS
        squares = self._scales(first, last)[skipped : skipped + count].double().square()
        return RoundingSteps(squares, self._reciprocal.double().square())

    def _tiles(self, begin: int, count: int) -> tuple[int, int]:
        return begin // _TILE_ROWS, -(-(begin + count) // _TILE_ROWS)

    def _scales(self, first: int, last: int) -> Tensor:
        """(rows, K/64) float32 of these tiles."""
        packed = self._wscales[first:last].to(self._device).reshape(self._groups, -1)
        scales = pack.unpack_svdq_wscales(packed).float()
        if self._channel_scales is None:
            return scales
        return scales * self._channel_scales[first * _TILE_ROWS : last * _TILE_ROWS, None]
