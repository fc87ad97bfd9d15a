"""Squared norms of the rows and columns of a matrix, summed up in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwenlora import _core
from qwenlora.packing.host_bytes import host_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_column_norms", "row_norms"]


def row_norms(rows: Tensor) -> Tensor:
    """(n,) float64 of (n, K) float32."""
    if rows.device.type != "cpu":
        return rows.square().sum(dim=1, dtype=torch.float64)
    norms = torch.empty(rows.shape[0], dtype=torch.float64)
    _core.row_norms(*_bytes(rows, norms), columns=rows.shape[1], threads=torch.get_num_threads())
    return norms


def add_column_norms(norms: Tensor, rows: Tensor) -> None:
    """Add those of (n, K) float32 to (K,) float64."""
    if rows.device.type != "cpu":
        norms += rows.square().sum(dim=0, dtype=torch.float64)
        return
    _core.column_norms(*_bytes(rows, norms), columns=rows.shape[1], threads=torch.get_num_threads())


def _bytes(rows: Tensor, norms: Tensor) -> tuple[Any, Any]:
    return host_bytes(rows.contiguous()), host_bytes(norms)
