"""Decompositions of matrices whose values are judged first.

Libraries of linear algebra answer NaN and infinity as they like: one raises, one returns NaN, one
writes lines of its own to standard error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.delta.finite import is_finite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["eigenvectors", "orthonormal", "singular", "triangular"]


def singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD (left, values, right) of a matrix.

    Raises:
        torch.linalg.LinAlgError: A value is NaN or infinite, or the algorithm fails.
    """
    _require_finite(matrix)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def eigenvectors(gram: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix as columns, those of the largest values last.

    Raises:
        torch.linalg.LinAlgError: A value is NaN or infinite, or the algorithm fails.
    """
    _require_finite(gram)
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors


def triangular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The thin QR decomposition of a matrix.

    Raises:
        torch.linalg.LinAlgError: A value is NaN or infinite.
    """
    _require_finite(matrix)
    basis, factor = torch.linalg.qr(matrix)
    return basis, factor


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of a matrix's columns.

    Raises:
        torch.linalg.LinAlgError: A value is NaN or infinite.
    """
    return triangular(matrix)[0]


def _require_finite(matrix: Tensor) -> None:
    if not is_finite(matrix):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "a matrix that is to be decomposed holds NaN or infinity"
        )
