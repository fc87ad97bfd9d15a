"""What Nunchaku's W4A4 kernels compute from a layer's tensors, whoever holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.emulation import nvfp4
from qwenlora.emulation.contract import check_activation, check_low_rank, check_tensor
from qwenlora.emulation.precision import Precision
from qwenlora.emulation.quantize import (
    GROUP_SIZE,
    IntegerRange,
    dequantize,
    quantize_activation,
)
from qwenlora.packing import pack
from qwenlora.packing.layout import UNSIGNED_SHIFT, LowRankSide

if TYPE_CHECKING:
    from torch import Tensor


class SVDQArithmetic:
    """The two kernels of a W4A4 linear, over the tensors that a subclass has.

    Attributes:
        in_features: K.
        out_features: N.
        precision: See `Precision`.
        act_unsigned: Whether the input is shifted and quantized without a sign.
        qweight: `W4A4`: (N, K/2) int8 packed. `EXACT`: (N, K) float32 row-major.
        bias: (N,) in packed vector order, or None.
        wscales: (K/64, N) packed.
        smooth_factor: (K,) in packed vector order.
        proj_down: (K, R) packed.
        proj_up: (N, R) packed.
        wcscales: (N,) in packed vector order, or None: factors on the product before bias and
            low-rank branch.
        wtscale: One factor on an nvfp4 weight, or None for 1.
    """

    in_features: int
    out_features: int
    precision: Precision
    act_unsigned: bool
    wcscales: Tensor | None
    wtscale: float | None
    qweight: Tensor
    bias: Tensor | None
    wscales: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor

    @property
    def qweight_shape(self) -> tuple[int, int]:
        """Shape of `qweight` in this precision."""
        halved = self.in_features // 2
        return (self.out_features, self.in_features if self._exact else halved)

    @property
    def qweight_dtype(self) -> torch.dtype:
        """Dtype of `qweight` in this precision."""
        return torch.float32 if self._exact else torch.int8

    def residual(self) -> Tensor:
        """Return the residual times the smooth factor, without `wcscales`: (N, K) float32."""
        if self._exact:
            return self.qweight
        if self._fp4:
            return nvfp4.unpacked_weight(self.qweight, self.wscales, self.wtscale)
        values = pack.unpack_svdq_qweight(self.qweight)  # (N, K)
        return dequantize(values, pack.unpack_svdq_wscales(self.wscales))

    def check(self, x: Tensor) -> None:
        """Check every tensor that a kernel would read with the activation `x`.

        Raises:
            KernelContractError: One of them breaks the contract.
        """
        check_activation(x, self.in_features)
        check_low_rank(self.proj_down, self.proj_up)
        rank = self.proj_down.shape[1]
        inputs, outputs = self.in_features, self.out_features
        check_tensor("qweight", self.qweight, self.qweight_shape, self.qweight_dtype, x)
        if self.bias is not None:
            check_tensor("bias", self.bias, (outputs,), x.dtype, x)
        group, scale_dtype = (nvfp4.GROUP, nvfp4.SCALE) if self._fp4 else (GROUP_SIZE, x.dtype)
        check_tensor("wscales", self.wscales, (inputs // group, outputs), scale_dtype, x)
        if self.wcscales is not None:
            check_tensor("wcscales", self.wcscales, (outputs,), x.dtype, x)
        check_tensor("smooth_factor", self.smooth_factor, (inputs,), x.dtype, x)
        check_tensor("proj_down", self.proj_down, (inputs, rank), x.dtype, x)
        check_tensor("proj_up", self.proj_up, (outputs, rank), x.dtype, x)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Do what the quantizing kernel does to a raw activation.

        Args:
            x: (M, K), the layer's input before shift and smoothing.

        Returns:
            activation: (M, K) float32, what the residual is multiplied with: shifted, smoothed and,
                in `W4A4`, rounded to 4-bit values times their scales.
            lora_act: (M, R) float32, the raw activation times the down projection.
        """
        down = pack.unpack_lowrank(self.proj_down, LowRankSide.DOWN)  # (R, K)
        lora_act = x.float() @ down.float().T  # (M, R)
        smooth = pack.unpack_vector(self.smooth_factor)  # (K,)
        if self._exact:
            shifted = x.float() + UNSIGNED_SHIFT if self.act_unsigned else x.float()
            return shifted / smooth.float(), lora_act
        if self._fp4:
            return nvfp4.rounded_activation(x / smooth), lora_act
        # Shift and division round to the activation's dtype, as the kernels do.
        shifted = x + UNSIGNED_SHIFT if self.act_unsigned else x
        integer_range = IntegerRange.UNSIGNED if self.act_unsigned else IntegerRange.SIGNED
        values, scales = quantize_activation(shifted / smooth, integer_range)
        return dequantize(values, scales), lora_act

    def product(self, activation: Tensor, lora_act: Tensor) -> Tensor:
        """Do what the GEMM kernel does with the output of `rounded`.

        Args:
            activation: (M, K) float32.
            lora_act: (M, R) float32.

        Returns:
            (M, N) float32.
        """
        output = activation @ self.residual().T  # (M, N)
        if self.wcscales is not None:
            output = output * pack.unpack_vector(self.wcscales).float()
        if self.bias is not None:
            output = output + pack.unpack_vector(self.bias).float()
        up = pack.unpack_lowrank(self.proj_up, LowRankSide.UP)  # (N, R)
        if not self._exact:
            # The kernel feeds 16-bit values to its second low-rank product.
            lora_act = lora_act.to(up.dtype)
        return output + lora_act.float() @ up.float().T

    @property
    def _exact(self) -> bool:
        return self.precision is Precision.EXACT

    @property
    def _fp4(self) -> bool:
        return self.precision is Precision.NVFP4


@dataclass(frozen=True)
class SVDQTensors(SVDQArithmetic):
    """Tensors of a W4A4 linear that another module holds; see `SVDQArithmetic`."""

    in_features: int
    out_features: int
    precision: Precision
    qweight: Tensor
    bias: Tensor | None
    wscales: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    act_unsigned: bool = False
    wcscales: Tensor | None = None
    wtscale: float | None = None
