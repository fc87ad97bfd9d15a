"""The unsigned 4-bit weight of an AWQ layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.weight.stored import RoundingSteps

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AwqWeight"]

_ROWS = 4
"""Rows whose values alternate in memory."""
_GROUP = 64
"""Columns that share one scale and one zero."""
_WORDS = _GROUP // 4
"""Words of 16 bits that hold one group of one row."""


class AwqWeight:
    """values * scale + zero, where the values are integers in [0, 15]."""

    alignment = 1

    def __init__(
        self,
        qweight: Tensor,
        wscales: Tensor,
        wzeros: Tensor,
        device: torch.device,
        *,
        stored_rows: Tensor,
    ) -> None:
        """Take the layer's tensors.

        Args:
            qweight: (N/4, K/2) int32 packed.
            wscales: (K/64, N).
            wzeros: (K/64, N).
            device: Where rows are given.
            stored_rows: (N,) int64: where each logical row is stored.
        """
        groups = wscales.shape[0]
        # (N/4, K/2) words of 32 bits -> (N/4, K/64, n4, 16) words of 16 bits
        words = qweight.detach().contiguous().view(torch.int16)
        self._words = words.view(-1, groups, _ROWS, _WORDS)
        self._wscales, self._wzeros = wscales.detach(), wzeros.detach()
        self._device = device
        self._stored_rows = stored_rows.to(qweight.device)

    def rows(self, begin: int, count: int) -> Tensor:
        """See `StoredWeight`."""
        stored = self._stored_rows[begin : begin + count]
        words = self._words[stored // _ROWS, :, stored % _ROWS].to(self._device)
        # (rows, K/64, k2, k8) words of 4 values, the first in the lowest bits
        words = words.view(len(stored), -1, 2, 8, 1)
        shifts = torch.arange(0, 16, 4, device=self._device, dtype=torch.int16)
        values = (words >> shifts) & 15
        # (rows, K/64, k2, k8, k4) => (rows, K/64, k2, k4, k8)
        values = values.transpose(3, 4).reshape(len(stored), -1, _GROUP).float()
        scales, zeros = self._of_rows(self._wscales, stored), self._of_rows(self._wzeros, stored)
        return torch.addcmul(zeros[..., None], values, scales[..., None]).flatten(1)

    def steps(self, begin: int, count: int) -> RoundingSteps:
        """See `StoredWeight`."""
        scales = self._of_rows(self._wscales, self._stored_rows[begin : begin + count])
        ones = torch.ones(scales.shape[1] * _GROUP, dtype=torch.float64, device=self._device)
        return RoundingSteps(scales.double().square(), ones)

    def _of_rows(self, by_group: Tensor, stored: Tensor) -> Tensor:
        """(K/64, N) -> (rows, K/64) float32."""
        return by_group[:, stored].T.to(self._device, torch.float32)
