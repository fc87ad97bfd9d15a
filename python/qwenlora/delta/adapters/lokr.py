"""LoKr: a Kronecker product of two factors, each whole or a product of two halves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.adapter import Adapter, wide
from qwenlora.delta.truncate import Svd, of_kron

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.factors import Factors

__all__ = ["LOKR", "kron_factors", "kron_rows"]


def kron_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The two factors w1 (ol, im) and w2 (ok, il) of a LoKr; products are formed in float32."""
    return _factor(tensors, "lokr_w1"), _factor(tensors, "lokr_w2")


def kron_rows(w1: Tensor, w2: Tensor, rows: Tensor) -> Tensor:
    """Some rows (n, in) float32 of a Kronecker product, by their indices on its device."""
    w1, w2 = w1.to(torch.float32), w2.to(torch.float32)
    first, second = rows // w2.shape[0], rows % w2.shape[0]
    # (n, im, 1) * (n, 1, il) -> (n, im il)
    return (w1[first].unsqueeze(2) * w2[second].unsqueeze(1)).flatten(1)


def _factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    return wide(tensors[f"{name}_a"]) @ wide(tensors[f"{name}_b"])


def _svd(tensors: Mapping[str, Tensor], name: str) -> Svd:
    if name in tensors:
        return Svd.of(tensors[name])
    return Svd.of_halves(tensors[f"{name}_a"], tensors[f"{name}_b"])


def _factors(
    tensors: Mapping[str, Tensor],
    budget: int | None,
    device: torch.device,
) -> Factors:
    return of_kron(_svd(tensors, "lokr_w1"), _svd(tensors, "lokr_w2"), budget)


def _matrix(tensors: Mapping[str, Tensor]) -> Tensor:
    w1, w2 = kron_factors(tensors)
    return torch.kron(w1.to(torch.float32), w2.to(torch.float32))


def _rows(tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    return kron_rows(*kron_factors(tensors), rows)


LOKR = Adapter(name="lokr", factors=_factors, matrix=_matrix, rows=_rows)
