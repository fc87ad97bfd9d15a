"""What deltas need to know of the layer that carries them: its weight, norms and bias."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qwenlora.packing.layout import MODULATION_PLANES, MODULATION_SCALES, RowOrder
from qwenlora.plan.documents import Side
from qwenlora.weight.base_weight import BaseWeight, weight_identity

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from torch import Tensor

    from qwenlora.model.target import Target
    from qwenlora.source.norms_file import NormsFile

__all__ = ["SlotBase"]


class SlotBase:
    """One slot's base; what is asked for is made once, and no earlier."""

    def __init__(
        self, target: Target, *, device: torch.device | None = None, exact: NormsFile | None = None
    ) -> None:
        """Take what tells the base.

        Args:
            target: The slot.
            device: Where to compute with tensors that are in host memory; None for the CPU.
            exact: Norms of the weight before it was quantized.
        """
        self._target = target
        self._device = device
        self._exact = exact

    @cached_property
    def weight(self) -> BaseWeight:
        """The weight that the layer computes with."""
        return BaseWeight.of(self._target, device=self._device)

    @property
    def key(self) -> Hashable:
        """Another one for every weight, every change of its values, and other exact norms."""
        exact = None if self._exact is None else self._exact.identity
        return (weight_identity(self._target), exact)

    def norms(self, module: str, side: Side, *, length: int) -> Tensor | None:
        """Exact squared norms (length,) float64 of a module; None where none are known.

        Raises:
            NormsFileError: The file of norms has another number of them, or is damaged.
        """
        if self._exact is None:
            return None
        of_side = self._exact.row_norms if side is Side.OUT else self._exact.column_norms
        return of_side(module, length=length)

    def bias(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """(N,) float32: what the layer puts out at x = 0, logical rows; None where it has no bias.

        Args:
            values: What is added to stored values, by name, in float64.
        """
        bias = self.weight.true_bias()
        if bias is None or "bias" not in values:
            return bias
        return (bias.double() + values["bias"].to(bias.device)).float()

    def kept_bias(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """(N,) float32: what of `bias` a layer has not that LoRAs are trained on; None for nothing.

        That is what is added to the stored bias, and the ones of scales that a modulation of
        interleaved rows has in it.

        Args:
            values: What is added to stored values, by name, in float64.
        """
        target = self._target
        kept = torch.zeros(target.row.out_features, dtype=torch.float64)
        if target.row_order is RowOrder.INTERLEAVED:
            kept.view(MODULATION_PLANES, -1)[list(MODULATION_SCALES)] = 1
        if "bias" in values:
            kept = kept.to(values["bias"].device) + values["bias"]
        return kept.float() if bool(kept.any()) else None
