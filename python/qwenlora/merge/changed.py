"""W' - W of an adapter that needs the base weight, as a matrix.

Differences are formed as such, and never W' less W: a small one keeps its precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.butterfly import butterfly_stage
from qwenlora.plan.documents import Side

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.delta.adapters.based import Based
    from qwenlora.delta.adapters.weight import Weight
    from qwenlora.delta.diagonal import DiagonalDelta
    from qwenlora.delta.rotation import RotationDelta

__all__ = ["changed_rows"]


def changed_rows(
    made: Based, weight: Weight, rows: tuple[int, int], *, begin: int, scale: float
) -> Tensor:
    """Some rows of W' - W at strength 1.

    Args:
        made: The delta's parts.
        weight: The slot's weight.
        rows: First of the slot's rows that are wanted, and how many.
        begin: First of the slot's rows that the delta changes.
        scale: Factor on its pair or product, in which it is not.

    Returns:
        (n, K) float32.
    """
    total = torch.zeros(rows[1], weight.columns)
    own = slice(rows[0] - begin, rows[0] - begin + rows[1])
    if made.pair is not None:
        up, down = made.pair.up[own].to(torch.float32), made.pair.down.to(torch.float32)
        total.addmm_(up, down, alpha=scale)
    if made.kron is not None:
        product = torch.kron(made.kron.w1.float(), made.kron.w2.float())[own]
        if made.kron.rows is not None:
            product *= made.kron.rows[own, None]
        if made.kron.columns is not None:
            product *= made.kron.columns
        total.add_(product, alpha=scale)
    if made.diagonal is not None:
        _add_diagonal(total, made.diagonal, weight, rows)
    if made.rotation is not None:
        total += _rotated(made.rotation, weight, rows)
    return total


def _add_diagonal(
    total: Tensor, diagonal: DiagonalDelta, weight: Weight, rows: tuple[int, int]
) -> None:
    for first, panel in weight.panels(*rows):
        at = first - rows[0]
        values = diagonal.values
        if diagonal.side is Side.OUT:
            own = first - diagonal.row_begin
            values = values[own : own + len(panel), None]
        total[at : at + len(panel)] += panel * values


def _rotated(rotation: RotationDelta, weight: Weight, rows: tuple[int, int]) -> Tensor:
    if rotation.side is Side.IN:
        panels = [_turned_inputs(rotation, first, own) for first, own in weight.panels(*rows)]
        return torch.cat(panels)
    # A block, or a butterfly's stage, mixes rows of all modules that the delta is of.
    whole = weight.panels(rotation.row_begin, rotation.row_count)
    changed = _turned_rows(rotation, torch.cat([panel for _, panel in whole]))
    begin = rows[0] - rotation.row_begin
    return changed[begin : begin + rows[1]]


def _turned_inputs(rotation: RotationDelta, first: int, panel: Tensor) -> Tensor:
    """W M^T - W of some rows, and then what factors on rows make of both."""
    blocks = rotation.stages[0]
    grouped = panel.view(len(panel), *blocks.shape[:2])  # (rows, n, b)
    turned: Tensor = torch.einsum("rnj,nij->rni", grouped, blocks).flatten(1)
    if rotation.scale is None:
        return turned
    own = first - rotation.row_begin
    less = rotation.scale[own : own + len(panel), None]
    return turned * (1 + less) + less * panel


def _turned_rows(rotation: RotationDelta, weight: Tensor) -> Tensor:
    """M W - W of all rows, and then what factors on rows make of both."""
    if len(rotation.stages) == 1:
        blocks = rotation.stages[0]
        turned = (blocks @ weight.view(*blocks.shape[:2], -1)).flatten(0, 1)
    else:
        # (K, rows): stages take rows last.
        columns = weight.T
        added = torch.zeros_like(columns)
        for stage, blocks in enumerate(rotation.stages):
            added += butterfly_stage(columns + added, blocks, stage)
        turned = added.T
    if rotation.rescale is None:
        return turned
    less = rotation.rescale.unsqueeze(1)
    return turned * (1 + less) + less * weight
