"""A full delta: the matrix itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.adapter import Adapter
from qwenlora.delta.truncate import of_matrix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.factors import Factors

__all__ = ["FULL"]


def _factors(tensors: Mapping[str, Tensor], budget: int | None, device: torch.device) -> Factors:
    return of_matrix(tensors["diff"].to(device, torch.float32), budget)


def _matrix(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["diff"].to(torch.float32)


def _rows(tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    # Not by `[rows]`: PyTorch 2.5 has that for no float8.
    return tensors["diff"].index_select(0, rows).to(torch.float32)


FULL = Adapter(name="full", factors=_factors, matrix=_matrix, rows=_rows)
