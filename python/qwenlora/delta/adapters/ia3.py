"""IA3: rows or columns of a weight times what was learned of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.diagonal import DiagonalDelta
from qwenlora.delta.finite import damaged, is_finite
from qwenlora.plan.documents import Side

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["ia3"]


def ia3(
    tensors: Mapping[str, Tensor],
    *,
    module: str,
    side: Side,
    row_begin: int,
    row_count: int,
) -> DiagonalDelta:
    """The diagonal of an IA3.

    LyCORIS stores l, and its merge multiplies rows or columns by 1 + l and leaves the bias
    (`modules/ia3.py`). PEFT stores the factor itself; on rows it multiplies what the layer puts
    out, bias included (`tuners/ia3/layer.py`).

    Args:
        tensors: `ia3` by LyCORIS, or `ia3_l` by PEFT: as many values as there are rows or columns,
            in any shape.
        module: Its name, for errors.
        side: Which of the two it multiplies.
        row_begin: First logical row that it changes.
        row_count: How many.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    by_peft = "ia3_l" in tensors
    stored = tensors["ia3_l" if by_peft else "ia3"]
    if not is_finite(stored):
        raise damaged(module, "its ia3")
    values = stored.flatten().double() - (1.0 if by_peft else 0.0)
    return DiagonalDelta(
        side=side,
        row_begin=row_begin,
        row_count=row_count,
        values=values.to(torch.float32),
        scales_bias=by_peft and side is Side.OUT,
    )
