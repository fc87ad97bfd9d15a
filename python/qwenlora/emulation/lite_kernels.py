"""Kernels of diffusers' own 4-bit layers and of Nunchaku's, in PyTorch: the same calls, on a CPU.

Each function takes the arguments of the kernel of its name, writes to the same outputs, and checks
what the kernel takes for granted. What a quantized activation looks like in memory is its own: no
layer looks into one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.emulation.contract import (
    MAX_AWQ_ROWS,
    KernelContractError,
    check_activation,
    check_low_rank,
    check_tensor,
)
from qwenlora.emulation.fused_qkv import HEAD_DIM, norm_and_rotate
from qwenlora.emulation.precision import Precision
from qwenlora.emulation.quantize import (
    GROUP_SIZE,
    IntegerRange,
    dequantize,
    quantize_activation,
)
from qwenlora.packing import pack
from qwenlora.packing.layout import RANK_MULTIPLE, LowRankSide
from qwenlora.packing.rotation import unpack_rotations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["LiteKernels"]

_RAW = "_qwenlora_raw"
"""Attribute of a quantized activation that holds it unrounded, in `EXACT` precision."""


class LiteKernels:
    """The kernels that `SVDQW4A4Linear` and `AWQW4A16Linear` call, diffusers' and Nunchaku's.

    Attributes:
        precision: `W4A4` rounds as the kernels do. `EXACT` rounds nothing: weights are float32, and
            activations go past their quantized form.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision

    def quantize_w4a4_act_fuse_lora(
        self,
        x: Tensor,
        quantized: Tensor,
        ascales: Tensor,
        lora_down: Tensor,
        lora_act: Tensor,
        smooth: Tensor,
        fuse_glu: bool,
        fp4: bool,
    ) -> None:
        """Quantize an activation, and multiply it by `down`.

        Args:
            x: (M, K).
            quantized: (M up to a multiple of 256, K/2) uint8, written.
            ascales: (K/64, same rows), written.
            lora_down: (K, R) packed.
            lora_act: (same rows, R) float32, written.
            smooth: (K,) in packed vector order.
            fuse_glu: False.
            fp4: False: nvfp4 is not emulated.

        Raises:
            KernelContractError: The kernel would read or write past an end, or abort.
        """
        if fuse_glu or fp4:
            raise KernelContractError("int4 without a fused GLU is what is emulated")
        rows, channels = x.shape
        check_activation(x, channels)
        check_tensor("lora_down", lora_down, (channels, lora_act.shape[1]), x.dtype, x)
        check_tensor("smooth", smooth, (channels,), x.dtype, x)
        if quantized.shape != (lora_act.shape[0], channels // 2) or quantized.shape[0] < rows:
            raise KernelContractError(f"no room for {rows} rows in {tuple(quantized.shape)}")
        down = pack.unpack_lowrank(lora_down, LowRankSide.DOWN)  # (R, K)
        lora_act[:rows] = x.float() @ down.float().T
        divisors = pack.unpack_vector(smooth)  # (K,)
        if self.precision is Precision.EXACT:
            setattr(quantized, _RAW, x.float() / divisors.float())
            return
        values, scales = quantize_activation(x / divisors, IntegerRange.SIGNED)
        ascales[:, :rows] = scales.T
        quantized[:rows] = _pairs(values)

    def gemm_w4a4(
        self,
        act: Tensor,
        wgt: Tensor,
        out: Tensor,
        qout: None,
        ascales: Tensor,
        wscales: Tensor,
        oscales: None,
        poolout: None,
        lora_act_in: Tensor,
        lora_up: Tensor,
        *rest: object,
    ) -> None:
        """Multiply a quantized activation by a weight, and add the low-rank branch and the bias.

        Args:
            act: What `quantize_w4a4_act_fuse_lora` wrote.
            wgt: (N, K/2) int8 packed; in `EXACT` (N, K) float32.
            out: (M, N), written.
            qout: None.
            ascales: (K/64, padded M).
            wscales: (K/64, N) packed.
            oscales: None.
            poolout: None.
            lora_act_in: (padded M, R) float32.
            lora_up: (N, R) packed.
            rest: The kernel's other arguments; of them `bias` (N,) in packed vector order or None,
                `act_unsigned` False, and `lora_scales`, one for every 16 ranks, are used. With
                `rotary_emb` (B, S, 128) float32 packed, B * S the padded M, it takes `norm_q` and
                `norm_k`, (128,) each, too: see `norm_and_rotate`.

        Raises:
            KernelContractError: The kernel would read past an end, pass over ranks, or abort.
        """
        bias, act_unsigned, scales = rest[5], rest[9], rest[10]
        if qout is not None or oscales is not None or poolout is not None or act_unsigned:
            raise KernelContractError("a plain signed product is what is emulated")
        rows, outputs = out.shape
        rank = lora_act_in.shape[1]
        check_low_rank(lora_up.new_empty((0, rank)), lora_up)
        check_tensor("lora_up", lora_up, (outputs, rank), out.dtype, out)
        _check_scales(scales, rank)
        up = pack.unpack_lowrank(lora_up, LowRankSide.UP)  # (N, R)
        if self.precision is Precision.EXACT:
            activation: Tensor = getattr(act, _RAW)
            product = activation @ wgt.T
            low_rank = lora_act_in[:rows]
        else:
            weight = dequantize(pack.unpack_svdq_qweight(wgt), pack.unpack_svdq_wscales(wscales))
            product = dequantize(_values(act[:rows]), ascales[:, :rows].T) @ weight.T
            # The kernel feeds 16-bit values to its second low-rank product.
            low_rank = lora_act_in[:rows].to(up.dtype)
        if isinstance(bias, torch.Tensor):
            check_tensor("bias", bias, (outputs,), out.dtype, out)
            product = product + pack.unpack_vector(bias).float()
        product = product + low_rank.float() @ up.float().T
        rotary = rest[4]
        if isinstance(rotary, torch.Tensor):
            product = self._rotated(product, out, act.shape[0], rest[2], rest[3], rotary)
        out.copy_(product)

    def _rotated(
        self,
        product: Tensor,
        out: Tensor,
        rows_padded: int,
        norm_q: object,
        norm_k: object,
        rotary: Tensor,
    ) -> Tensor:
        weights = _norm_weight("norm_q", norm_q, out), _norm_weight("norm_k", norm_k, out)
        tokens = rotary.shape[:-1].numel()
        check_tensor("rotary_emb", rotary, (*rotary.shape[:2], HEAD_DIM), torch.float32, out)
        if tokens != rows_padded:
            raise KernelContractError(
                f"`rotary_emb` must be of {rows_padded} tokens, got shape: {tuple(rotary.shape)}"
            )
        if self.precision is not Precision.EXACT:
            # The kernel's epilogue reads 16-bit values.
            product = product.to(out.dtype)
        sine, cosine = unpack_rotations(rotary).flatten(0, 1)[: product.shape[0]].unbind(-1)
        rotation = torch.complex(cosine, sine)  # (M, 64)
        return norm_and_rotate(product, *weights, rotation)

    def gemv_awq(
        self,
        x: Tensor,
        qweight: Tensor,
        wscales: Tensor,
        wzeros: Tensor,
        rows: int,
        outputs: int,
        inputs: int,
        group_size: int,
    ) -> Tensor:
        """Multiply (M, K) of at most 8 rows by an AWQ weight: (M, N).

        Raises:
            KernelContractError: The numbers are not those of the tensors, or M is more than 8.
        """
        if x.shape != (rows, inputs) or not 1 <= rows <= MAX_AWQ_ROWS or group_size != GROUP_SIZE:
            raise KernelContractError(
                f"an activation of {tuple(x.shape)} is no ({rows}, {inputs}) of up to"
                f" {MAX_AWQ_ROWS} rows in groups of {GROUP_SIZE}"
            )
        product = self.awq_gemm_w4a16_g64_int32(x, qweight, wscales, wzeros)
        if product.shape != (rows, outputs):
            raise KernelContractError(f"the weight gives {tuple(product.shape)}, not {outputs}")
        return product

    def awq_gemm_w4a16_g64_int32(
        self, x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor
    ) -> Tensor:
        """Multiply (M, K) by an AWQ weight: (M, N), rows as stored."""
        if self.precision is Precision.EXACT:
            return (x.float() @ qweight.T).to(x.dtype)
        weight = dequantize(pack.unpack_awq_qweight(qweight), wscales.T, wzeros.T)
        return (x.float() @ weight.T).to(x.dtype)


def _norm_weight(name: str, weight: object, out: Tensor) -> Tensor:
    if not isinstance(weight, torch.Tensor):
        raise KernelContractError(f"`{name}` must be there where rotations are")
    check_tensor(name, weight, (HEAD_DIM,), out.dtype, out)
    return weight


def _check_scales(scales: object, rank: int) -> None:
    """A scale that is missing is 0 to the kernel, without a word."""
    if not isinstance(scales, list) or len(scales) != -(-rank // RANK_MULTIPLE):
        raise KernelContractError(f"{scales!r:.60} holds no scale for each 16 of {rank} ranks")
    if any(scale != 1.0 for scale in scales):
        raise KernelContractError("scales of 1 are what is emulated")


def _pairs(values: Tensor) -> Tensor:
    """Two 4-bit values in a byte: (M, K) int8 -> (M, K/2) uint8."""
    low, high = values[:, 0::2].to(torch.int16) & 15, values[:, 1::2].to(torch.int16) & 15
    return (low | high << 4).to(torch.uint8)


def _values(pairs: Tensor) -> Tensor:
    """The inverse: (M, K/2) uint8 -> (M, K) int8."""
    wide = pairs.to(torch.int16)
    halves: Sequence[Tensor] = (wide & 15, wide >> 4)
    signed = torch.stack([(half ^ 8) - 8 for half in halves], dim=-1)  # (M, K/2, 2)
    return signed.flatten(1).to(torch.int8)
