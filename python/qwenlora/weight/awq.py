"""The unsigned 4-bit weight of an AWQ layer."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.packing.host_bytes import host_bytes
from qwenlora.packing.layout import MODULATION_PLANES, RowOrder
from qwenlora.packing.pack import deinterleave_modulation
from qwenlora.weight.stored import RoundingSteps

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AWQ_GROUP", "AwqWeight", "stored_rows"]

AWQ_GROUP = 64
"""Columns that share one scale and one zero."""
_ROWS = 4
"""Rows whose values alternate in memory."""
_WORDS = AWQ_GROUP // 4
"""Words of 16 bits that hold one group of one row."""


def stored_rows(rows: int, order: RowOrder) -> Tensor:
    """(rows,) int64: where a layer of this order stores each logical row."""
    numbers = torch.arange(rows)
    return numbers if order is RowOrder.PLANAR else deinterleave_modulation(numbers)


class AwqWeight:
    """value * scale + zero, where the values are integers in [0, 15]."""

    alignment = 1

    def __init__(
        self,
        qweight: Tensor,
        wscales: Tensor,
        wzeros: Tensor,
        device: torch.device,
        *,
        order: RowOrder,
    ) -> None:
        """Take the layer's tensors.

        Args:
            qweight: (N/4, K/2) int32 packed.
            wscales: (K/64, N).
            wzeros: (K/64, N).
            device: Where rows are given.
            order: The order in which rows are stored.
        """
        self._qweight = qweight.detach()
        self._wscales, self._wzeros = wscales.detach(), wzeros.detach()
        self._device = device
        self._order = order

    def rows(self, begin: int, count: int) -> Tensor:
        """See `StoredWeight`."""
        on_host = self._device.type == "cpu"
        return self._by_rust(begin, count) if on_host else self._by_torch(begin, count)

    def steps(self, begin: int, count: int) -> RoundingSteps:
        """See `StoredWeight`."""
        scales = self._scales[:, self._stored[begin : begin + count]].T  # (rows, K/64)
        ones = torch.ones(scales.shape[1] * AWQ_GROUP, dtype=torch.float64, device=self._device)
        return RoundingSteps(scales.double().square(), ones)

    @cached_property
    def _stored(self) -> Tensor:
        return stored_rows(self._wscales.shape[1], self._order).to(self._device)

    @cached_property
    def _scales(self) -> Tensor:
        return self._wscales.to(self._device, torch.float32)

    @cached_property
    def _zeros(self) -> Tensor:
        return self._wzeros.to(self._device, torch.float32)

    def _by_torch(self, begin: int, count: int) -> Tensor:
        """(count, K), as the layout is defined."""
        stored = self._stored[begin : begin + count]
        # (N/4, K/2) words of 32 bits -> (N/4, K/64, n4, 16) words of 16 bits
        words = self._qweight.view(torch.int16).view(-1, self._wscales.shape[0], _ROWS, _WORDS)
        chosen = stored.to(words.device)
        words = words[chosen // _ROWS, :, chosen % _ROWS].to(self._device)
        # (rows, K/64, k2, k8) words of 4 values, the first in the lowest bits
        words = words.view(count, -1, 2, 8, 1)
        shifts = torch.arange(0, 16, 4, device=self._device, dtype=torch.int16)
        values = (words >> shifts) & 15
        # (rows, K/64, k2, k8, k4) => (rows, K/64, k2, k4, k8)
        values = values.transpose(3, 4).reshape(count, -1, AWQ_GROUP).float()
        scales, zeros = self._scales[:, stored].T, self._zeros[:, stored].T  # (rows, K/64)
        return values.mul_(scales[..., None]).add_(zeros[..., None]).flatten(1)

    def _by_rust(self, begin: int, count: int) -> Tensor:
        """The same, bit for bit, in host memory."""
        groups, rows = self._wscales.shape
        dest = torch.empty((count, groups * AWQ_GROUP))
        _core.awq_rows(
            host_bytes(self._qweight),
            host_bytes(self._scales),
            host_bytes(self._zeros),
            host_bytes(dest),
            rows=rows,
            columns=groups * AWQ_GROUP,
            planes=1 if self._order is RowOrder.PLANAR else MODULATION_PLANES,
            begin=begin,
            count=count,
            threads=torch.get_num_threads(),
        )
        return dest
