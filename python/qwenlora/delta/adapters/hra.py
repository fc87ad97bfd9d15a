"""HRA: a weight whose columns are reflected, once for each stored direction."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.factors import Factors
from qwenlora.delta.finite import damaged, is_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.adapters.weight import Weight

__all__ = ["Directions", "hra"]


class Directions(enum.Enum):
    """The directions that are reflected along."""

    STORED = "stored"
    """Those stored, in their order, normalised."""
    ORTHONORMAL = "orthonormal"
    """Those stored, each without its part along those before it: PEFT's `apply_GS`."""


def hra(
    tensors: Mapping[str, Tensor],
    weight: Weight,
    *,
    module: str,
    row_begin: int,
    row_count: int,
    directions: Directions = Directions.STORED,
) -> Factors:
    """The pair of rank r that equals W (H_1 ... H_r) - W, where H_i = I - 2 u_i u_i^T.

    PEFT's order: W is multiplied by the first direction's reflection first (`tuners/hra/layer.py`,
    `get_delta_weight`). The product of reflections is I - U T U^T with T upper triangular (compact
    WY, Schreiber and Van Loan, 1989). PEFT starts from pairs of equal directions, whose reflections
    cancel; so that no rounding to 16 bits meets terms that cancel, the small core R T R^T of
    U = Q R is decomposed, and `up` and `down` have the delta's own singular values.

    Args:
        tensors: `hra_u` (K, r).
        weight: The layer's weight.
        module: Its name, for errors.
        row_begin: First logical row that it changes.
        row_count: How many.
        directions: Along which directions it reflects.

    Returns:
        `up` (rows, r) and `down` (r, K) of orthonormal rows, in float32.

    Raises:
        NonFiniteError: A value is NaN or infinite, or a direction is zero.
    """
    stored = tensors["hra_u"]
    if not is_finite(stored):
        raise damaged(module, "its hra")
    right, down = _core(_unit(stored.double(), module, directions))
    up = weight.times(right.to(torch.float32), row_begin, row_count).neg().to(down.device)
    if not is_finite(up):
        raise damaged(module, "its hra or its weight")
    return Factors(down=down.to(torch.float32), up=up.to(torch.float32))


def _unit(directions: Tensor, module: str, kind: Directions) -> Tensor:
    """(K, r) columns of length 1."""
    columns: list[Tensor] = []
    for column in directions.unbind(1):
        if kind is Directions.ORTHONORMAL:
            for before in columns:
                column = column - (before @ column) * before
        length = column.norm()
        if not float(length) > 0:
            raise damaged(module, "its hra, divided by the length of its directions,")
        columns.append(column / length)
    return torch.stack(columns, dim=1)


def _core(unit: Tensor) -> tuple[Tensor, Tensor]:
    """X (K, r) and Y (r, K) with X Y = U T U^T, the columns of X by size, the rows of Y unit."""
    basis, triangle = torch.linalg.qr(unit)
    left, sizes, right = torch.linalg.svd(triangle @ _compact(unit) @ triangle.mT)
    return basis @ (left * sizes), right @ basis.mT


def _compact(unit: Tensor) -> Tensor:
    """T (r, r): (I - U T U^T)(I - 2 v v^T) = I - [U v] [[T, -2 T U^T v], [0, 2]] [U v]^T."""
    rank = unit.shape[1]
    gram = unit.mT @ unit
    compact = unit.new_zeros(rank, rank)
    for column in range(rank):
        compact[:column, column] = -2 * (compact[:column, :column] @ gram[:column, column])
        compact[column, column] = 2
    return compact
