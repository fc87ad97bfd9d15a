"""The 4-bit weight of an SVDQuant layer, in integers or floats."""

from __future__ import annotations

import enum
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.packing import pack
from qwenlora.packing.host_bytes import host_bytes
from qwenlora.packing.layout import E2M1
from qwenlora.weight.stored import RoundingSteps

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SvdqForm", "SvdqWeight"]

_TILE_ROWS = 128


class SvdqForm(enum.Enum):
    """The form of the values."""

    INT4 = "int4"
    """Integers in [-8, 7] in groups of 64 columns; scales of 16 or 32 bits."""
    FP4 = "fp4"
    """e2m1 floats in groups of 16 columns; scales of 8 bits."""

    @property
    def group(self) -> int:
        """Columns that share one scale."""
        return 64 if self is SvdqForm.INT4 else 16


class SvdqWeight:
    """value * scale * row factor / smooth."""

    alignment = _TILE_ROWS

    def __init__(
        self,
        form: SvdqForm,
        qweight: Tensor,
        wscales: Tensor,
        smooth: Tensor,
        device: torch.device,
        *,
        row_factors: Tensor | None = None,
    ) -> None:
        """Take the layer's tensors.

        Args:
            form: The form of the values.
            qweight: (N, K/2) int8 packed.
            wscales: (K/group, N) packed.
            smooth: (K,) float32 on `device`, logical.
            device: Where rows are given.
            row_factors: (N,) float32 on `device`, logical: what the kernel multiplies each row by;
                None for ones.
        """
        self._form = form
        self._qweight = qweight.detach()
        self._wscales = wscales.detach()
        self._columns = smooth.shape[0]
        self._reciprocal = smooth.reciprocal()
        self._device = device
        self._row_factors = row_factors

    def rows(self, begin: int, count: int) -> Tensor:
        """See `StoredWeight`."""
        first, last = begin // _TILE_ROWS, -(-(begin + count) // _TILE_ROWS)
        on_host = self._device.type == "cpu"
        rows = self._by_rust(first, last) if on_host else self._by_torch(first, last)
        skipped = begin - first * _TILE_ROWS
        return rows[skipped : skipped + count]

    def steps(self, begin: int, count: int) -> RoundingSteps | None:
        """See `StoredWeight`.

        None for floats: their rounding adds nothing on average.
        """
        if self._form is SvdqForm.FP4:
            return None
        first, last = begin // _TILE_ROWS, -(-(begin + count) // _TILE_ROWS)
        skipped = begin - first * _TILE_ROWS
        scales = self._scales(first, last)[skipped : skipped + count]
        return RoundingSteps(scales.double().square(), self._reciprocal.double().square())

    @cached_property
    def _packed_scales(self) -> Tensor:
        """(N/128, K/group * 128) float32 on the device: tiles of rows, packed."""
        scales = self._wscales.to(self._device, torch.float32)
        return scales.reshape(self._qweight.shape[0] // _TILE_ROWS, -1)

    def _scales(self, first: int, last: int) -> Tensor:
        """(rows, K/group) float32 of these tiles, with the row factors."""
        packed = self._packed_scales[first:last].reshape(self._columns // self._form.group, -1)
        if self._form is SvdqForm.INT4:
            scales = pack.unpack_svdq_wscales(packed)
        else:
            scales = pack.unpack_svdq_micro_scales(packed)
        if self._row_factors is None:
            return scales
        return scales * self._row_factors[first * _TILE_ROWS : last * _TILE_ROWS, None]

    def _by_torch(self, first: int, last: int) -> Tensor:
        """(rows, K) of these tiles, as the layout is defined."""
        packed = self._qweight[first * _TILE_ROWS : last * _TILE_ROWS].to(self._device)
        values = pack.unpack_svdq_qweight(packed)  # (rows, K)
        if self._form is SvdqForm.FP4:
            magnitudes = torch.tensor([*E2M1, *(-own for own in E2M1)], device=self._device)
            values = magnitudes[(values & 15).int()]
        scales = self._scales(first, last)
        groups = values.view(values.shape[0], -1, self._form.group) * scales[..., None]
        return groups.flatten(1).mul_(self._reciprocal)

    def _by_rust(self, first: int, last: int) -> Tensor:
        """The same, bit for bit, in host memory."""
        rows = slice(first * _TILE_ROWS, last * _TILE_ROWS)
        factors = self._row_factors
        dest = torch.empty((rows.stop - rows.start, self._columns))
        _core.svdq_rows(
            self._form.value,
            host_bytes(self._qweight[rows]),
            host_bytes(self._packed_scales[first:last]),
            None if factors is None else host_bytes(factors[rows]),
            host_bytes(self._reciprocal),
            host_bytes(dest),
            threads=torch.get_num_threads(),
        )
        return dest
