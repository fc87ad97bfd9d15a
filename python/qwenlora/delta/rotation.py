"""A rotation of a weight's rows or columns, block by block or by a butterfly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.diagonal import bias_rows
from qwenlora.delta.parts import PartKind, PartShape, ScaledPart
from qwenlora.delta.strength import factor_at
from qwenlora.plan.documents import Side

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RotationDelta"]


@dataclass(frozen=True)
class RotationDelta:
    """W' - W of a rotation, without strength.

    Held are differences from what changes nothing, so a small rotation keeps its precision and a
    delta of zeros is zero.

    On rows (OUT): W'_k = M_k W_k for each block k of b rows, then every row times 1 + `rescale`.
    With more than one stage these are a butterfly's (`qwenlora.delta.butterfly`), one after the
    other.

    On columns (IN): what the layer sees is x' with x'_k = x_k M_k for each block k of b inputs, so
    W' = W M^T; then every row times 1 + `scale`. There is one stage.

    Attributes:
        side: Whether it turns rows (OUT) or columns (IN).
        row_begin: First of the layer's logical rows that it changes.
        row_count: How many.
        stages: (m, n, b, b) float32, M - I of each stage and block.
        rescale: (row_count,) float32, factors on rotated rows, less 1; None where there are none,
            and always on columns.
        scale: (row_count,) float32, factors on the rows of a weight whose columns are turned, less
            1; None where there are none, and always on rows.
    """

    side: Side
    row_begin: int
    row_count: int
    stages: Tensor
    rescale: Tensor | None = None
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self._held)

    @property
    def zero(self) -> bool:
        """True where it changes nothing."""
        return not any(bool(tensor.any()) for tensor in self._held)

    def scaled_parts(
        self,
        strength: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bias: Tensor | None = None,
    ) -> tuple[ScaledPart, ...]:
        """The parts that add strength times this delta to what the layer computes.

        Args:
            strength: Factor on the whole delta.
            dtype: The slot's dtype; products with the strength are formed in float32.
            device: The slot's device.
            bias: (N,) what the layer adds at x = 0, logical rows; None where it adds nothing.

        Returns:
            On rows one ROTATION, or one BUTTERFLY where there are more stages. On columns an
            INPUT_ROTATION, and with `scale` a PASS after it.
        """
        cast = _Cast(factor_at(1.0, strength), dtype, device)
        own = bias_rows(bias, self.row_begin, self.row_count, dtype, device)
        if self.side is Side.IN:
            return self._input_parts(cast, own)
        stages, count, size, _ = self.stages.shape
        if stages == 1:
            tensors = {"blocks": cast.scaled(_rescaled(self.stages[0], self.rescale)), "bias": own}
            return (self._part(PartKind.ROTATION, (count, size), tensors),)
        rescale = self.rescale
        if rescale is None:
            rescale = self.stages.new_zeros(self.row_count)
        tensors = {
            "stages": cast.plain(self.stages),
            "rescale": cast.plain(rescale),
            "strength": torch.tensor(cast.factor, dtype=torch.float32, device=device),
            "bias": own,
        }
        return (self._part(PartKind.BUTTERFLY, (stages, count, size), tensors),)

    def _input_parts(self, cast: _Cast, bias: Tensor) -> tuple[ScaledPart, ...]:
        """W (x + x') with the row's factors is W x, and W x', and the factors less 1 of both."""
        blocks = self.stages[0]
        sizes = (blocks.shape[0], blocks.shape[1])
        turned = self._part(PartKind.INPUT_ROTATION, sizes, {"blocks": cast.scaled(blocks)})
        if self.scale is None:
            return (turned,)
        tensors = {"blocks": cast.plain(blocks), "factor": cast.scaled(self.scale), "bias": bias}
        return (turned, self._part(PartKind.PASS, sizes, tensors))

    def _part(
        self, kind: PartKind, sizes: tuple[int, ...], tensors: dict[str, Tensor]
    ) -> ScaledPart:
        return ScaledPart(PartShape(kind, self.row_begin, self.row_count, sizes), tensors)

    @property
    def _held(self) -> tuple[Tensor, ...]:
        own = (self.stages, self.rescale, self.scale)
        return tuple(tensor for tensor in own if tensor is not None)


@dataclass(frozen=True)
class _Cast:
    """A strength, and the form that a slot's tensors have."""

    factor: float
    dtype: torch.dtype
    device: torch.device

    def plain(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def scaled(self, tensor: Tensor) -> Tensor:
        return (tensor * self.factor).to(self.device, self.dtype)


def _rescaled(blocks: Tensor, rescale: Tensor | None) -> Tensor:
    """(1 + rescale) M - I from M - I, in blocks (n, b, b): r (M - I) + (r - 1) I."""
    if rescale is None:
        return blocks
    less = rescale.view(blocks.shape[:2])
    return blocks * (1 + less).unsqueeze(2) + torch.diag_embed(less)
