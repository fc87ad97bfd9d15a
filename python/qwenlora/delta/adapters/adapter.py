"""A kind of adapter whose delta is a weight's: what its stored tensors make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from qwenlora.errors import UnsupportedAdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from qwenlora.delta.factors import Factors

__all__ = ["Adapter", "unknown_adapter", "wide"]


class ToFactors(Protocol):
    """Brings a delta to one low-rank pair: exact where it can be, else the best within a budget."""

    def __call__(
        self, tensors: Mapping[str, Tensor], budget: int | None, device: torch.device
    ) -> Factors:
        """Bring a delta to one pair.

        Args:
            tensors: Its tensors by role, on the host, flattened to matrices.
            budget: Most ranks; None where the delta is a pair of any rank.
            device: Where a large decomposition may run.

        Returns:
            The pair: in the stored dtype for a plain pair, else in float32.

        Raises:
            torch.linalg.LinAlgError: What must be decomposed holds NaN or infinity, or is too
                large.
        """


@dataclass(frozen=True)
class Adapter:
    """One row of the table of adapters. Tensors come by role; no delta has its scale in it.

    Attributes:
        name: Its name in plans.
        factors: The delta as one low-rank pair.
        matrix: The delta as it is, (rows, in) float32.
        rows: Some rows (n, in) float32 of it, by their indices on the tensors' device.
    """

    name: str
    factors: ToFactors
    matrix: Callable[[Mapping[str, Tensor]], Tensor]
    rows: Callable[[Mapping[str, Tensor], Tensor], Tensor]


def unknown_adapter(name: str, what: str) -> UnsupportedAdapterError:
    """The error where a plan has a piece that nothing here can execute.

    Args:
        name: The piece's adapter.
        what: What its delta is of, as words.
    """
    return UnsupportedAdapterError(
        f"nothing makes the delta of {what} from adapter `{name}`"
        "\nhint: the plan is of another version of qwenlora; install it anew"
    )


def wide(tensor: Tensor) -> Tensor:
    """A tensor in a dtype that products are formed in: float64 as it is, others as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
