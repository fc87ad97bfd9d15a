"""Stand-in for Nunchaku's SVDQ W4A4 linear layer."""

from __future__ import annotations

import torch
from torch import nn

from qwenlora.emulation import nvfp4
from qwenlora.emulation.arithmetic import SVDQArithmetic
from qwenlora.emulation.contract import KernelContractError, check_quantized, check_rank
from qwenlora.emulation.leaf import QuantizedLeaf, frozen
from qwenlora.emulation.lowrank import low_rank_factors
from qwenlora.emulation.precision import Precision
from qwenlora.emulation.quantize import (
    GROUP_SIZE,
    IntegerRange,
    dequantize,
    quantize_activation,
    quantize_weight,
)
from qwenlora.packing import activation, pack
from qwenlora.packing.activation import ROWS
from qwenlora.packing.layout import UNSIGNED_SHIFT, LowRankSide


class SVDQW4A4Linear(SVDQArithmetic, QuantizedLeaf):
    """y = (x / smooth) · residualᵀ + x · downᵀ · upᵀ + bias, stored as Nunchaku stores it.

    Names, order, shapes and dtypes of the parameters are Nunchaku's; so is which of them take
    gradients. The low-rank branch sees the raw activation.

    `in_features` is a multiple of 64; `out_features` of 16 in `EXACT` and of 128 in other
    precisions, which have to fill whole weight tiles. Unlike the kernels, all precisions also take
    float32 activations.

    Attributes:
        in_features: K.
        out_features: N.
        rank: Rank of the base branch; informational, `proj_down.shape[1]` is what counts.
        act_unsigned: The layer behind GELU: its input is shifted and quantized without a sign, and
            its bias makes up for the shift.
        precision: See `Precision`.
        group_size: Input channels per scale: 64, in `NVFP4` 16.
        torch_dtype: Dtype of the activations and of every parameter but `qweight`.
        qweight: (N, K/2) int8 packed. `EXACT`: (N, K) float32 row-major. It holds the residual
            times the smooth factor.
        bias: (N,) in packed vector order, or None.
        wscales: (K/64, N) packed; ones in `EXACT`. `NVFP4`: (K/16, N) float8_e4m3fn packed.
        smooth_factor: (K,) in packed vector order.
        smooth_factor_orig: (K,) as `smooth_factor`; no kernel reads it.
        proj_down: (K, R) packed.
        proj_up: (N, R) packed.
        wcscales: `NVFP4`: (N,) in packed vector order. Else None, unless somebody sets it.
        wtscale: `NVFP4`: a float. Else None.
    """

    qweight: nn.Parameter
    bias: nn.Parameter | None
    wscales: nn.Parameter
    smooth_factor: nn.Parameter
    smooth_factor_orig: nn.Parameter
    proj_down: nn.Parameter
    proj_up: nn.Parameter
    wcscales: torch.Tensor | None
    wtscale: float | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 32,
        bias: bool = True,
        *,
        precision: Precision,
        act_unsigned: bool = False,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank)
        rows = 16 if precision is Precision.EXACT else 128
        if in_features % GROUP_SIZE or out_features % rows:
            raise ValueError(
                f"`in_features` must be a multiple of {GROUP_SIZE} and `out_features` of {rows}, "
                f"got: {in_features} and {out_features}"
            )
        is_fp4 = precision is Precision.NVFP4
        if is_fp4 and act_unsigned:
            raise ValueError("nvfp4 has no activations without a sign")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.act_unsigned = act_unsigned
        self.precision = precision
        self.group_size = nvfp4.GROUP if is_fp4 else GROUP_SIZE
        self.torch_dtype = torch_dtype

        def zeros(*shape: int, dtype: torch.dtype = torch_dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.qweight = frozen(zeros(*self.qweight_shape, dtype=self.qweight_dtype))
        self.bias = nn.Parameter(zeros(out_features)) if bias else None
        scales = zeros(in_features // self.group_size, out_features) + 1
        self.wscales = frozen(scales.to(nvfp4.SCALE) if is_fp4 else scales)
        self.smooth_factor = frozen(zeros(in_features) + 1)
        self.smooth_factor_orig = frozen(zeros(in_features) + 1)
        self.proj_down = nn.Parameter(zeros(in_features, rank))
        self.proj_up = nn.Parameter(zeros(out_features, rank))
        self.wcscales = frozen(zeros(out_features) + 1) if is_fp4 else None
        self.wtscale = 1.0 if is_fp4 else None

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        rank: int,
        precision: Precision,
        dtype: torch.dtype,
        act_unsigned: bool = False,
        smooth: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SVDQW4A4Linear:
        """Convert a dense linear layer.

        Args:
            weight: (N, K), any float dtype.
            bias: (N,) or None.
            rank: Rank of the base branch, a multiple of 16.
            precision: See `Precision`.
            dtype: Dtype of the activations.
            act_unsigned: Whether the layer stands behind GELU in a fused MLP.
            smooth: (K,) positive divisors of the activation; ones when None.
            generator: Randomness of the low-rank split of large weights.

        Returns:
            A new layer on the weight's device.
        """
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            rank,
            bias is not None,
            precision=precision,
            act_unsigned=act_unsigned,
            torch_dtype=dtype,
            device=weight.device,
        )
        layer.load_dense(weight, bias, smooth=smooth, generator=generator)
        return layer

    @torch.no_grad()
    def load_dense(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        smooth: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Set every parameter of this layer from a dense one; see `from_dense`.

        Raises:
            ValueError: The shapes are not this layer's, or a shifted layer has no bias.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"`weight` does not fit {self!r}, got shape: {tuple(weight.shape)}")
        if (bias is None) != (self.bias is None) or (bias is None and self.act_unsigned):
            raise ValueError(f"`bias` does not fit {self!r}, got: {bias if bias is None else '…'}")
        stored = self.smooth_factor.dtype
        if smooth is None:
            smooth = torch.ones(self.in_features, device=weight.device)
        # The residual makes up for the rounding of everything else that is stored.
        smooth = smooth.to(weight.device, stored)
        wide = smooth.double()
        down, up = low_rank_factors((weight.double() * wide).float(), self.rank, generator)
        down = (down.double() / wide).to(stored)
        up = up.to(stored)
        residual = weight.double() - up.double() @ down.double()  # (N, K), for the raw activation
        if bias is not None and self.bias is not None:
            shift = UNSIGNED_SHIFT if self.act_unsigned else 0.0
            corrected = bias.double() - shift * residual.sum(dim=1)
            self.bias.copy_(pack.pack_vector(corrected.to(stored)))
        self._store_residual((residual * wide).float())
        self.smooth_factor.copy_(pack.pack_vector(smooth))
        self.smooth_factor_orig.copy_(pack.pack_vector(smooth))
        self.proj_down.copy_(pack.pack_lowrank(down, LowRankSide.DOWN))
        self.proj_up.copy_(pack.pack_lowrank(up, LowRankSide.UP))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: (…, K), usually (B, S, K) or (M, K), of the layer's dtype.

        Returns:
            (…, N), dtype of `x`.

        Raises:
            KernelContractError: See `check`; also for an unsigned layer in `W4A4` precision, which
                gives meaningless results outside the fused MLP.
        """
        if self.act_unsigned and not self._exact:
            raise KernelContractError(
                "a layer with unsigned activations cannot be called by itself: it runs only in "
                "`fused_gelu_mlp`, which shifts and quantizes the GELU output for it"
            )
        self.check(x)
        rows = x.reshape(-1, self.in_features)  # (M, K)
        output = self.product(*self.rounded(rows))  # (M, N)
        return output.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def quantize(
        self, x: torch.Tensor, pad_size: int = ROWS
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Do what the quantizing kernel does, with its signature and in its layouts.

        The kernel never shifts: an unsigned layer's activation is quantized by the one before it.

        Args:
            x: (M, K).
            pad_size: Rows are padded with zeros to a multiple of it, which must be 256.

        Returns:
            quantized: (M up to whole blocks, K/2) uint8 packed; where nothing is rounded to int4,
                (…, K) float32: what the residual is multiplied with.
            ascales: (K/64, M up to whole blocks) packed, dtype of `x`; ones where nothing is
                rounded to int4.
            lora_act: (M up to whole blocks, R) float32 packed.

        Raises:
            KernelContractError: See `check`; also for another `pad_size`.
        """
        if pad_size != ROWS:
            raise KernelContractError(f"`pad_size` must be {ROWS}, got: {pad_size}")
        self.check(x)
        rows = activation.padded(x)  # (M up to whole blocks, K)
        down = pack.unpack_lowrank(self.proj_down, LowRankSide.DOWN)
        low_rank = activation.pack_low_rank_activation(rows.float() @ down.float().T)
        smoothed = rows / pack.unpack_vector(self.smooth_factor)
        groups = (self.in_features // GROUP_SIZE, len(rows))
        if self.precision is not Precision.W4A4:
            return self.rounded(rows)[0], x.new_ones(groups), low_rank
        values, scales = quantize_activation(smoothed, IntegerRange.SIGNED)
        return activation.pack_activation(values), activation.pack_scales(scales), low_rank

    def forward_quant(
        self,
        quantized_x: torch.Tensor,
        ascales: torch.Tensor,
        lora_act: torch.Tensor,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Do what the GEMM kernel does, with its signature and in its layouts.

        Args:
            quantized_x: As `quantize` gives it; without a sign where the layer is unsigned.
            ascales: As `quantize` gives them.
            lora_act: (M up to whole blocks, R) float32 packed.
            output: (M, N), written; of all rows where None.

        Returns:
            (M, N), dtype of the layer.

        Raises:
            KernelContractError: A tensor breaks the kernel's contract.
        """
        check_quantized(self, quantized_x, ascales, lora_act)
        values = quantized_x
        if self.precision is Precision.W4A4:
            codes = activation.unpack_activation(quantized_x).to(torch.int8)
            signed = codes if self.act_unsigned else torch.where(codes > 7, codes - 16, codes)
            values = dequantize(signed, activation.unpack_scales(ascales))
        product = self.product(values, activation.unpack_low_rank_activation(lora_act))
        if output is None:
            return product.to(self.proj_up.dtype)
        return output.copy_(product[: len(output)])

    def extra_repr(self) -> str:
        """Name the sizes that tell two layers apart."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, precision={self.precision.value}, "
            f"act_unsigned={self.act_unsigned}"
        )

    def _store_residual(self, residual: torch.Tensor) -> None:
        if self._exact:
            self.qweight.copy_(residual)
            return
        if self._fp4 and self.wcscales is not None:
            packed = nvfp4.packed_weight(residual, self.wcscales.dtype)
            self.qweight.copy_(packed.qweight)
            self.wscales.copy_(packed.wscales)
            self.wcscales.copy_(packed.wcscales)
            self.wtscale = packed.wtscale
            return
        values, scales = quantize_weight(residual, self.wscales.dtype)
        self.qweight.copy_(pack.pack_svdq_qweight(values))
        self.wscales.copy_(pack.pack_svdq_wscales(scales))
