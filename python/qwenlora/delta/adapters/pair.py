"""LoRA: a pair of factors, with a core between them or none, logical or packed by Nunchaku."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.adapter import Adapter, wide
from qwenlora.delta.factors import Factors
from qwenlora.packing.factor import unpack_factor
from qwenlora.packing.layout import LowRankSide

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["LORA"]


def _factors(
    tensors: Mapping[str, Tensor],
    budget: int | None = None,
    device: torch.device | None = None,
) -> Factors:
    """The pair that is stored, at any rank and anywhere: it is summed with others before a cut."""
    if "packed_down" in tensors:
        return Factors(
            down=unpack_factor(tensors["packed_down"], LowRankSide.DOWN),
            up=unpack_factor(tensors["packed_up"], LowRankSide.UP),
        )
    if "mid" in tensors:
        # delta = up (out, r2) @ mid (r2, r1) @ down (r1, in)
        down, mid, up = (wide(tensors[role]) for role in ("down", "mid", "up"))
        if mid.shape[0] < mid.shape[1]:
            return Factors(down=mid @ down, up=up)
        return Factors(down=down, up=up @ mid)
    return Factors(down=tensors["down"], up=tensors["up"])


def _matrix(tensors: Mapping[str, Tensor]) -> Tensor:
    factors = _factors(tensors)
    return factors.up.to(torch.float32) @ factors.down.to(torch.float32)


def _rows(tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    factors = _factors(tensors)
    # Not by `[rows]`: PyTorch 2.5 has that for no float8.
    return factors.up.index_select(0, rows).to(torch.float32) @ factors.down.to(torch.float32)


LORA = Adapter(name="lora", factors=_factors, matrix=_matrix, rows=_rows)
