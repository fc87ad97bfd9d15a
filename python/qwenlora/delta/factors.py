"""From an adapter's stored tensors to one low-rank pair: exact where it can be, else cut.

Formulas are those of LoRA, LoHa and LoKr as in their trainers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.truncate import Factors, Svd, by_gram, of_kron, of_matrix, whole
from qwenlora.packing.factor import unpack_factor
from qwenlora.packing.layout import LowRankSide
from qwenlora.plan.documents import PieceKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.plan.documents import Piece

__all__ = ["delta_rows", "dense_of", "factors_of", "kron_factors"]


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
        return of_matrix(tensors["diff"].to(device, torch.float32), piece.rank_budget)
    if piece.adapter == "loha":
        return _hadamard(tensors, piece.rank_budget, device)
    if piece.adapter == "lokr":
        one, two = _svd_of(tensors, "lokr_w1"), _svd_of(tensors, "lokr_w2")
        return of_kron(one, two, piece.rank_budget)
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


def _svd_of(tensors: Mapping[str, Tensor], name: str) -> Svd:
    """One factor of a LoKr: the direct one, or the product of its two halves."""
    if name in tensors:
        return Svd.of(tensors[name])
    return Svd.of_halves(tensors[f"{name}_a"], tensors[f"{name}_b"])


def _hadamard(tensors: Mapping[str, Tensor], budget: int | None, device: torch.device) -> Factors:
    """(w1_a w1_b) * (w2_a w2_b): exact, or the best of `budget` ranks where r1 r2 are more.

    The exact pair has r1 r2 ranks: of rank 64 that is wider than the matrix, which is formed then.
    """
    if budget is None:
        return _khatri_rao(tensors)
    delta = _hadamard_matrix({role: tensor.to(device) for role, tensor in tensors.items()})
    return whole(delta) if budget >= min(delta.shape) else by_gram(delta, budget)


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


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
