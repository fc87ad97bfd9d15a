"""Strength times scale, as one factor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["factor_at", "factors_at"]


def factors_at(scales: Tensor, strength: float) -> Tensor:
    """Each scale times the strength, in float64 and rounded once to float32.

    A product of zero is not negative: where a rank has no values, all ways of composing leave the
    same bits.

    Args:
        scales: Float64, on the host, of any shape.
        strength: Factor on the whole delta.
    """
    return (scales * strength + 0.0).to(torch.float32)


def factor_at(scale: float, strength: float) -> float:
    """One scale times the strength; see `factors_at`."""
    return float(factors_at(torch.tensor(scale, dtype=torch.float64), strength))
