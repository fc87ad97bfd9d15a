"""A quantized layer of a checkpoint as a target, so that its weight is read as a model's is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qwenlora.errors import UnknownWeightError
from qwenlora.model.target import PACKED_DTYPES, LowRankPlace, Target
from qwenlora.packing.layout import TILE, RowOrder
from qwenlora.plan.documents import SlotKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.plan.documents import SlotRow

__all__ = ["layer_target"]

_NAMES = {"smooth": "smooth_factor", "lora_down": "proj_down", "lora_up": "proj_up"}
"""Names that some files have for a layer's tensors, and the layer's own."""
_PLACE = LowRankPlace("proj_down", "proj_up")
_UNSIGNED = ".net.2"
"""How the path of a layer ends whose input a fused MLP shifts, to quantize it without a sign."""


def layer_target(
    row: SlotRow, tensors: Mapping[str, Tensor], *, row_order: RowOrder, is_fused: bool
) -> Target:
    """A layer of its stored tensors.

    Args:
        row: Its facts: path, kind, and sides, which its tensors are checked against.
        tensors: What the checkpoint has of it, by their names in the layer.
        row_order: The order of its rows.
        is_fused: Whether the block that it is of runs an MLP in one kernel.

    Raises:
        UnknownWeightError: Its low-rank branch does not fit it.
    """
    layer = nn.Module()
    for name, tensor in tensors.items():
        layer.register_buffer(_NAMES.get(name, name), tensor)
    place = _PLACE if SlotKind(row.kind) is SlotKind.SVDQ else None
    if place is not None:
        row = row._replace(base_rank=_base_rank(row, layer))
    # 4-bit integers alone are quantized without a sign; 4-bit floats have one.
    scales = getattr(layer, "wscales", None)
    is_int4 = isinstance(scales, torch.Tensor) and scales.itemsize > 1
    is_unsigned = is_fused and is_int4 and row.path.endswith(_UNSIGNED)
    layer.__dict__["act_unsigned"] = is_unsigned
    return Target(
        module=layer,
        kind=SlotKind(row.kind),
        dtype=torch.float32,
        device=torch.device("cpu"),
        row=row,
        row_order=row_order,
        place=place,
        owner=layer,
    )


def _base_rank(row: SlotRow, layer: nn.Module) -> int:
    """The rank of the branch, whose halves must fit the layer before anybody unpacks them."""
    halves = (getattr(layer, "proj_down", None), getattr(layer, "proj_up", None))
    sides = (row.in_features, row.out_features)
    ranks = set()
    for half, side in zip(halves, sides, strict=True):
        if not isinstance(half, torch.Tensor):
            raise UnknownWeightError(f"`{row.path}` of the base has a half of its branch alone")
        is_matrix = half.ndim == 2 and half.shape[0] == side and half.dtype in PACKED_DTYPES
        if not is_matrix or half.shape[1] % TILE or not half.shape[1]:
            raise UnknownWeightError(
                f"`{row.path}` of the base has a branch of {tuple(half.shape)} {half.dtype}, which"
                f" does not fit its {side} channels"
            )
        ranks.add(int(half.shape[1]))
    if len(ranks) != 1:
        raise UnknownWeightError(f"`{row.path}` of the base has a branch of two ranks: {ranks}")
    return ranks.pop()
