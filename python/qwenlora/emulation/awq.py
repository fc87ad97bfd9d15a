"""Stand-in for Nunchaku's AWQ W4A16 linear layer, which computes the modulations."""

from __future__ import annotations

import torch
from torch import nn

from qwenlora.emulation.contract import (
    MAX_AWQ_ROWS,
    KernelContractError,
    check_activation,
    check_tensor,
)
from qwenlora.emulation.leaf import QuantizedLeaf, frozen
from qwenlora.emulation.precision import Precision
from qwenlora.emulation.quantize import GROUP_SIZE, dequantize, quantize_weight_with_zeros
from qwenlora.packing import pack
from qwenlora.packing.layout import MODULATION_PLANES, RowOrder

SCALE_PLANES = (1, 4)
"""Planes of a modulation that scale: the converter adds the 1 of `1 + scale` to their bias."""


class AWQW4A16Linear(QuantizedLeaf):
    """y = x · weightᵀ + bias with a 4-bit weight and 16-bit activations.

    `in_features` is a multiple of 64, `out_features` of 4. Unlike the kernel, the emulation also
    takes float32 activations.

    Attributes:
        in_features: K.
        out_features: N.
        group_size: Input channels per scale, 64.
        precision: See `Precision`.
        qweight: `W4A4`: (N/4, K/2) int32 packed. `EXACT`: (N, K) float32 row-major.
        bias: (N,) in row order, or None.
        wscales: (K/64, N) row-major; ones in `EXACT`.
        wzeros: (K/64, N) row-major; zeros in `EXACT`.
    """

    bias: nn.Parameter | None
    wscales: nn.Parameter
    wzeros: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        precision: Precision,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features % GROUP_SIZE or out_features % 4:
            raise ValueError(
                f"`in_features` must be a multiple of {GROUP_SIZE} and `out_features` of 4, "
                f"got: {in_features} and {out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = GROUP_SIZE
        self.precision = precision

        def zeros(*shape: int, dtype: torch.dtype = torch_dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        groups = in_features // GROUP_SIZE
        self.qweight = frozen(zeros(*self.qweight_shape, dtype=self.qweight_dtype))
        self.bias = nn.Parameter(zeros(out_features)) if bias else None
        self.wscales = frozen(zeros(groups, out_features) + 1)
        self.wzeros = frozen(zeros(groups, out_features))

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        precision: Precision,
        dtype: torch.dtype,
        row_order: RowOrder = RowOrder.INTERLEAVED,
    ) -> AWQW4A16Linear:
        """Convert a dense linear layer.

        Args:
            weight: (N, K) in plane order, any float dtype.
            bias: (N,) in plane order, or None.
            precision: See `Precision`.
            dtype: Dtype of the activations.
            row_order: `INTERLEAVED` for a modulation, which needs a bias.

        Returns:
            A new layer on the weight's device.
        """
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            precision=precision,
            torch_dtype=dtype,
            device=weight.device,
        )
        layer.load_dense(weight, bias, row_order=row_order)
        return layer

    @torch.no_grad()
    def load_dense(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        row_order: RowOrder = RowOrder.INTERLEAVED,
    ) -> None:
        """Set every parameter of this layer from a dense one; see `from_dense`.

        Raises:
            ValueError: The shapes are not this layer's, or a modulation has no bias.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"`weight` does not fit {self!r}, got shape: {tuple(weight.shape)}")
        interleaved = row_order is RowOrder.INTERLEAVED
        if (bias is None) != (self.bias is None) or (bias is None and interleaved):
            raise ValueError(f"`bias` does not fit {self!r}, got: {bias if bias is None else '…'}")
        if interleaved:
            weight = pack.interleave_modulation(weight)
        if bias is not None and self.bias is not None:
            # float32, so that adding 1 to a 16-bit bias rounds once
            self.bias.copy_(_modulation_bias(bias.float()) if interleaved else bias)
        if self._exact:
            self.qweight.copy_(weight)
            return
        values, scales, zeros = quantize_weight_with_zeros(weight, self.wscales.dtype)
        self.qweight.copy_(pack.pack_awq_qweight(values))
        self.wscales.copy_(scales.T)
        self.wzeros.copy_(zeros.T)

    @property
    def qweight_shape(self) -> tuple[int, int]:
        """Shape of `qweight` in this precision."""
        if self._exact:
            return (self.out_features, self.in_features)
        return (self.out_features // 4, self.in_features // 2)

    @property
    def qweight_dtype(self) -> torch.dtype:
        """Dtype of `qweight` in this precision."""
        return torch.float32 if self._exact else torch.int32

    def weight(self) -> torch.Tensor:
        """Return the dequantized weight, (N, K) float32, rows as stored."""
        if self._exact:
            return self.qweight
        return dequantize(pack.unpack_awq_qweight(self.qweight), self.wscales.T, self.wzeros.T)

    def check(self, x: torch.Tensor) -> None:
        """Check every tensor that the kernel would read with the activation `x`.

        Raises:
            KernelContractError: One of them breaks the contract.
        """
        check_activation(x, self.in_features)
        if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_AWQ_ROWS:
            raise KernelContractError(
                f"activation must have between 1 and {MAX_AWQ_ROWS} rows, "
                f"got shape: {tuple(x.shape)}"
            )
        groups, outputs = self.in_features // GROUP_SIZE, self.out_features
        check_tensor("qweight", self.qweight, self.qweight_shape, self.qweight_dtype, x)
        if self.bias is not None:
            check_tensor("bias", self.bias, (outputs,), x.dtype, x)
        check_tensor("wscales", self.wscales, (groups, outputs), x.dtype, x)
        check_tensor("wzeros", self.wzeros, (groups, outputs), x.dtype, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: (M, K), 1 ≤ M ≤ 8, of the layer's dtype.

        Returns:
            (M, N), dtype of `x`, rows as stored.

        Raises:
            KernelContractError: See `check`.
        """
        self.check(x)
        output = x.float() @ self.weight().T  # (M, N)
        if self._exact:
            bias = 0.0 if self.bias is None else self.bias.float()
            return (output + bias).to(x.dtype)
        # The kernel writes 16-bit values, and the bias is added to those.
        rounded = output.to(x.dtype)
        return rounded if self.bias is None else rounded + self.bias

    def extra_repr(self) -> str:
        """Name the sizes that tell two layers apart."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"precision={self.precision.value}"
        )

    @property
    def _exact(self) -> bool:
        return self.precision is Precision.EXACT


def _modulation_bias(bias: torch.Tensor) -> torch.Tensor:
    planes = bias.view(MODULATION_PLANES, -1).clone()  # (6, C)
    for plane in SCALE_PLANES:
        planes[plane] += 1
    return pack.interleave_modulation(planes.view(-1))
