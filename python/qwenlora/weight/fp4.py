"""The weight of an SVDQuant layer in 4-bit floats (nvfp4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.packing import pack
from qwenlora.packing.layout import E2M1

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.weight.stored import RoundingSteps

__all__ = ["FP4_GROUP", "Fp4Weight"]

FP4_GROUP = 16
"""Columns that share one scale."""
_TILE_ROWS = 128


class Fp4Weight:
    """value * scale * channel scale * tensor scale / smooth, where the values are e2m1."""

    alignment = _TILE_ROWS

    def __init__(
        self,
        qweight: Tensor,
        wscales: Tensor,
        smooth: Tensor,
        device: torch.device,
        *,
        row_factors: Tensor | None,
    ) -> None:
        """Take the layer's tensors.

        Args:
            qweight: (N, K/2) int8 packed.
            wscales: (K/16, N) float8_e4m3fn packed.
            smooth: (K,) float32 on `device`, logical.
            device: Where rows are given.
            row_factors: (N,) float32 on `device`, logical: channel scales times tensor scale; None
                for ones.
        """
        self._qweight = qweight.detach()
        # (K/16, N) nominal -> (N/128, K/16 * 128): whole tiles of rows can be taken.
        self._wscales = wscales.detach().view(torch.uint8).reshape(qweight.shape[0] // 128, -1)
        self._groups = wscales.shape[0]
        self._reciprocal = smooth.reciprocal()
        self._device = device
        self._row_factors = row_factors
        self._values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=device)

    def rows(self, begin: int, count: int) -> Tensor:
        """See `StoredWeight`."""
        first, last = begin // _TILE_ROWS, -(-(begin + count) // _TILE_ROWS)
        tiles = slice(first * _TILE_ROWS, last * _TILE_ROWS)
        codes = pack.unpack_svdq_qweight(self._qweight[tiles].to(self._device)) & 15
        packed = self._wscales[first:last].to(self._device).reshape(self._groups, -1)
        scales = pack.unpack_svdq_micro_scales(packed).view(torch.float8_e4m3fn).float()
        if self._row_factors is not None:
            scales = scales * self._row_factors[tiles, None]  # (rows, K/16)
        values = self._values[codes.int()].view(codes.shape[0], self._groups, FP4_GROUP)
        rows = (values * scales[..., None]).flatten(1) * self._reciprocal
        skipped = begin - first * _TILE_ROWS
        return rows[skipped : skipped + count]

    def steps(self, begin: int, count: int) -> RoundingSteps | None:
        """None: the largest value of a group is exact, and the noise is none on average."""
        return None
