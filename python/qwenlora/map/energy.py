"""The squared Frobenius norm of a module's delta, from its factors.

    |U D|^2 = tr(U^T U D D^T)        a pair, and a sum of pairs as one pair: cross terms are in it
    |w1 (x) w2|^2 = |w1|^2 |w2|^2    a Kronecker product, and likewise each of its rows

Other sums are formed some rows at a time, as is a LoHa where that is the smaller product. No matrix
is formed whole. NaN and infinity in a tensor make the result NaN or infinite.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from qwenlora import sizes
from qwenlora.delta.adapters.lokr import kron_factors
from qwenlora.delta.adapters.table import adapter_named
from qwenlora.merge.combine import stacked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.merge.member import Member

__all__ = ["energy_of"]

_CANCELLED = 1e-2
"""A sum below this share of its ranks' own energies loses digits in float32: float64 follows."""
_ROUNDED = 1e-13
"""A sum below this share is what rounding leaves of zero."""
_ROUNDED_ROWS = 1e-11
"""The same of rows that are formed in float32."""


def energy_of(members: Sequence[Member], sides: tuple[int, int]) -> float:
    """The squared norm of the sum of a module's deltas, strengths and scales included.

    Args:
        members: At least one; none that needs the base weight.
        sides: (out, in) of the module.

    Returns:
        NaN or infinity where a tensor, or the sum, is not finite.
    """
    if len(members) > 1:
        if all(_is_small_pair(member, sides) for member in members):
            return _of_pair(*stacked(members))
        return _of_rows(members, sides)
    member = members[0]
    if _is_small_pair(member, sides):
        pair = member.factors()
        energy = _of_pair(pair.down, pair.up)
    elif member.piece.adapter == "lokr":
        energy = _of_kron(member)
    elif member.piece.adapter == "full":
        energy = _square(member.tensors["diff"][_rows(member)])
    else:
        return _of_rows(members, sides)
    return energy * member.factor**2


def _is_small_pair(member: Member, sides: tuple[int, int]) -> bool:
    """Tell if a delta is a pair whose Gram matrices cost less than the matrix itself."""
    if member.is_stored:
        return True
    if member.piece.adapter != "loha":
        return False
    first, second = (member.tensors[f"hada_{name}_b"].shape[0] for name in ("w1", "w2"))
    out, columns = sides
    return (out + columns) * (first * second) ** 2 < out * columns * (first + second)


def _of_pair(down: Tensor, up: Tensor) -> float:
    """The squared norm of up (out, r) times down (r, in)."""
    for dtype in (torch.float32, torch.float64):
        left, right = up.to(dtype), down.to(dtype)
        # (r, r)
        products = (left.mT @ left).double() * (right @ right.mT).double()
        total, alone = float(products.sum()), float(products.diagonal().sum())
        # False for NaN, too.
        if total > _CANCELLED * alone and math.isfinite(total):
            return total
    return 0.0 if total <= _ROUNDED * alone else total


def _of_kron(member: Member) -> float:
    first, second = (_row_squares(factor) for factor in kron_factors(member.tensors))
    if member.row_count == member.piece.row_count:
        return float(first.sum() * second.sum())
    # Row i of w1 and row k of w2 make row i * rows of w2 + k.
    return float(torch.outer(first, second).flatten()[_rows(member)].sum())


def _of_rows(members: Sequence[Member], sides: tuple[int, int]) -> float:
    out, columns = sides
    step = max(1, sizes.current().panel_bytes // (4 * columns))
    total = alone = 0.0
    for first in range(0, out, step):
        rows = torch.arange(first, min(first + step, out))
        panel = torch.zeros(len(rows), columns)
        for member in members:
            adapter = adapter_named(member.piece.adapter)
            own = adapter.rows(member.tensors, rows + member.row_begin) * member.factor
            alone += _square(own)
            panel += own
        total += _square(panel)
    return 0.0 if total <= _ROUNDED_ROWS * alone else total


def _rows(member: Member) -> slice:
    return slice(member.row_begin, member.row_begin + member.row_count)


def _row_squares(matrix: Tensor) -> Tensor:
    return matrix.double().square().sum(dim=1)


def _square(matrix: Tensor) -> float:
    wide = matrix if matrix.itemsize > 1 else matrix.to(torch.float32)
    return float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2
