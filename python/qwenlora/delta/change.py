"""What factors and rotations change in a weight, as a matrix: to measure, never to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.butterfly import butterfly_stage
from qwenlora.plan.documents import Side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.delta.diagonal import DiagonalDelta
    from qwenlora.delta.rotation import RotationDelta

__all__ = ["weight_change"]


def weight_change(
    weight: Tensor,
    diagonals: Sequence[tuple[DiagonalDelta, float]],
    rotations: Sequence[tuple[RotationDelta, float]],
) -> Tensor:
    """The sum of t (W' - W).

    Args:
        weight: W (N, K) float32, rows as in files.
        diagonals: Each with its strength t.
        rotations: Likewise.

    Returns:
        (N, K) float32.
    """
    total = torch.zeros_like(weight)
    for diagonal, strength in diagonals:
        rows = slice(diagonal.row_begin, diagonal.row_begin + diagonal.row_count)
        values = diagonal.values.to(weight) * strength
        factors = values.unsqueeze(1) if diagonal.side is Side.OUT else values
        total[rows] += weight[rows] * factors
    for rotation, strength in rotations:
        rows = slice(rotation.row_begin, rotation.row_begin + rotation.row_count)
        of_side = _of_rows if rotation.side is Side.OUT else _of_columns
        total[rows] += of_side(rotation, weight[rows]) * strength
    return total


def _of_rows(rotation: RotationDelta, weight: Tensor) -> Tensor:
    """(1 + rescale) M W - W."""
    # Rows last: (K, rows)
    turned = weight.mT
    stages = rotation.stages.to(weight)
    for stage, blocks in enumerate(stages):
        if len(stages) == 1:
            count, size, _ = blocks.shape
            split = turned.reshape(-1, count, size)
            added = torch.einsum("nij,knj->kni", blocks, split).reshape(turned.shape)
        else:
            added = butterfly_stage(turned, blocks, stage)
        turned = turned + added
    if rotation.rescale is not None:
        turned = turned * (1 + rotation.rescale.to(weight))
    return turned.mT - weight


def _of_columns(rotation: RotationDelta, weight: Tensor) -> Tensor:
    """(1 + scale) W M^T - W."""
    blocks = rotation.stages[0].to(weight)
    count, size, _ = blocks.shape
    split = weight.reshape(len(weight), count, size)
    turned = weight + torch.einsum("rnj,nij->rni", split, blocks).reshape(weight.shape)
    if rotation.scale is not None:
        turned = turned * (1 + rotation.scale.to(weight)).unsqueeze(1)
    return turned - weight
