"""Weights that a file replaces, of linears that are not quantized, norms and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.set import set_delta
from qwenlora.delta.adapters.vector import ValueDelta
from qwenlora.model.target import PACKED_DTYPES
from qwenlora.model.values import base_value

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.adapters.weight import Weight
    from qwenlora.model.target import Target
    from qwenlora.plan.documents import Piece

__all__ = ["is_replacement", "is_stored_value", "replaced_rows", "replaced_value"]

_ROLE = "set_weight"


def is_replacement(piece: Piece) -> bool:
    """Tell if a piece replaces the values of its module."""
    return piece.adapter == "set"


def is_stored_value(target: Target) -> bool:
    """Tell if the layer's weight can hold a sum: one that is stored in 8 bits cannot."""
    return _weight_of(target).dtype in PACKED_DTYPES


def replaced_value(piece: Piece, tensors: Mapping[str, Tensor], target: Target) -> ValueDelta:
    """What the layer's weight differs by from the base's where it is replaced.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    base = _weight_of(target).detach().cpu()
    delta = torch.zeros(base.shape, dtype=torch.float64)
    # Only a linear can hold several modules; the others are replaced whole.
    whole = base.ndim < 2 or target.only_values
    rows = slice(None) if whole else slice(piece.row_begin, piece.row_begin + piece.row_count)
    delta[rows] = set_delta(tensors[_ROLE].cpu(), base[rows], module=piece.target)
    return ValueDelta("weight", delta)


def replaced_rows(piece: Piece, tensors: Mapping[str, Tensor], weight: Weight) -> Tensor:
    """The same as rows (n, K) float32, of a weight that cannot hold a sum.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """
    stored = tensors[_ROLE]
    panels = [
        set_delta(
            stored[first - piece.row_begin : first - piece.row_begin + len(panel)],
            panel,
            module=piece.target,
        )
        for first, panel in weight.panels(piece.row_begin, piece.row_count)
    ]
    return torch.cat(panels).to(torch.float32)


def _weight_of(target: Target) -> Tensor:
    weight = base_value(target.module, f"{target.prefix}weight")
    if weight is None:
        raise TypeError(f"`{target.path}` has no weight of its own")
    return weight
