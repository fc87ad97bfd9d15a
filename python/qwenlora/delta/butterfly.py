"""The permutation of a butterfly's stages, for those who make its stages and those who run them.

A butterfly of m stages has n blocks of b rows, b even, in each. Stage i mixes rows that lie
2^i b / 2 apart: it permutes the rows, multiplies blocks of b neighbours, and puts them back. As
axes, rows (c, g, k) become (c, k, g) with g of 2 and k of 2^i b / 2. That is what LyCORIS does
(`functional/boft.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["butterfly_order", "butterfly_stage", "has_butterfly"]


def has_butterfly(count: int, size: int, stages: int) -> bool:
    """Tell if rows of `count` blocks of `size` can go through so many stages."""
    return stages > 0 and count > 0 and size % 2 == 0 and count % 2 ** (stages - 1) == 0


def butterfly_order(
    count: int, size: int, stage: int, *, device: torch.device | None = None
) -> Tensor:
    """The rows in the order in which a stage multiplies them.

    Args:
        count: Blocks.
        size: Rows of a block.
        stage: From 0.
        device: Where the result lies.

    Returns:
        (count size,) int64: which row stands at each place. Place c 2k + l 2 + g has row
        c 2k + g k + l, where k = 2^stage size / 2, g is 0 or 1 and l is below k.

    Raises:
        ValueError: The rows cannot go through this stage.
    """
    _check(count, size, stage)
    rows = torch.arange(count * size, device=device)
    # (c, g, k) -> (c, k, g)
    return rows.view(-1, 2, _stride(size, stage)).transpose(1, 2).flatten()


def butterfly_stage(values: Tensor, blocks: Tensor, stage: int) -> Tensor:
    """What a stage adds to values, rows last.

    Args:
        values: (..., n b).
        blocks: (n, b, b) of the stage; each multiplies its permuted rows from the left.
        stage: From 0.

    Returns:
        (..., n b), in the order of `values`.

    Raises:
        ValueError: The rows cannot go through this stage.
    """
    count, size, _ = blocks.shape
    _check(count, size, stage)
    stride = _stride(size, stage)
    pairs, rows = count * size // (2 * stride), math.prod(values.shape[:-1])
    # (M, c, g, k) -> (M, c, k, g) -> (M, n, b) -> (n, b, M), where M may be 0
    split = values.reshape(rows, pairs, 2, stride).transpose(2, 3)
    permuted = split.reshape(rows, count, size).permute(1, 2, 0)
    # (n, b, M) -> (M, n, b) -> (M, c, k, g) -> (M, c, g, k)
    mixed = torch.bmm(blocks, permuted).permute(2, 0, 1)
    return mixed.reshape(rows, pairs, stride, 2).transpose(2, 3).reshape(values.shape)


def _stride(size: int, stage: int) -> int:
    return int(2**stage) * size // 2


def _check(count: int, size: int, stage: int) -> None:
    if not has_butterfly(count, size, stage + 1):
        raise ValueError(f"{count} blocks of {size} rows have no butterfly of stage {stage}")
