"""A quantized linear as the kernels take it, and the two kernels."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.layouts import GROUP, ROWS
from qwenlora import emulation
from qwenlora.packing import pack
from qwenlora.packing.layout import UNSIGNED_SHIFT, LowRankSide

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer, packed.

    Attributes:
        qweight: (N, K/2) int8.
        wscales: (K/64, N).
        bias: (N,).
        smooth: (K,).
        down: (K, R).
        up: (N, R).
        act_unsigned: Whether its activation is quantized without a sign, as behind GELU.
    """

    qweight: Tensor
    wscales: Tensor
    bias: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    act_unsigned: bool = False

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, *, rank: int, act_unsigned: bool = False) -> Layer:
        """Quantize a dense layer, (N, K) and (N,), with smooth factors that differ from 1."""
        generator = torch.Generator().manual_seed(weight.shape[1])
        smooth = torch.exp(0.4 * torch.randn(weight.shape[1], generator=generator))
        made = emulation.SVDQW4A4Linear.from_dense(
            weight,
            bias,
            rank=rank,
            precision=emulation.Precision.W4A4,
            dtype=DTYPE,
            act_unsigned=act_unsigned,
            smooth=smooth.to(weight.device),
        )
        own: list[Any] = [made.qweight, made.wscales, made.bias, made.smooth_factor]
        own += [made.proj_down, made.proj_up]
        return cls(*(tensor.detach() for tensor in own), act_unsigned=act_unsigned)

    @property
    def outputs(self) -> int:
        """N."""
        return self.qweight.shape[0]

    @property
    def inputs(self) -> int:
        """K."""
        return 2 * self.qweight.shape[1]

    def rows(self, begin: int, end: int) -> Layer:
        """The layer of some output rows, multiples of 128: views of the same memory."""
        tiles = self.wscales.view(-1, self.inputs // GROUP, 128)[begin // 128 : end // 128]
        return replace(
            self,
            qweight=self.qweight[begin:end],
            wscales=tiles.view(self.inputs // GROUP, end - begin),
            bias=self.bias[begin:end],
            up=self.up[begin:end],
        )

    def with_ranks(self, down: Tensor, up: Tensor) -> Layer:
        """The layer with more ranks: logical (r, K) and (N, r)."""
        downs = torch.cat([pack.unpack_lowrank(self.down, LowRankSide.DOWN), down])
        ups = torch.cat([pack.unpack_lowrank(self.up, LowRankSide.UP), up], dim=1)
        return replace(
            self,
            down=pack.pack_lowrank(downs, LowRankSide.DOWN),
            up=pack.pack_lowrank(ups, LowRankSide.UP),
        )

    def residual(self) -> Tensor:
        """The weight without its low-rank part, for the raw activation: (N, K) float64."""
        values, scales = (
            pack.unpack_svdq_qweight(self.qweight),
            pack.unpack_svdq_wscales(self.wscales),
        )
        grouped = values.double().view(self.outputs, -1, GROUP) * scales.double()[..., None]
        return grouped.flatten(1) / pack.unpack_vector(self.smooth).double()

    def dense(self) -> tuple[Tensor, Tensor]:
        """The weight (N, K) and the bias (N,) that the layer stands for, float64."""
        residual = self.residual()
        down = pack.unpack_lowrank(self.down, LowRankSide.DOWN).double()
        up = pack.unpack_lowrank(self.up, LowRankSide.UP).double()
        bias = pack.unpack_vector(self.bias).double()
        if self.act_unsigned:
            bias = bias + UNSIGNED_SHIFT * residual.sum(dim=1)
        return residual + up @ down, bias


@dataclass(frozen=True)
class Quantized:
    """An activation as the kernels hand it on, M up to whole blocks.

    Attributes:
        values: (M, K/2) uint8.
        scales: (K/64, M).
        low_rank: (M, R) float32, the activation times `down`.
    """

    values: Tensor
    scales: Tensor
    low_rank: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, rank: int, device: torch.device) -> Quantized:
        """Room for (rows, columns)."""
        rows += -rows % ROWS
        return cls(
            torch.empty(rows, columns // 2, dtype=torch.uint8, device=device),
            torch.empty(columns // GROUP, rows, dtype=DTYPE, device=device),
            torch.empty(rows, rank, dtype=torch.float32, device=device),
        )


class Kernels:
    """Nunchaku's two kernels.

    Raises:
        ImportError: Nunchaku's extension is not installed.
    """

    def __init__(self) -> None:
        self._native: Any = importlib.import_module("nunchaku._C").ops

    def quantize(self, x: Tensor, layer: Layer) -> Quantized:
        """Smooth and quantize (M, K), and multiply it by `down`."""
        out = Quantized.empty(x.shape[0], x.shape[1], layer.down.shape[1], x.device)
        self._native.quantize_w4a4_act_fuse_lora(
            *(x, out.values, out.scales, layer.down, out.low_rank, layer.smooth, False, False)
        )
        return out

    def multiply(
        self,
        x: Quantized,
        layer: Layer,
        *,
        out: Tensor | None = None,
        following: Layer | None = None,
        into: Quantized | None = None,
        wcscales: Tensor | None = None,
    ) -> None:
        """Run the product.

        Args:
            x: What it multiplies.
            layer: By what.
            out: (M, N), written; with `into` it is behind GELU.
            following: The layer behind GELU, whose `smooth` and `down` apply to the output.
            into: The output behind GELU, quantized without a sign, written.
            wcscales: (N,) packed.
        """
        none = [None] * 3
        quantized = (
            (None, None, None) if into is None else (into.values, into.scales, into.low_rank)
        )
        after = (None, None) if following is None else (following.down, following.smooth)
        scales = [1.0] * (layer.up.shape[1] // 16)
        self._native.gemm_w4a4(
            *(x.values, layer.qweight, out, quantized[0], x.scales, layer.wscales, quantized[1]),
            *(None, x.low_rank, layer.up, after[0], quantized[2], *none, layer.bias, after[1]),
            *(None, None, layer.act_unsigned, scales, False, False, 1.0, wcscales, *none, 0),
        )

    def output(self, x: Quantized, layer: Layer, rows: int, **more: Any) -> Tensor:
        """The product: (rows, N)."""
        out = torch.empty(rows, layer.outputs, dtype=DTYPE, device=x.values.device)
        self.multiply(x, layer, out=out, **more)
        return out
