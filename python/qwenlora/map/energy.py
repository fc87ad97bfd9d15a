"""The squared Frobenius norm of a module's delta, from its factors.

    |U D|^2 = tr(U^T U D D^T)        a pair, and a sum of pairs as one pair: cross terms are in it
    |w1 (x) w2|^2 = |w1|^2 |w2|^2    a Kronecker product, and likewise each of its rows

Other sums are formed some rows at a time, as is a LoHa where that is the smaller product. No matrix
is formed whole. NaN and infinity in a tensor make the result NaN or infinite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora import sizes
from qwenlora.delta.adapters.lokr import kron_factors
from qwenlora.delta.adapters.table import adapter_named
from qwenlora.merge.combine import stacked

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

    from qwenlora.merge.member import Member

__all__ = ["energies_of"]

Module = tuple["Sequence[Member]", tuple[int, int]]
"""The deltas of a module, at least one, none of which needs the base weight; and its (out, in)."""

_CANCELLED = 1e-2
"""A sum below this share of its ranks' own energies loses digits in float32: float64 follows."""
_ROUNDED = 1e-13
"""A sum below this share is what rounding leaves of zero."""
_ROUNDED_ROWS = 1e-11
"""The same of rows that are formed in float32."""


def energies_of(modules: Sequence[Module]) -> list[float]:
    """The squared norms of the sums of modules' deltas, strengths and scales included.

    Pairs of one shape are measured together: one product over many of them takes less than many
    products, and far less where the cores are busy with something else.

    Returns:
        NaN or infinity where a tensor, or a sum, is not finite.
    """
    alike: dict[Hashable, list[int]] = {}
    energies = [0.0] * len(modules)
    for at, (members, sides) in enumerate(modules):
        if all(member.is_stored for member in members):
            alike.setdefault(tuple(map(_form, members)), []).append(at)
        else:
            energies[at] = _energy_of(members, sides)
    for places in alike.values():
        for at, energy in zip(places, _of_alike([modules[at][0] for at in places]), strict=True):
            energies[at] = energy
    return energies


def _form(member: Member) -> Hashable:
    pair = member.factors()
    return pair.down.shape, pair.down.dtype, pair.up.shape, pair.up.dtype


def _of_alike(modules: Sequence[Sequence[Member]]) -> list[float]:
    """The squared norms of modules whose stored pairs have the same shapes."""
    downs, ups, factors = [], [], []
    for members in zip(*modules, strict=True):
        pairs = [member.factors() for member in members]
        downs.append(torch.stack([pair.down for pair in pairs]).to(torch.float32))
        ups.append(torch.stack([pair.up for pair in pairs]).to(torch.float32))
        own = torch.tensor([member.factor for member in members], dtype=torch.float64)
        factors.append(own.unsqueeze(1).expand(-1, ups[-1].shape[2]))
    # (n, R, in), (n, out, R) and (n, R)
    down, up, factor = _joined(downs, dim=1), _joined(ups, dim=2), torch.cat(factors, dim=1)
    # (n, R, R)
    products = (up.mT @ up).double() * (down @ down.mT).double()
    products *= factor.unsqueeze(1) * factor.unsqueeze(2)
    totals = products.sum(dim=(1, 2)).tolist()
    alone = products.diagonal(dim1=1, dim2=2).sum(dim=1).tolist()
    return [
        # False for NaN, too.
        total if total > _CANCELLED * most else _of_pair(*stacked(members))
        for total, most, members in zip(totals, alone, modules, strict=True)
    ]


def _joined(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


def _energy_of(members: Sequence[Member], sides: tuple[int, int]) -> float:
    if all(_is_small_pair(member, sides) for member in members):
        return _of_pair(*stacked(members))
    if len(members) == 1:
        member = members[0]
        if member.piece.adapter == "lokr":
            return _of_kron(member) * member.factor**2
        if member.piece.adapter == "full":
            return _square(member.tensors["diff"][_rows(member)]) * member.factor**2
    return _of_rows(members, sides)


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
    """The squared norm of up (out, r) times down (r, in), in float64."""
    left, right = up.double(), down.double()
    # (r, r)
    products = (left.mT @ left) * (right @ right.mT)
    total, alone = float(products.sum()), float(products.diagonal().sum())
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
