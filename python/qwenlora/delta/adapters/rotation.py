"""OFT and BOFT: stored skew-symmetric blocks, and the rotations that they stand for.

A block Q is skew-symmetric, and its Cayley transform a rotation. Tools differ in how they store Q,
in the transform, and in the side of the weight:

- LyCORIS stores whole blocks B with Q = B - B^T. The norm of all blocks together is at most alpha
  times the rows, where alpha is not 0. Of three axes (diag-oft), rows are multiplied by R^T; of
  four (BOFT), by the stages of a butterfly. Either way rows are then rescaled
  (`functional/diag_oft.py`, `functional/boft.py`).
- PEFT's OFT and OneTrainer's OFT_2 store the upper triangle of Q, and turn the input: x becomes
  x R (`tuners/oft/layer.py`; OneTrainer `modules/module/oft_utils.py`).
- PEFT's BOFT stores whole blocks B with Q = (B - B^T) / 2, turns the input likewise, and scales
  rows (`tuners/boft/layer.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.butterfly import butterfly_order, has_butterfly
from qwenlora.delta.finite import damaged, is_finite
from qwenlora.delta.rotation import RotationDelta
from qwenlora.errors import ShapeMismatchError, UnsupportedAdapterError
from qwenlora.plan.documents import Cayley, Side

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.plan.documents import RotationRule

__all__ = ["boft_of_inputs", "oft_of_inputs", "rotation_of_rows", "turn"]


def turn(skew: Tensor, cayley: Cayley) -> Tensor:
    """R - I of skew-symmetric blocks.

    Args:
        skew: Q (..., b, b) float64.
        cayley: Which transform R of Q is.

    Returns:
        (..., b, b) float64: 2 Q (I - Q)^-1 where it is exact, 2Q + 2Q^2 + 2Q^3 + Q^4 of the series,
        and -2 Q (I + Q)^-1 where PEFT solves.
    """
    if cayley is Cayley.NEUMANN:
        square = skew @ skew
        return 2 * (skew + square + skew @ square) + square @ square
    signed = skew if cayley is Cayley.EXACT else -skew
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    # X (I - Q) = 2 Q; I - Q has no eigenvalue of zero, those of Q being imaginary.
    turned: Tensor = torch.linalg.solve(eye - signed, 2 * signed, left=False)
    return turned


def rotation_of_rows(
    tensors: Mapping[str, Tensor],
    rule: RotationRule,
    *,
    module: str,
    row_begin: int,
    row_count: int,
) -> RotationDelta:
    """LyCORIS' diag-oft and BOFT.

    Args:
        tensors: `oft_blocks` (n, b, b), or (m, n, b, b) of a butterfly; `oft_rescale`, one factor
            for each row, where it has them.
        rule: From blocks to rotations.
        module: Its name, for errors.
        row_begin: First logical row that it changes.
        row_count: How many: n b.

    Raises:
        NonFiniteError: A value is NaN or infinite.
        ShapeMismatchError: The blocks do not make up the rows, or no butterfly.
    """
    blocks = _finite(tensors, module)["oft_blocks"].double()
    _check_rows(blocks, module, row_count)
    turns = turn(_constrained(blocks - blocks.mT, rule.constraint * row_count), rule.cayley)
    if blocks.ndim == 3:
        # W'_k = R_k^T W_k
        stages = turns.mT.unsqueeze(0)
    elif len(blocks) == 1:
        stages = _unpermuted(turns)
    else:
        stages = turns
    rescale = tensors.get("oft_rescale")
    return RotationDelta(
        side=Side.OUT,
        row_begin=row_begin,
        row_count=row_count,
        stages=stages.to(torch.float32).contiguous(),
        rescale=None if rescale is None else _less_one(rescale),
    )


def oft_of_inputs(
    tensors: Mapping[str, Tensor],
    rule: RotationRule,
    *,
    module: str,
    columns: int,
    row_begin: int,
    row_count: int,
) -> RotationDelta:
    """PEFT's OFT, and OneTrainer's OFT_2.

    Args:
        tensors: `oft_r` (K / b, b (b - 1) / 2), upper triangles by rows; one row where it is
            shared.
        rule: From blocks to rotations.
        module: Its name, for errors.
        columns: K.
        row_begin: First logical row that it changes.
        row_count: How many.

    Raises:
        NonFiniteError: A value is NaN or infinite.
        ShapeMismatchError: The blocks do not make up the columns.
    """
    stored = _finite(tensors, module)["oft_r"].double()
    count, elements = stored.shape
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    if size * (size - 1) // 2 != elements or not _fills(count, size, columns, shared=rule.shared):
        raise ShapeMismatchError(
            f"`{module}`: blocks of {elements} values, {count} of them, do not turn"
            f" {columns} inputs"
        )
    skew = _skew(stored, size)
    if rule.scaled:
        skew = skew / (2 * math.sqrt(size - 1))
    turns = turn(skew, rule.cayley).expand(columns // size, size, size)
    return RotationDelta(
        side=Side.IN,
        row_begin=row_begin,
        row_count=row_count,
        stages=turns.to(torch.float32).unsqueeze(0).contiguous(),
    )


def boft_of_inputs(
    tensors: Mapping[str, Tensor],
    *,
    module: str,
    columns: int,
    row_begin: int,
    row_count: int,
) -> RotationDelta:
    """PEFT's BOFT of one butterfly factor: blocks in place, and factors on rows.

    Its transform is (I - Q)(I + Q)^-1.

    Args:
        tensors: `boft_r` (1, n, b, b), and `boft_s`, one factor for each row.
        module: Its name, for errors.
        columns: K.
        row_begin: First logical row that it changes.
        row_count: How many.

    Raises:
        NonFiniteError: A value is NaN or infinite.
        UnsupportedAdapterError: It has more butterfly factors.
        ShapeMismatchError: The blocks do not make up the columns.
    """
    blocks = _finite(tensors, module)["boft_r"].double()
    if len(blocks) != 1:
        raise UnsupportedAdapterError(
            f"`{module}`: a BOFT by PEFT of {len(blocks)} butterfly factors; one is supported"
        )
    count, size = blocks.shape[1:3]
    if count * size != columns:
        raise ShapeMismatchError(
            f"`{module}`: {count} blocks of {size} do not turn {columns} inputs"
        )
    turns = turn((blocks - blocks.mT) / 2, Cayley.SOLVE)
    return RotationDelta(
        side=Side.IN,
        row_begin=row_begin,
        row_count=row_count,
        stages=turns.to(torch.float32),
        scale=_less_one(tensors["boft_s"]),
    )


def _finite(tensors: Mapping[str, Tensor], module: str) -> Mapping[str, Tensor]:
    if not all(map(is_finite, tensors.values())):
        raise damaged(module, "its rotation")
    return tensors


def _check_rows(blocks: Tensor, module: str, rows: int) -> None:
    count, size = blocks.shape[-3:-1]
    fits = count * size == rows and blocks.shape[-1] == size
    if fits and blocks.ndim == 4:
        fits = has_butterfly(count, size, len(blocks))
    if not fits:
        raise ShapeMismatchError(
            f"`{module}`: blocks of shape {tuple(blocks.shape)} do not turn {rows} rows"
        )


def _fills(count: int, size: int, columns: int, *, shared: bool) -> bool:
    """Tell if blocks make up the columns: one of them many times where it is shared."""
    return (count == 1 and columns % size == 0) if shared else count * size == columns


def _constrained(skew: Tensor, most: float) -> Tensor:
    """Blocks whose norm, of all together, is at most this; any where it is not above zero.

    LyCORIS adds 1e-8 to the norm.
    """
    norm = float(skew.norm()) + 1e-8
    return skew * (most / norm) if 0 < most < norm else skew


def _skew(triangles: Tensor, size: int) -> Tensor:
    """Q (n, b, b) of upper triangles (n, b (b - 1) / 2), which are stored by rows."""
    rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
    upper = triangles.new_zeros(len(triangles), size, size)
    upper[:, rows, columns] = triangles
    return upper - upper.mT


def _unpermuted(turns: Tensor) -> Tensor:
    """The one stage of a butterfly as blocks in place: it permutes rows within blocks alone."""
    size = turns.shape[-1]
    order = butterfly_order(1, size, 0, device=turns.device)
    blocks = torch.empty_like(turns)
    blocks[..., order.unsqueeze(1), order] = turns
    return blocks


def _less_one(factors: Tensor) -> Tensor:
    return (factors.flatten().double() - 1).to(torch.float32)
