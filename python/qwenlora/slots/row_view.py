"""A quantized layer of some of another's rows, over the same memory.

Packed tensors lie in tiles of 128 rows, one behind the other. So the rows of whole tiles are a
tensor of their own, and the kernels compute of them what they compute of the whole, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.model.code import names_of_class
from qwenlora.model.subclass import plain_class

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["row_view"]


_TILE = 128
"""Rows of a tile."""
_BY_ROWS = ("qweight", "bias", "proj_up", "wcscales")
"""Tensors whose first axis is the rows."""
_BY_GROUPS = "wscales"
"""The tensor whose nominal axes are groups and rows; in memory tiles of rows come first."""
_WHOLE = ("smooth_factor", "smooth_factor_orig", "proj_down")
"""Tensors that have no rows."""
_SIZE = "out_features"
"""Attribute by which a layer's forward sizes its output."""


def row_view(layer: nn.Module, begin: int, end: int) -> nn.Module | None:
    """A layer of these rows; None where it cannot be had without copying, or is not understood.

    Args:
        layer: A layer with packed 4-bit weights.
        begin: The first row.
        end: The row behind the last.
    """
    kind = plain_class(type(layer))
    if begin % _TILE or end % _TILE or not _is_known(layer, kind):
        return None
    parameters: dict[str, Tensor | None] = dict(layer._parameters)
    for name in _BY_ROWS:
        own = parameters.get(name)
        if own is not None:
            parameters[name] = own[begin:end]
    scales = parameters[_BY_GROUPS]
    if scales is None:
        return None
    tiles = scales.view(scales.shape[1] // _TILE, scales.shape[0], _TILE)
    rows = tiles[begin // _TILE : end // _TILE]
    parameters[_BY_GROUPS] = rows.view(scales.shape[0], end - begin)
    view: nn.Module = object.__new__(kind)
    view.__dict__.update(layer.__dict__)
    view.__dict__["_parameters"] = parameters
    view.__dict__[_SIZE] = end - begin
    return view


def _is_known(layer: nn.Module, kind: type) -> bool:
    """Tell if the layer's tensors are those of the packed kind, and its forward sizes by them."""
    held = {name for name, own in layer._parameters.items() if own is not None}
    weight = layer._parameters.get("qweight")
    names = names_of_class(kind)
    return (
        weight is not None
        and weight.dtype is torch.int8
        and held <= {*_BY_ROWS, _BY_GROUPS, *_WHOLE}
        and _SIZE in layer.__dict__
        and names is not None
        and _SIZE in names.own
    )
