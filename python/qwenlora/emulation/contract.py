"""Checks of what Nunchaku's kernels take for granted, or check only by aborting the process."""

from __future__ import annotations

from typing import Protocol

import torch

from qwenlora.emulation.precision import Precision
from qwenlora.errors import QwenLoraError
from qwenlora.packing.activation import GROUP, ROWS
from qwenlora.packing.layout import MAX_RANK, RANK_MULTIPLE

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Activation types of the emulation; the real kernels take the last two only."""

MAX_AWQ_ROWS = 8
"""The AWQ kernel handles at most this many rows of activations."""


class KernelContractError(QwenLoraError, ValueError):
    """A tensor breaks what the kernels take for granted.

    Raised by the stand-in layers at each forward, before any arithmetic: a rank that is not a
    multiple of 16 or lies outside 16..1024, `proj_down` and `proj_up` of different rank, a shape
    that does not fit the layer's features, a dtype or device other than the activation's, a
    non-contiguous tensor, too many rows for an AWQ layer, a layer called by itself that only runs
    fused. On a GPU the real kernels read garbage or abort the process in these cases.
    """


class Multiplying(Protocol):
    """What checks ask of a layer that multiplies quantized activations."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def out_features(self) -> int:
        """N."""

    @property
    def precision(self) -> Precision:
        """See `Precision`."""

    @property
    def proj_up(self) -> torch.Tensor:
        """(N, R) packed."""


def check_low_rank(proj_down: torch.Tensor, proj_up: torch.Tensor) -> None:
    """Check the common rank of a packed low-rank branch.

    Args:
        proj_down: (in_features, R) packed.
        proj_up: (out_features, R) packed.

    Raises:
        KernelContractError: The ranks differ or the kernels cannot take them.
    """
    for name, tensor in (("proj_down", proj_down), ("proj_up", proj_up)):
        if tensor.ndim != 2:
            raise KernelContractError(
                f"`{name}` must have 2 axes, got shape: {tuple(tensor.shape)}"
            )
    rank = proj_down.shape[1]
    if rank != proj_up.shape[1]:
        raise KernelContractError(
            f"`proj_down` and `proj_up` must have one rank, got: {rank} and {proj_up.shape[1]}"
        )
    check_rank(rank)


def check_rank(rank: int) -> None:
    """Check that the kernels can take `rank`.

    Raises:
        KernelContractError: It is not a multiple of 16 in 16..1024.
    """
    if rank % RANK_MULTIPLE or not RANK_MULTIPLE <= rank <= MAX_RANK:
        raise KernelContractError(
            f"rank must be a multiple of {RANK_MULTIPLE} "
            f"between {RANK_MULTIPLE} and {MAX_RANK}, got: {rank}"
        )


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: torch.Tensor
) -> None:
    """Check one tensor of a layer against the activation that it will meet.

    Args:
        name: Parameter name, for the message.
        tensor: The parameter.
        shape: The shape that the layer's features ask for.
        dtype: The dtype that the kernel will read it as.
        x: The activation; its device is the one that counts.

    Raises:
        KernelContractError: The tensor does not fit.
    """
    if tuple(tensor.shape) != shape:
        raise KernelContractError(f"`{name}` must have shape {shape}, got: {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise KernelContractError(f"`{name}` must be {dtype}, got: {tensor.dtype}")
    if tensor.device != x.device:
        raise KernelContractError(f"`{name}` must be on {x.device}, got: {tensor.device}")
    if not tensor.is_contiguous():
        raise KernelContractError(f"`{name}` must be contiguous, got strides: {tensor.stride()}")


def check_activation(x: torch.Tensor, in_features: int) -> None:
    """Check the last axis and the dtype of an activation.

    Raises:
        KernelContractError: It does not fit the layer.
    """
    if x.shape[-1] != in_features:
        raise KernelContractError(
            f"activation must have {in_features} channels, got shape: {tuple(x.shape)}"
        )
    if x.dtype not in ACTIVATION_DTYPES:
        raise KernelContractError(f"activation must be a 16- or 32-bit float, got: {x.dtype}")


def check_quantized(
    layer: Multiplying, values: torch.Tensor, scales: torch.Tensor, low_rank: torch.Tensor
) -> None:
    """Check what the GEMM kernel takes from the quantizing kernel.

    Args:
        layer: The layer that multiplies.
        values: (M, K/2) uint8, M of whole blocks; (M, K) float32 where nothing is rounded to int4.
        scales: (K/64, M) of the layer's dtype.
        low_rank: (M, R) float32.

    Raises:
        KernelContractError: A tensor does not fit, or M is no multiple of 256.
    """
    rows, columns, rank = len(values), layer.in_features, layer.proj_up.shape[1]
    if rows % ROWS:
        raise KernelContractError(f"rows must be a multiple of {ROWS}, got: {rows}")
    is_packed = layer.precision is Precision.W4A4
    shape = (rows, columns // 2 if is_packed else columns)
    check_tensor("act", values, shape, torch.uint8 if is_packed else torch.float32, values)
    check_tensor("ascales", scales, (columns // GROUP, rows), layer.proj_up.dtype, values)
    check_tensor("lora_act_in", low_rank, (rows, rank), torch.float32, values)
    check_tensor("lora_up", layer.proj_up, (layer.out_features, rank), scales.dtype, values)
