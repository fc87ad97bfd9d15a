"""One LoRA's delta in one slot, cut to a rank budget before it joins the slot's sum.

A delta that is no low-rank pair yet is cut here, once for each file and whatever the strength:

- `of_matrix` takes a full delta on a quantized layer. A small one is decomposed exactly; a large
  one of few ranks is projected on what a range finder finds.
- `by_gram` takes a LoHa whose exact pair is wider than its matrix. Most of the ranks are kept, at
  which a range finder would gain nothing.
- `of_kron` takes a LoKr where no product can run beside the layer. Its best pair follows from two
  small decompositions.

The sum of a slot's LoRAs is a low-rank pair already. Where that has more ranks than the slot may
hold it is cut by `qwenlora.delta.compress`: exactly by `decomposed`, or by `iterated` where it is
large. These two never form the matrix, which the first two here begin with.

A Kronecker product's singular values are all products of its factors' ones, and its vectors the
Kronecker products of their vectors (Van Loan, 2000), so the product itself is never formed. The
best form of a matrix D follows from the eigenvectors of its smaller Gram matrix: D V V^T for the
leading ones V is nearest to D of its rank (Eckart and Young, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora import sizes
from qwenlora.delta.decomposition import eigenvectors, orthonormal, singular, triangular
from qwenlora.delta.factors import Factors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["Svd", "by_gram", "of_kron", "of_matrix", "whole"]


NEGLIGIBLE = 1e-12
"""Singular values below this share of the largest are rounding noise of float64."""
ROUNDING = 4e-6
"""Of a matrix's norm, what its float32 pair may lack by rounding alone."""
OVERSAMPLING = 32
"""Directions that the range finder takes beyond the rank asked for."""
POWER_ITERATIONS = 3
"""Times that it goes through the matrix and back: trained deltas have slowly falling spectra."""


def of_matrix(delta: Tensor, budget: int | None) -> Factors:
    """The best pair of at most `budget` ranks of a dense delta (rows, in), float32.

    A large one is projected on the range that a few power iterations find (Halko, Martinsson and
    Tropp, 2011); what the projection lacks counts as lost.
    """
    full = min(delta.shape)
    rank = full if budget is None else min(budget, full)
    if full <= sizes.current().exact_svd_side or rank + OVERSAMPLING >= full:
        left, values, right = singular(delta)
    else:
        basis = _range(delta, rank + OVERSAMPLING)
        inner, values, right = singular(basis.mT @ delta)
        left = basis @ inner
    if float(values[0]) > 0:
        rank = min(rank, int((values > values[0] * torch.finfo(values.dtype).eps).sum()))
    root = values[:rank].sqrt()
    return _measured(delta, down=root.unsqueeze(1) * right[:rank], up=left[:, :rank] * root)


def by_gram(delta: Tensor, rank: int) -> Factors:
    """The best pair of `rank` ranks of a matrix (rows, in), float32, by its smaller Gram matrix.

    Directions are resolved to the root of float32's precision of the largest singular value. The
    loss stated is measured, so it holds where a cut leaves no more than that.
    """
    turned = delta.shape[0] < delta.shape[1]
    tall = delta.mT if turned else delta
    right = eigenvectors(tall.mT @ tall)[:, -rank:].flip(1)
    left = tall @ right
    values = torch.linalg.vector_norm(left, dim=0)
    root = values.sqrt().clamp_min(torch.finfo(values.dtype).tiny)
    up, down = left / root, (right * root).mT
    return _measured(delta, down=up.mT if turned else down, up=down.mT if turned else up)


def whole(delta: Tensor) -> Factors:
    """A matrix (rows, in) times the identity: exact."""
    rows, columns = delta.shape
    identity = torch.eye(min(rows, columns))
    if rows >= columns:
        return Factors(down=identity, up=delta.cpu())
    return Factors(down=delta.cpu(), up=identity)


@dataclass(frozen=True)
class Svd:
    """A matrix by its singular values, in float64.

    Attributes:
        left: (rows, r).
        values: (r,).
        right: (r, columns).
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Svd:
        """Decompose a matrix."""
        return cls(*singular(matrix.double()))

    @classmethod
    def of_halves(cls, left: Tensor, right: Tensor) -> Svd:
        """Decompose a product (rows, k) @ (k, columns) by its halves."""
        q_left, r_left = triangular(left.double())
        q_right, r_right = triangular(right.double().mT)
        inner, values, outer = singular(r_left @ r_right.mT)
        return cls(q_left @ inner, values, outer @ q_right.mT)


def of_kron(one: Svd, two: Svd, budget: int | None) -> Factors:
    """The best pair of a Kronecker product, of at most `budget` ranks; exact where it has no more.

    Args:
        one: Its first factor.
        two: Its second factor.
        budget: Most ranks; None for all that are more than rounding.
    """
    values = torch.outer(one.values, two.values).flatten()
    energy = values.square().sum()
    order = torch.argsort(values, descending=True, stable=True)
    kept = int((values > NEGLIGIBLE * values.max()).sum())
    cut = budget is not None and kept > budget
    order = order[: max(1, min(kept, budget) if budget is not None else kept)]
    first, second = order // two.values.numel(), order % two.values.numel()
    root = values[order].sqrt()
    # column-wise kron: (ol, 1, k) * (1, ok, k) -> (ol ok, k)
    up = (one.left[:, first].unsqueeze(1) * two.left[:, second].unsqueeze(0)).flatten(0, 1) * root
    # row-wise kron: (k, im, 1) * (k, 1, il) -> (k, im il)
    down = (one.right[first].unsqueeze(2) * two.right[second].unsqueeze(1)).flatten(1)
    down = down * root.unsqueeze(1)
    if not cut:
        return Factors(down=down.float(), up=up.float())
    lost = float(energy - values[order].square().sum())
    return Factors(down.float(), up.float(), energy_lost=max(0.0, lost), energy=float(energy))


def _measured(delta: Tensor, *, down: Tensor, up: Tensor) -> Factors:
    """A cut pair of a matrix, with what it lacks: the norm of the rest, formed by rows.

    A difference of the two norms would end at float32's precision of their squares, at which a
    pair may lack 3e-4 of the matrix.
    """
    energy = _squared_norm(delta)
    lost = sum(
        _squared_norm(torch.addmm(delta[rows], up[rows], down, alpha=-1)) for rows in _panels(delta)
    )
    if lost <= ROUNDING**2 * energy:
        lost = 0.0
    return Factors(down=down.cpu(), up=up.cpu(), energy_lost=lost, energy=energy)


def _panels(matrix: Tensor) -> Iterator[slice]:
    count, columns = matrix.shape
    step = max(1, sizes.current().panel_bytes // (4 * columns))
    return (slice(first, first + step) for first in range(0, count, step))


def _squared_norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _range(delta: Tensor, size: int) -> Tensor:
    """An orthonormal basis (rows, size) of the directions in which a matrix is large."""
    generator = torch.Generator().manual_seed(0)
    shape = (delta.shape[1], size)
    probe = torch.randn(shape, generator=generator, dtype=torch.float32).to(delta.device)
    basis = orthonormal(delta @ probe)
    for _ in range(POWER_ITERATIONS):
        basis = orthonormal(delta @ orthonormal(delta.mT @ basis))
    return basis
