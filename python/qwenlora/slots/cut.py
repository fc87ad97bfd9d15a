"""Rows of a quantized layer that run by themselves.

Nunchaku's packed tensors lie in tiles of 128 rows, one behind the other. So a range of whole tiles
is a smaller layer over the same memory, and gives the bits that the whole layer gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwenlora.model.subclass import plain_class
from qwenlora.packing.layout import RowOrder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qwenlora.slots.branch_layout import BranchLayout, Rows

__all__ = ["can_cut", "rows_output"]


_TILE = 128
"""Rows of one tile of a packed weight."""
_BY_ROWS = ("qweight", "bias", "proj_up", "wcscales")
"""Parameters whose first axis is rows."""
_SCALES = "wscales"
"""The parameter whose tiles of rows lie one behind the other, while its shape has them last."""
_WITHOUT_ROWS = ("smooth_factor", "smooth_factor_orig", "proj_down")
"""Parameters that have no rows."""
_KNOWN = frozenset((*_BY_ROWS, _SCALES, *_WITHOUT_ROWS))


def can_cut(layer: nn.Module, layout: BranchLayout) -> bool:
    """Tell if a layer has inputs that differ by rows, and each range of rows can run by itself."""
    if len(layout.runs) < 2 or layout.row_order is not RowOrder.PLANAR:
        return False
    kind = plain_class(type(layer))
    weight = layer._parameters.get("qweight")
    held = {name for name, parameter in layer._parameters.items() if parameter is not None}
    return (
        weight is not None
        and held <= _KNOWN
        and weight.dtype is torch.int8
        and hasattr(kind, "quantize")
        and hasattr(kind, "forward_quant")
        and all(end % _TILE == 0 for run in layout.runs for _, end in run.rows)
    )


def rows_output(layer: Any, x: Tensor, ranges: Rows) -> list[Tensor]:
    """What some rows of a layer put out: (..., K) to (..., rows) for each range.

    The input is quantized once for all of them.
    """
    tokens = x.reshape(-1, x.shape[-1])
    quantized = layer.quantize(tokens)
    found = []
    for begin, end in ranges:
        output = torch.empty((len(tokens), end - begin), dtype=x.dtype, device=x.device)
        _rows_of(layer, begin, end).forward_quant(*quantized, output)
        found.append(output.view(*x.shape[:-1], end - begin))
    return found


def _rows_of(layer: nn.Module, begin: int, end: int) -> Any:
    """The layer of these rows, over the same memory."""
    view: nn.Module = object.__new__(plain_class(type(layer)))
    view.__dict__.update(layer.__dict__)
    parameters: dict[str, Tensor | None] = {**layer._parameters}
    for name in _BY_ROWS:
        whole = parameters.get(name)
        if whole is not None:
            parameters[name] = whole[begin:end]
    scales = layer._parameters[_SCALES]
    if scales is not None:
        tiles = scales.reshape(scales.shape[1] // _TILE, -1)[begin // _TILE : end // _TILE]
        parameters[_SCALES] = tiles.reshape(scales.shape[0], end - begin)
    view.__dict__ |= {"_parameters": parameters, "out_features": end - begin}
    return view
