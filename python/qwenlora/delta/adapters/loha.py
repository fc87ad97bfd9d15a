"""LoHa: a product, element by element, of two low-rank matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.adapter import Adapter, wide
from qwenlora.delta.factors import Factors
from qwenlora.delta.truncate import by_gram, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["LOHA"]


def _factors(tensors: Mapping[str, Tensor], budget: int | None, device: torch.device) -> Factors:
    """(w1_a w1_b) * (w2_a w2_b): exact, or the best of `budget` ranks where r1 r2 are more.

    The exact pair has r1 r2 ranks: of rank 64 that is wider than the matrix, which is formed then.
    """
    if budget is None:
        return _khatri_rao(tensors)
    delta = _product({role: tensor.to(device) for role, tensor in tensors.items()})
    return whole(delta) if budget >= min(delta.shape) else by_gram(delta, budget)


def _product(tensors: Mapping[str, Tensor]) -> Tensor:
    own = {role: wide(tensor) for role, tensor in tensors.items()}
    return (own["hada_w1_a"] @ own["hada_w1_b"]).mul_(own["hada_w2_a"] @ own["hada_w2_b"])


def _khatri_rao(tensors: Mapping[str, Tensor]) -> Factors:
    """A Hadamard product as one pair of rank r1 r2, exact in float32 for 16-bit factors."""
    left_1, right_1 = wide(tensors["hada_w1_a"]), wide(tensors["hada_w1_b"])
    left_2, right_2 = wide(tensors["hada_w2_a"]), wide(tensors["hada_w2_b"])
    # (out, r1, 1) * (out, 1, r2) -> (out, r1 r2)
    up = (left_1.unsqueeze(2) * left_2.unsqueeze(1)).flatten(1)
    # (r1, 1, in) * (1, r2, in) -> (r1 r2, in)
    down = (right_1.unsqueeze(1) * right_2.unsqueeze(0)).flatten(0, 1)
    return Factors(down=down, up=up)


def _matrix(tensors: Mapping[str, Tensor]) -> Tensor:
    return _product(tensors).to(torch.float32)


def _rows(tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    # Not by `[rows]`: PyTorch 2.5 has that for no float8.
    own = {name: tensors[name].index_select(0, rows) for name in ("hada_w1_a", "hada_w2_a")}
    return _matrix({**tensors, **own})


LOHA = Adapter(name="loha", factors=_factors, matrix=_matrix, rows=_rows)
