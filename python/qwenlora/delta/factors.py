"""From an adapter's stored tensors to one low-rank pair: exact where it can be, else optimal.

Formulas: LoRA and LoHa as in their trainers; a Kronecker product's singular values are all products
of its factors' ones, and its vectors the Kronecker products of their vectors (Van Loan, 2000), so
its best low-rank form needs two small decompositions and never the product itself. That of a matrix
follows from the eigenvectors of its smaller Gram matrix: D V V^T for the leading ones V is nearest
to D of its rank (Eckart and Young, 1936), and what it lacks is known from the norm of D V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.decomposition import eigenvectors, orthonormal, singular, triangular
from qwenlora.packing.factor import unpack_factor
from qwenlora.packing.layout import LowRankSide
from qwenlora.plan.documents import PieceKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from qwenlora.plan.documents import Piece

__all__ = ["Factors", "delta_rows", "dense_of", "factors_of", "kron_factors"]


NEGLIGIBLE = 1e-12
"""Singular values below this share of the largest are rounding noise of float64."""
ROUNDING = 4e-6
"""Of a matrix's norm, what its float32 pair may lack by rounding alone."""
PANEL_BYTES = 32 << 20
"""Bytes of a residual's rows that are formed at a time."""
EXACT_SVD_SIDE = 1024
"""A dense delta with a side up to this is decomposed fully, a larger one by a range finder."""
OVERSAMPLING = 32
"""Directions that the range finder takes beyond the rank asked for."""
POWER_ITERATIONS = 3
"""Times that it goes through the matrix and back: trained deltas have slowly falling spectra."""


@dataclass(frozen=True)
class Factors:
    """A delta as `up @ down`, without its scale.

    Attributes:
        down: (r, in).
        up: (rows, r).
        energy_lost: Squared Frobenius norm of what was cut off, without the scale; 0 where rounding
            explains it.
        energy: Squared Frobenius norm of the whole; None where nothing was cut off.
    """

    down: Tensor
    up: Tensor
    energy_lost: float = 0.0
    energy: float | None = None

    @property
    def rank(self) -> int:
        """Ranks of the pair."""
        return int(self.down.shape[0])

    @property
    def share_lost(self) -> float:
        """Share of the energy that was cut off."""
        return self.energy_lost / self.energy if self.energy else 0.0


def factors_of(piece: Piece, tensors: Mapping[str, Tensor], device: torch.device) -> Factors:
    """Bring a piece that is executed as rank to one pair.

    Args:
        piece: Of kind `LOW_RANK`, or `DENSE` with a rank budget.
        tensors: Its tensors by role, on the host, flattened to matrices.
        device: Where a large decomposition may run.

    Returns:
        The pair: in the stored dtype for a plain pair, else in float32.

    Raises:
        torch.linalg.LinAlgError: What must be decomposed holds NaN or infinity, or is too large.
    """
    if piece.kind is PieceKind.DENSE:
        return _truncated(tensors["diff"].to(device, torch.float32), piece.rank_budget)
    if piece.adapter == "loha":
        return _hadamard(tensors, piece.rank_budget, device)
    if piece.adapter == "lokr":
        return _kron_pair(tensors, piece.rank_budget)
    if "packed_down" in tensors:
        return Factors(
            down=unpack_factor(tensors["packed_down"], LowRankSide.DOWN),
            up=unpack_factor(tensors["packed_up"], LowRankSide.UP),
        )
    if "mid" in tensors:
        # delta = up (out, r2) @ mid (r2, r1) @ down (r1, in)
        down, mid, up = (_wide(tensors[role]) for role in ("down", "mid", "up"))
        if mid.shape[0] < mid.shape[1]:
            return Factors(down=mid @ down, up=up)
        return Factors(down=down, up=up @ mid)
    return Factors(down=tensors["down"], up=tensors["up"])


def dense_of(piece: Piece, tensors: Mapping[str, Tensor]) -> Tensor:
    """The delta of a piece that is stored as no vector, (rows, in) float32, without its scale."""
    if piece.kind is PieceKind.DENSE:
        return tensors["diff"].to(torch.float32)
    if piece.adapter == "lokr":
        w1, w2 = kron_factors(tensors)
        return torch.kron(w1.to(torch.float32), w2.to(torch.float32))
    if piece.adapter == "loha":
        return _hadamard_matrix(tensors).to(torch.float32)
    factors = factors_of(piece, tensors, torch.device("cpu"))
    return factors.up.to(torch.float32) @ factors.down.to(torch.float32)


def delta_rows(tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Some rows (n, in) float32 of a LoKr or a LoHa, without its scale.

    Args:
        tensors: Its tensors by role, on one device.
        rows: Which rows, on that device.
    """
    if "hada_w1_a" in tensors:
        own = {**tensors, "hada_w1_a": tensors["hada_w1_a"][rows]}
        own["hada_w2_a"] = tensors["hada_w2_a"][rows]
        return _hadamard_matrix(own).to(torch.float32)
    w1, w2 = (factor.to(torch.float32) for factor in kron_factors(tensors))
    first, second = rows // w2.shape[0], rows % w2.shape[0]
    # (n, im, 1) * (n, 1, il) -> (n, im il)
    return (w1[first].unsqueeze(2) * w2[second].unsqueeze(1)).flatten(1)


def kron_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The two factors w1 (ol, im) and w2 (ok, il) of a LoKr; products are formed in float32."""
    return _kron_factor(tensors, "lokr_w1"), _kron_factor(tensors, "lokr_w2")


def _kron_factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    return _wide(tensors[f"{name}_a"]) @ _wide(tensors[f"{name}_b"])


def _hadamard(tensors: Mapping[str, Tensor], budget: int | None, device: torch.device) -> Factors:
    """(w1_a w1_b) * (w2_a w2_b): exact, or the best of `budget` ranks where r1 r2 are more.

    The exact pair has r1 r2 ranks: of rank 64 that is wider than the matrix, which is formed then.
    """
    if budget is None:
        return _khatri_rao(tensors)
    delta = _hadamard_matrix({role: tensor.to(device) for role, tensor in tensors.items()})
    return _whole(delta) if budget >= min(delta.shape) else _best(delta, budget)


def _hadamard_matrix(tensors: Mapping[str, Tensor]) -> Tensor:
    wide = {role: _wide(tensor) for role, tensor in tensors.items()}
    return (wide["hada_w1_a"] @ wide["hada_w1_b"]).mul_(wide["hada_w2_a"] @ wide["hada_w2_b"])


def _khatri_rao(tensors: Mapping[str, Tensor]) -> Factors:
    """A Hadamard product as one pair of rank r1 r2, exact in float32 for 16-bit factors."""
    left_1, right_1 = _wide(tensors["hada_w1_a"]), _wide(tensors["hada_w1_b"])
    left_2, right_2 = _wide(tensors["hada_w2_a"]), _wide(tensors["hada_w2_b"])
    # (out, r1, 1) * (out, 1, r2) -> (out, r1 r2)
    up = (left_1.unsqueeze(2) * left_2.unsqueeze(1)).flatten(1)
    # (r1, 1, in) * (1, r2, in) -> (r1 r2, in)
    down = (right_1.unsqueeze(1) * right_2.unsqueeze(0)).flatten(0, 1)
    return Factors(down=down, up=up)


@dataclass(frozen=True)
class _Svd:
    left: Tensor  # (rows, r)
    values: Tensor  # (r,)
    right: Tensor  # (r, columns)


def _kron_pair(tensors: Mapping[str, Tensor], budget: int | None) -> Factors:
    """The best pair of at most `budget` ranks; exact where the product has no more."""
    one, two = _factor_svd(tensors, "lokr_w1"), _factor_svd(tensors, "lokr_w2")
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


def _factor_svd(tensors: Mapping[str, Tensor], name: str) -> _Svd:
    """Decompose one factor in float64: the direct one, or the product of its two halves."""
    if name in tensors:
        return _Svd(*singular(tensors[name].double()))
    q_left, r_left = triangular(tensors[f"{name}_a"].double())
    q_right, r_right = triangular(tensors[f"{name}_b"].double().mT)
    left, values, right = singular(r_left @ r_right.mT)
    return _Svd(q_left @ left, values, right @ q_right.mT)


def _whole(delta: Tensor) -> Factors:
    """A matrix (rows, in) times the identity: exact."""
    rows, columns = delta.shape
    identity = torch.eye(min(rows, columns))
    if rows >= columns:
        return Factors(down=identity, up=delta.cpu())
    return Factors(down=delta.cpu(), up=identity)


def _best(delta: Tensor, rank: int) -> Factors:
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
    step = max(1, PANEL_BYTES // (4 * columns))
    return (slice(first, first + step) for first in range(0, count, step))


def _squared_norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _truncated(delta: Tensor, budget: int | None) -> Factors:
    """The best pair of at most `budget` ranks of a dense delta (rows, in), float32.

    A large one is projected on the range that a few power iterations find (Halko, Martinsson and
    Tropp, 2011); what the projection lacks counts as lost.
    """
    full = min(delta.shape)
    rank = full if budget is None else min(budget, full)
    if full <= EXACT_SVD_SIDE or rank + OVERSAMPLING >= full:
        left, values, right = singular(delta)
    else:
        basis = _range(delta, rank + OVERSAMPLING)
        inner, values, right = singular(basis.mT @ delta)
        left = basis @ inner
    if float(values[0]) > 0:
        rank = min(rank, int((values > values[0] * torch.finfo(values.dtype).eps).sum()))
    root = values[:rank].sqrt()
    return _measured(delta, down=root.unsqueeze(1) * right[:rank], up=left[:, :rank] * root)


def _range(delta: Tensor, size: int) -> Tensor:
    """An orthonormal basis (rows, size) of the directions in which a matrix is large."""
    generator = torch.Generator().manual_seed(0)
    shape = (delta.shape[1], size)
    probe = torch.randn(shape, generator=generator, dtype=torch.float32).to(delta.device)
    basis = orthonormal(delta @ probe)
    for _ in range(POWER_ITERATIONS):
        basis = orthonormal(delta @ orthonormal(delta.mT @ basis))
    return basis


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
