"""Packed layouts as pure functions of tensors: every element moves, no element changes.

Packed memory is ordered for the tensor-core fragments of Nunchaku's kernels; `docs/layout.md` draws
it. The low-rank, vector and row-order functions take elements of 1, 2 or 4 bytes on any device.
No function writes to its argument or returns memory shared with it, unless it says so.

Axis names: `n` is an output channel and `k` an input channel of the instruction's B operand, and a
suffix gives the size of the axis (`n8` has 8 entries). Comments list axes outermost first.
"""

from __future__ import annotations

import torch

from qwenlora.packing.layout import MODULATION_PLANES, RANK_MULTIPLE, TILE, LowRankSide, round_up

__all__ = [
    "deinterleave_modulation",
    "interleave_modulation",
    "pack_awq_qweight",
    "pack_lowrank",
    "pack_svdq_micro_scales",
    "pack_svdq_qweight",
    "pack_svdq_wscales",
    "pack_vector",
    "unpack_awq_qweight",
    "unpack_lowrank",
    "unpack_svdq_micro_scales",
    "unpack_svdq_qweight",
    "unpack_svdq_wscales",
    "unpack_vector",
]


_SVDQ_ROWS = 128
_GROUP = 64
_AWQ_ROWS = 4
_MICRO_GROUPS = 4
"""Groups of 16 channels whose scales are neighbours."""


def pack_lowrank(logical: torch.Tensor, side: LowRankSide) -> torch.Tensor:
    """Pack one low-rank factor into 16x16 fragments.

    Args:
        logical: (rank, channels) for `DOWN`, (channels, rank) for `UP`; channels a multiple of 16.
        side: Which factor it is.

    Returns:
        (channels, R) contiguous, same dtype and device, R = rank padded with zeros to a multiple
        of 16. The shape is nominal: memory is (channels/16, R/16, 256).

    Raises:
        ValueError: The tensor is not 2-D or its channels are not a multiple of 16.
    """
    _require_axes("logical", logical, 2)
    rank_axis = 0 if side is LowRankSide.DOWN else 1
    rank, channels = logical.shape[rank_axis], logical.shape[1 - rank_axis]
    _require_multiple("channels", channels, TILE, logical)
    rank_padded = round_up(rank, RANK_MULTIPLE)
    if rank_padded != rank:
        logical = _pad_rank(logical, rank_axis, rank_padded)
    if side is LowRankSide.DOWN:
        # (R, C) -> (R/16, n2, n8, C/16, k2, k4, k_pair)
        split = logical.reshape(rank_padded // TILE, 2, 8, channels // TILE, 2, 4, 2)
        # (R/16, n2, n8, C/16, k2, k4, k_pair) => (C/16, R/16, n8, k4, n2, k2, k_pair)
        fragments = split.permute(3, 0, 2, 5, 1, 4, 6)
    else:
        # (C, R) -> (C/16, n2, n8, R/16, k2, k4, k_pair)
        split = logical.reshape(channels // TILE, 2, 8, rank_padded // TILE, 2, 4, 2)
        # (C/16, n2, n8, R/16, k2, k4, k_pair) => (C/16, R/16, n8, k4, n2, k2, k_pair)
        fragments = split.permute(0, 3, 2, 5, 1, 4, 6)
    return _copied(fragments).view(channels, rank_padded)


def unpack_lowrank(packed: torch.Tensor, side: LowRankSide) -> torch.Tensor:
    """Undo `pack_lowrank`; the zero padding of the rank stays.

    Args:
        packed: (channels, R), both multiples of 16.
        side: Which factor it is.

    Returns:
        (R, channels) for `DOWN`, (channels, R) for `UP`, contiguous.

    Raises:
        ValueError: The tensor is not 2-D or a side is not a multiple of 16.
    """
    _require_axes("packed", packed, 2)
    channels, rank = packed.shape
    _require_multiple("channels", channels, TILE, packed)
    _require_multiple("rank", rank, RANK_MULTIPLE, packed)
    fragments = packed.reshape(channels // TILE, rank // TILE, 8, 4, 2, 2, 2)
    if side is LowRankSide.DOWN:
        # (C/16, R/16, n8, k4, n2, k2, k_pair) => (R/16, n2, n8, C/16, k2, k4, k_pair)
        return _copied(fragments.permute(1, 4, 2, 0, 5, 3, 6)).view(rank, channels)
    # (C/16, R/16, n8, k4, n2, k2, k_pair) => (C/16, n2, n8, R/16, k2, k4, k_pair)
    return _copied(fragments.permute(0, 4, 2, 1, 5, 3, 6)).view(channels, rank)


def pack_vector(logical: torch.Tensor) -> torch.Tensor:
    """Pack a per-channel vector of an SVDQ layer: bias, smooth factor, channel scale.

    Args:
        logical: (channels,), a multiple of 16.

    Returns:
        (channels,), same dtype and device.

    Raises:
        ValueError: The tensor is not 1-D or its length is not a multiple of 16.
    """
    _require_axes("logical", logical, 1)
    _require_multiple("channels", logical.shape[0], TILE, logical)
    # (C/16, n2, n4, n_pair) => (C/16, n4, n2, n_pair)
    return _copied(logical.reshape(logical.shape[0] // TILE, 2, 4, 2).permute(0, 2, 1, 3)).view(-1)


def unpack_vector(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_vector`.

    Args:
        packed: (channels,), a multiple of 16.

    Returns:
        (channels,) in logical order.

    Raises:
        ValueError: The tensor is not 1-D or its length is not a multiple of 16.
    """
    _require_axes("packed", packed, 1)
    _require_multiple("channels", packed.shape[0], TILE, packed)
    # (C/16, n4, n2, n_pair) => (C/16, n2, n4, n_pair)
    return _copied(packed.reshape(packed.shape[0] // TILE, 4, 2, 2).permute(0, 2, 1, 3)).view(-1)


def pack_svdq_qweight(values: torch.Tensor) -> torch.Tensor:
    """Pack the signed 4-bit weight of an SVDQ layer.

    Args:
        values: (N, K) int8 in [-8, 7]; N a multiple of 128, K of 64.

    Returns:
        (N, K/2) int8: two values per byte, in the order of the kernels' weight tiles.

    Raises:
        ValueError: The dtype, a size or a value does not fit.
    """
    _require_integers(values, torch.int8, -8, 7)
    rows, columns = values.shape
    _require_multiple("rows", rows, _SVDQ_ROWS, values)
    _require_multiple("columns", columns, _GROUP, values)
    split = values.reshape(rows // _SVDQ_ROWS, 8, 2, 8, columns // _GROUP, 2, 4, 8)
    # (N/128, n16, n2, n8, K/64, k2, k4, k8) => (N/128, K/64, n16, n8, k4, n2, k2, k8)
    nibbles = split.permute(0, 4, 1, 3, 6, 2, 5, 7)
    return _join_nibbles(nibbles).view(torch.int8).view(rows, columns // 2)


def unpack_svdq_qweight(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_svdq_qweight`.

    Args:
        packed: (N, K/2) int8; N a multiple of 128, K of 64.

    Returns:
        (N, K) int8 in [-8, 7].

    Raises:
        ValueError: The dtype or a size does not fit.
    """
    _require_dtype("packed", packed, torch.int8)
    _require_axes("packed", packed, 2)
    rows, columns = packed.shape[0], packed.shape[1] * 2
    _require_multiple("rows", rows, _SVDQ_ROWS, packed)
    _require_multiple("columns", columns, _GROUP, packed)
    nibbles = _split_nibbles(packed.contiguous().view(torch.uint8))
    tiles = nibbles.view(rows // _SVDQ_ROWS, columns // _GROUP, 8, 8, 4, 2, 2, 8)
    # (N/128, K/64, n16, n8, k4, n2, k2, k8) => (N/128, n16, n2, n8, K/64, k2, k4, k8)
    values = tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, columns)
    # Two's complement of four bits: flipping the sign bit and subtracting its weight.
    return (values ^ 8).view(torch.int8) - 8


def pack_svdq_wscales(scales: torch.Tensor) -> torch.Tensor:
    """Pack the group scales of an SVDQ layer's signed 4-bit weight.

    Args:
        scales: (N, K/64): output channel, then group; N a multiple of 128.

    Returns:
        (K/64, N). The shape is nominal: memory is (N/128, K/64, 128).

    Raises:
        ValueError: The tensor is not 2-D or N is not a multiple of 128.
    """
    _require_axes("scales", scales, 2)
    rows, groups = scales.shape
    _require_multiple("rows", rows, _SVDQ_ROWS, scales)
    split = scales.reshape(rows // _SVDQ_ROWS, 8, 2, 4, 2, groups)
    # (N/128, n16, n2, n4, n_pair, K/64) => (N/128, K/64, n16, n4, n2, n_pair)
    return _copied(split.permute(0, 5, 1, 3, 2, 4)).view(groups, rows)


def unpack_svdq_wscales(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_svdq_wscales`.

    Args:
        packed: (K/64, N); N a multiple of 128.

    Returns:
        (N, K/64).

    Raises:
        ValueError: The tensor is not 2-D or N is not a multiple of 128.
    """
    _require_axes("packed", packed, 2)
    groups, rows = packed.shape
    _require_multiple("rows", rows, _SVDQ_ROWS, packed)
    tiles = packed.reshape(rows // _SVDQ_ROWS, groups, 8, 4, 2, 2)
    # (N/128, K/64, n16, n4, n2, n_pair) => (N/128, n16, n2, n4, n_pair, K/64)
    return _copied(tiles.permute(0, 2, 4, 3, 5, 1)).view(rows, groups)


def pack_svdq_micro_scales(scales: torch.Tensor) -> torch.Tensor:
    """Pack the group scales of an SVDQ layer's 4-bit floats.

    Args:
        scales: (N, K/16) of 1 byte each: output channel, then group; N a multiple of 128 and K/16
            of 4.

    Returns:
        (K/16, N). The shape is nominal: memory is (N/128, K/64, 512).

    Raises:
        ValueError: The tensor is not 2-D or a size does not fit.
    """
    _require_axes("scales", scales, 2)
    rows, groups = scales.shape
    _require_multiple("rows", rows, _SVDQ_ROWS, scales)
    _require_multiple("groups", groups, _MICRO_GROUPS, scales)
    split = scales.reshape(rows // _SVDQ_ROWS, 4, 4, 8, groups // _MICRO_GROUPS, _MICRO_GROUPS)
    # (N/128, n32, n4, n8, K/64, g4) => (N/128, K/64, n8, n4, n32, g4)
    return _copied(split.permute(0, 4, 3, 2, 1, 5)).view(groups, rows)


def unpack_svdq_micro_scales(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_svdq_micro_scales`.

    Args:
        packed: (K/16, N); N a multiple of 128 and K/16 of 4.

    Returns:
        (N, K/16).

    Raises:
        ValueError: The tensor is not 2-D or a size does not fit.
    """
    _require_axes("packed", packed, 2)
    groups, rows = packed.shape
    _require_multiple("rows", rows, _SVDQ_ROWS, packed)
    _require_multiple("groups", groups, _MICRO_GROUPS, packed)
    tiles = packed.reshape(rows // _SVDQ_ROWS, groups // _MICRO_GROUPS, 8, 4, 4, _MICRO_GROUPS)
    # (N/128, K/64, n8, n4, n32, g4) => (N/128, n32, n4, n8, K/64, g4)
    return _copied(tiles.permute(0, 4, 3, 2, 1, 5)).view(rows, groups)


def pack_awq_qweight(values: torch.Tensor) -> torch.Tensor:
    """Pack the unsigned 4-bit weight of an AWQ layer.

    Args:
        values: (N, K) uint8 in [0, 15]; N a multiple of 4, K of 64.

    Returns:
        (N/4, K/2) int32: eight values per word.

    Raises:
        ValueError: The dtype, a size or a value does not fit.
    """
    _require_integers(values, torch.uint8, 0, 15)
    rows, columns = values.shape
    _require_multiple("rows", rows, _AWQ_ROWS, values)
    _require_multiple("columns", columns, _GROUP, values)
    split = values.reshape(rows // _AWQ_ROWS, _AWQ_ROWS, columns // _GROUP, 2, 4, 8)
    # (N/4, n4, K/64, k2, k4, k8) => (N/4, K/64, n4, k2, k8, k4)
    nibbles = split.permute(0, 2, 1, 3, 5, 4)
    return _join_nibbles(nibbles).view(torch.int32).view(rows // _AWQ_ROWS, columns // 2)


def unpack_awq_qweight(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_awq_qweight`.

    Args:
        packed: (N/4, K/2) int32; K a multiple of 64.

    Returns:
        (N, K) uint8 in [0, 15].

    Raises:
        ValueError: The dtype or a size does not fit.
    """
    _require_dtype("packed", packed, torch.int32)
    _require_axes("packed", packed, 2)
    rows, columns = packed.shape[0] * _AWQ_ROWS, packed.shape[1] * 2
    _require_multiple("columns", columns, _GROUP, packed)
    nibbles = _split_nibbles(packed.contiguous().view(torch.uint8))
    tiles = nibbles.view(rows // _AWQ_ROWS, columns // _GROUP, _AWQ_ROWS, 2, 8, 4)
    # (N/4, K/64, n4, k2, k8, k4) => (N/4, n4, K/64, k2, k4, k8)
    return tiles.permute(0, 2, 1, 3, 5, 4).reshape(rows, columns)


def interleave_modulation(
    rows: torch.Tensor, *, planes: int = MODULATION_PLANES, dim: int = 0
) -> torch.Tensor:
    """Reorder modulation rows from plane order to the order of the quantized layer.

    Args:
        rows: Any tensor with planes*C entries along `dim`, entry j*C + c for plane j, channel c.
        planes: Number of planes.
        dim: The axis to reorder.

    Returns:
        Same shape, contiguous; that entry is now at c*planes + j.

    Raises:
        ValueError: The axis is not a multiple of `planes`.
    """
    axis = dim % rows.ndim
    _require_multiple(f"axis {dim}", rows.shape[axis], planes, rows)
    # (…, planes, C, …) => (…, C, planes, …)
    before, after = rows.shape[:axis], rows.shape[axis + 1 :]
    split = rows.reshape(*before, planes, rows.shape[axis] // planes, *after)
    return _copied(split.transpose(axis, axis + 1)).view(rows.shape)


def deinterleave_modulation(
    rows: torch.Tensor, *, planes: int = MODULATION_PLANES, dim: int = 0
) -> torch.Tensor:
    """Undo `interleave_modulation`.

    Args:
        rows: Any tensor with C*planes entries along `dim`, entry c*planes + j for plane j,
            channel c.
        planes: Number of planes.
        dim: The axis to reorder.

    Returns:
        Same shape, contiguous; that entry is now at j*C + c.

    Raises:
        ValueError: The axis is not a multiple of `planes`.
    """
    axis = dim % rows.ndim
    _require_multiple(f"axis {dim}", rows.shape[axis], planes, rows)
    # (…, C, planes, …) => (…, planes, C, …)
    before, after = rows.shape[:axis], rows.shape[axis + 1 :]
    split = rows.reshape(*before, rows.shape[axis] // planes, planes, *after)
    return _copied(split.transpose(axis, axis + 1)).view(rows.shape)


def _copied(permuted: torch.Tensor) -> torch.Tensor:
    # Neighbours of 16 bits move as one word, which is what limits a permutation on the CPU.
    if permuted.itemsize == 2 and permuted.shape[-1] == 2 and permuted.stride(-1) == 1:
        others = (*permuted.stride()[:-1], permuted.storage_offset())
        if all(step % 2 == 0 for step in others):
            words = permuted.view(torch.int32).clone(memory_format=torch.contiguous_format)
            return words.view(permuted.dtype)
    # `contiguous()` may hand back the argument's own storage when the permutation is trivial.
    return permuted.clone(memory_format=torch.contiguous_format)


def _pad_rank(logical: torch.Tensor, axis: int, rank_padded: int) -> torch.Tensor:
    shape = list(logical.shape)
    shape[axis] = rank_padded
    padded = logical.new_zeros(shape)
    padded.narrow(axis, 0, logical.shape[axis]).copy_(logical)
    return padded


def _join_nibbles(values: torch.Tensor) -> torch.Tensor:
    # (…, 2m) values of four bits -> (…, m) bytes, the even value in the low half: that is also
    # the order of nibbles in a little-endian word.
    pairs = values.reshape(-1, 2).view(torch.uint8)
    return (pairs[:, 0] & 15) | ((pairs[:, 1] & 15) << 4)


def _split_nibbles(words: torch.Tensor) -> torch.Tensor:
    # (…) bytes -> (…, 2) values, the low half first
    return torch.stack((words & 15, words >> 4), dim=-1)


def _require_axes(name: str, tensor: torch.Tensor, axes: int) -> None:
    if tensor.ndim != axes:
        raise ValueError(f"`{name}` must have {axes} axes, got shape: {tuple(tensor.shape)}")


def _require_multiple(name: str, size: int, multiple: int, tensor: torch.Tensor) -> None:
    if size % multiple:
        raise ValueError(
            f"{name} must be a multiple of {multiple}, got {size} in shape: {tuple(tensor.shape)}"
        )


def _require_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(
            f"`{name}` must be {dtype}, got {tensor.dtype} of shape: {tuple(tensor.shape)}"
        )


def _require_integers(values: torch.Tensor, dtype: torch.dtype, low: int, high: int) -> None:
    _require_dtype("values", values, dtype)
    _require_axes("values", values, 2)
    if values.numel() == 0:
        return
    least, greatest = int(values.min()), int(values.max())
    if least < low or greatest > high:
        raise ValueError(
            f"`values` must lie in [{low}, {high}], got [{least}, {greatest}] "
            f"in shape: {tuple(values.shape)}"
        )
