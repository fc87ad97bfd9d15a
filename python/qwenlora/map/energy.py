"""The squared Frobenius norm of a module's delta, from its factors.

    |U D|^2 = tr(U^T U D D^T)        a pair, and a sum of pairs as one pair: cross terms are in it
    |w1 (x) w2|^2 = |w1|^2 |w2|^2    a Kronecker product, and likewise each of its rows

A Kronecker product beside pairs has a cross term, which U and D give, too. Other sums are formed
some rows at a time, as is a LoHa where that is the smaller product. No matrix is formed whole. NaN
and infinity in a tensor make the result NaN or infinite.
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
            return _of_pairs(members)
        total = _with_kron(members, sides)
        return _of_rows(members, sides) if total is None else total
    member = members[0]
    if _is_small_pair(member, sides):
        energy = _of_own_pair(member)
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


def _of_pairs(members: Sequence[Member]) -> float:
    down, up = stacked(members)
    total = _of_pair(down, up)
    if down.shape[0] == sum(member.factors().rank for member in members):
        return total
    # Members of one `down` were summed before: what cancelled there is to be seen by themselves.
    alone = sum(_of_own_pair(member) * member.factor**2 for member in members)
    return 0.0 if total <= _ROUNDED * alone else total


def _of_own_pair(member: Member) -> float:
    pair = member.factors()
    return _of_pair(pair.down, pair.up)


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


def _with_kron(members: Sequence[Member], sides: tuple[int, int]) -> float | None:
    """The squared norm of pairs and one Kronecker product; None where it is to be found by rows.

    |K + U D|^2 = |K|^2 + |U D|^2 + 2 <U^T K, D>
    """
    krons = [member for member in members if member.piece.adapter == "lokr"]
    pairs = [member for member in members if member.piece.adapter != "lokr"]
    if len(krons) != 1 or not all(_is_small_pair(member, sides) for member in pairs):
        return None
    kron = krons[0]
    down, up = (half.to(torch.float32) for half in stacked(pairs))
    w1, w2 = (factor.to(torch.float32) for factor in kron_factors(kron.tensors))
    rows = up.new_zeros(kron.piece.row_count, up.shape[1])
    rows[_rows(kron)] = up
    # (R, ol, ok) of U^T, times w2 (ok, il) and w1 (ol, im): (R, im, il)
    turned = rows.mT.reshape(-1, w1.shape[0], w2.shape[0]) @ w2
    product = torch.einsum("rol,oi->ril", turned, w1).flatten(1)
    common = kron.factor * float((product.double() * down.double()).sum())
    alone = _of_kron(kron) * kron.factor**2 + _of_pair(down, up)
    total = alone + 2 * common
    # False for NaN, too.
    return total if total > _CANCELLED * alone else None


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
