"""The formulas of this package, written one element at a time: documentation and test oracle.

Nothing here is fast. Every function restates the storage formula of one layout, or the arithmetic
of one step in float64, so that it can be read next to the vectorised code and compared with it.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch

from qwenlora.packing.layout import (
    FRAGMENT,
    MODULATION_PLANES,
    RANK_MULTIPLE,
    LowRankSide,
    round_up,
)


class LowRankPart(NamedTuple):
    """One member of a fused layer: `scale * up @ down`, added to some of the output rows."""

    down: torch.Tensor
    """(rank, in_features)."""

    up: torch.Tensor
    """(rows, rank)."""

    row_begin: int
    """First output row of the fused layer that this part writes."""

    scale: float


# ---- low-rank fragments ----


def lowrank_position(rank: int, channel: int, rank_padded: int, side: LowRankSide) -> int:
    """Return the packed position of logical element (`rank`, `channel`)."""
    fragment = (channel // 16) * (rank_padded // 16) + rank // 16
    if side is LowRankSide.DOWN:
        n, k = rank % 16, channel % 16
    else:
        n, k = channel % 16, rank % 16
    within = (n % 8) * 32 + ((k % 8) // 2) * 8 + (n // 8) * 4 + (k // 8) * 2 + k % 2
    return fragment * FRAGMENT + within


def pack_lowrank(logical: torch.Tensor, side: LowRankSide) -> torch.Tensor:
    """Pack (rank, C) or (C, rank) into (C, R), R padded with zeros to a multiple of 16."""
    by_rank = logical if side is LowRankSide.DOWN else logical.T  # (rank, C)
    ranks, channels = by_rank.shape
    rank_padded = round_up(ranks, RANK_MULTIPLE)
    flat = torch.zeros(channels * rank_padded, dtype=logical.dtype)
    for rank in range(ranks):
        for channel in range(channels):
            flat[lowrank_position(rank, channel, rank_padded, side)] = by_rank[rank, channel]
    return flat.view(channels, rank_padded)


def unpack_lowrank(packed: torch.Tensor, side: LowRankSide) -> torch.Tensor:
    """Unpack (C, R) into (R, C) or (C, R)."""
    channels, ranks = packed.shape
    flat = packed.reshape(-1)
    by_rank = torch.zeros(ranks, channels, dtype=packed.dtype)
    for rank in range(ranks):
        for channel in range(channels):
            by_rank[rank, channel] = flat[lowrank_position(rank, channel, ranks, side)]
    return by_rank if side is LowRankSide.DOWN else by_rank.T.contiguous()


# ---- per-channel vectors ----


def vector_position(channel: int) -> int:
    """Return the packed position of one channel of a bias, smooth factor or channel scale."""
    tile, n = channel // 16, channel % 16
    return tile * 16 + ((n % 8) // 2) * 4 + (n // 8) * 2 + n % 2


def pack_vector(logical: torch.Tensor) -> torch.Tensor:
    """Pack (C,) into (C,)."""
    packed = torch.zeros_like(logical)
    for channel in range(logical.shape[0]):
        packed[vector_position(channel)] = logical[channel]
    return packed


def unpack_vector(packed: torch.Tensor) -> torch.Tensor:
    """Unpack (C,) into (C,)."""
    logical = torch.zeros_like(packed)
    for channel in range(packed.shape[0]):
        logical[channel] = packed[vector_position(channel)]
    return logical


# ---- SVDQ weight and scales ----


def svdq_qweight_position(n: int, k: int, columns: int) -> tuple[int, int]:
    """Return the 32-bit word and the nibble in it that hold element (`n`, `k`)."""
    tile = (n // 128) * (columns // 64) + k // 64
    lane = ((tile * 8 + (n % 128) // 16) * 8 + n % 8) * 4 + (k % 32) // 8
    return lane * 4 + ((n % 16) // 8) * 2 + (k % 64) // 32, k % 8


def pack_svdq_qweight(values: torch.Tensor) -> torch.Tensor:
    """Pack (N, K) integers in [-8, 7] into (N, K/2) int8."""
    rows, columns = values.shape
    data = bytearray(rows * columns // 2)
    for n, row in enumerate(values.tolist()):
        for k, value in enumerate(row):
            word, nibble = svdq_qweight_position(n, k, columns)
            data[word * 4 + nibble // 2] |= (value & 15) << (4 * (nibble % 2))
    return torch.frombuffer(data, dtype=torch.int8).view(rows, columns // 2)


def unpack_svdq_qweight(packed: torch.Tensor) -> torch.Tensor:
    """Unpack (N, K/2) int8 into (N, K) int8 in [-8, 7]."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    data = packed.reshape(-1).tolist()
    values = torch.zeros(rows, columns, dtype=torch.int8)
    for n in range(rows):
        for k in range(columns):
            word, nibble = svdq_qweight_position(n, k, columns)
            bits = (data[word * 4 + nibble // 2] >> (4 * (nibble % 2))) & 15
            values[n, k] = bits - 16 if bits > 7 else bits
    return values


def svdq_wscales_position(n: int, group: int, groups: int) -> int:
    """Return the packed position of the scale of output channel `n` and input group `group`."""
    tile = ((n // 128) * groups + group) * 128
    return tile + ((n % 128) // 16) * 16 + ((n % 8) // 2) * 4 + ((n % 16) // 8) * 2 + n % 2


def pack_svdq_wscales(scales: torch.Tensor) -> torch.Tensor:
    """Pack (N, K/64) into the nominal shape (K/64, N)."""
    rows, groups = scales.shape
    flat = torch.zeros(rows * groups, dtype=scales.dtype)
    for n in range(rows):
        for group in range(groups):
            flat[svdq_wscales_position(n, group, groups)] = scales[n, group]
    return flat.view(groups, rows)


def unpack_svdq_wscales(packed: torch.Tensor) -> torch.Tensor:
    """Unpack the nominal shape (K/64, N) into (N, K/64)."""
    groups, rows = packed.shape
    flat = packed.reshape(-1)
    scales = torch.zeros(rows, groups, dtype=packed.dtype)
    for n in range(rows):
        for group in range(groups):
            scales[n, group] = flat[svdq_wscales_position(n, group, groups)]
    return scales


def svdq_micro_scales_position(n: int, group: int, groups: int) -> int:
    """Return the packed position of the scale of channel `n` and group `group` of 16 inputs."""
    lane = (((n // 128) * (groups // 4) + group // 4) * 8 + n % 8) * 4 + (n % 32) // 8
    return (lane * 4 + (n % 128) // 32) * 4 + group % 4


def pack_svdq_micro_scales(scales: torch.Tensor) -> torch.Tensor:
    """Pack (N, K/16) into the nominal shape (K/16, N)."""
    rows, groups = scales.shape
    flat = torch.zeros(rows * groups, dtype=scales.dtype)
    for n in range(rows):
        for group in range(groups):
            flat[svdq_micro_scales_position(n, group, groups)] = scales[n, group]
    return flat.view(groups, rows)


# ---- AWQ weight ----


def awq_qweight_position(n: int, k: int, columns: int) -> tuple[int, int]:
    """Return the 16-bit word and the nibble in it that hold element (`n`, `k`)."""
    tile = ((n // 4) * (columns // 64) + k // 64) * 4 + n % 4
    return tile * 16 + ((k % 64) // 32) * 8 + k % 8, (k % 32) // 8


def pack_awq_qweight(values: torch.Tensor) -> torch.Tensor:
    """Pack (N, K) integers in [0, 15] into (N/4, K/2) int32."""
    rows, columns = values.shape
    data = bytearray(rows * columns // 2)
    for n, row in enumerate(values.tolist()):
        for k, value in enumerate(row):
            word, nibble = awq_qweight_position(n, k, columns)
            data[word * 2 + nibble // 2] |= value << (4 * (nibble % 2))
    return torch.frombuffer(data, dtype=torch.int32).view(rows // 4, columns // 2)


def unpack_awq_qweight(packed: torch.Tensor) -> torch.Tensor:
    """Unpack (N/4, K/2) int32 into (N, K) uint8 in [0, 15]."""
    rows, columns = packed.shape[0] * 4, packed.shape[1] * 2
    data = packed.contiguous().view(torch.uint8).reshape(-1).tolist()
    values = torch.zeros(rows, columns, dtype=torch.uint8)
    for n in range(rows):
        for k in range(columns):
            word, nibble = awq_qweight_position(n, k, columns)
            values[n, k] = (data[word * 2 + nibble // 2] >> (4 * (nibble % 2))) & 15
    return values


# ---- modulation rows ----


def interleave_modulation(rows: torch.Tensor, planes: int = MODULATION_PLANES) -> torch.Tensor:
    """Move row j*C + c (plane j, channel c) to row c*planes + j."""
    channels = rows.shape[0] // planes
    result = torch.zeros_like(rows)
    for plane in range(planes):
        for channel in range(channels):
            result[channel * planes + plane] = rows[plane * channels + channel]
    return result


def deinterleave_modulation(rows: torch.Tensor, planes: int = MODULATION_PLANES) -> torch.Tensor:
    """Move row c*planes + j back to row j*C + c."""
    channels = rows.shape[0] // planes
    result = torch.zeros_like(rows)
    for plane in range(planes):
        for channel in range(channels):
            result[plane * channels + channel] = rows[channel * planes + plane]
    return result


# ---- low-rank arithmetic ----


def lora_delta(down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * up @ down as (out, in) float64."""
    return scale * (up.to(torch.float64) @ down.to(torch.float64))


def fused_delta(parts: list[LowRankPart], out_features: int) -> torch.Tensor:
    """Return the dense (out_features, in_features) float64 update of a fused layer.

    Each part adds to its own rows; rows that no part writes stay zero.
    """
    delta = torch.zeros(out_features, parts[0].down.shape[1], dtype=torch.float64)
    for part in parts:
        for row in range(part.up.shape[0]):
            update = lora_delta(part.down, part.up[row : row + 1], part.scale)  # (1, in)
            delta[part.row_begin + row] += update[0]
    return delta


# ---- weights under adapters that need the base weight ----
#
# Each returns the whole adapted weight W' (out, in) in float64, of the base weight W and of what an
# adapter stores. At strength t the layer computes W + t (W' - W).


def dora_weight(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Scale the rows of V = W + delta to lengths m (out, 1) or (out,), or its columns to (1, in).

    `delta` has its scale in it.
    """
    adapted = weight.to(torch.float64) + delta.to(torch.float64)
    if magnitude.ndim == 2 and magnitude.shape[0] == 1 and weight.shape[0] != 1:
        for column in range(adapted.shape[1]):
            adapted[:, column] *= magnitude[0, column].item() / adapted[:, column].norm()
    else:
        for row in range(adapted.shape[0]):
            adapted[row] *= magnitude.flatten()[row].item() / adapted[row].norm()
    return adapted


def ia3_weight(weight: torch.Tensor, factors: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiply rows (axis 0) or columns (axis 1) by factors 1 + l."""
    adapted = weight.to(torch.float64).clone()
    for index in range(weight.shape[axis]):
        adapted.select(axis, index).mul_(factors[index].item())
    return adapted


def glora_weight(
    weight: torch.Tensor,
    a: tuple[torch.Tensor, torch.Tensor],
    b: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Return W + scale (b1 b2 + W a1 a2) of a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in)."""
    base = weight.to(torch.float64)
    own = b[0].to(torch.float64) @ b[1].to(torch.float64)
    turned = base @ a[0].to(torch.float64) @ a[1].to(torch.float64)
    return base + scale * (own + turned)


def hra_weight(weight: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Reflect the columns' space along each direction of (in, r), the first one first."""
    adapted = weight.to(torch.float64)
    for direction in directions.to(torch.float64).unbind(1):
        unit = (direction / direction.norm()).unsqueeze(1)  # (in, 1)
        adapted = adapted @ (torch.eye(len(unit), dtype=torch.float64) - 2 * unit @ unit.T)
    return adapted


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """Return (I + Q)(I - Q)^-1 of one block (b, b)."""
    eye = torch.eye(len(skew), dtype=torch.float64)
    inverse: torch.Tensor = torch.linalg.inv(eye - skew)
    return (eye + skew) @ inverse


def cayley_series(skew: torch.Tensor) -> torch.Tensor:
    """Return I + 2Q + 2Q^2 + 2Q^3 + Q^4 of one block (b, b)."""
    result = torch.eye(len(skew), dtype=torch.float64)
    power = torch.eye(len(skew), dtype=torch.float64)
    for factor in (2, 2, 2, 1):
        power = power @ skew
        result = result + factor * power
    return result


def skew_of_triangle(triangle: torch.Tensor, size: int) -> torch.Tensor:
    """Return the skew-symmetric block (b, b) of its upper triangle, which is stored by rows."""
    skew = torch.zeros(size, size, dtype=torch.float64)
    stored = iter(triangle.tolist())
    for row in range(size):
        for column in range(row + 1, size):
            skew[row, column] = next(stored)
            skew[column, row] = -skew[row, column]
    return skew


def constrained_skews(blocks: torch.Tensor, most: float) -> torch.Tensor:
    """Return Q = B - B^T of all blocks (..., b, b), their common norm at most `most`; 0: any."""
    skew = blocks.to(torch.float64) - blocks.to(torch.float64).transpose(-1, -2)
    norm = float(skew.square().sum().sqrt()) + 1e-8
    return skew * (most / norm) if 0 < most < norm else skew


def block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """Return the matrix (n b, n b) of blocks (n, b, b) on its diagonal."""
    count, size, _ = blocks.shape
    matrix = torch.zeros(count * size, count * size, dtype=torch.float64)
    for index in range(count):
        begin = index * size
        matrix[begin : begin + size, begin : begin + size] = blocks[index]
    return matrix


def diag_oft_weight(
    weight: torch.Tensor, rotations: torch.Tensor, rescale: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply each block of rows by R^T, then each row by its factor."""
    adapted = block_diagonal(rotations).T @ weight.to(torch.float64)
    return adapted if rescale is None else ia3_weight(adapted, rescale.flatten(), 0)


def butterfly_row(place: int, size: int, stage: int) -> int:
    """Return which row stands at a place of a stage's permuted rows, in blocks of `size`."""
    stride = (1 << stage) * size // 2
    pair, within = divmod(place, 2 * stride)
    return pair * 2 * stride + (within % 2) * stride + within // 2


def boft_weight(
    weight: torch.Tensor, rotations: torch.Tensor, rescale: torch.Tensor | None = None
) -> torch.Tensor:
    """Put rows through m stages of blocks (m, n, b, b), then multiply each row by its factor."""
    adapted = weight.to(torch.float64)
    rows, size = len(weight), rotations.shape[-1]
    for stage, blocks in enumerate(rotations):
        permutation = torch.zeros(rows, rows, dtype=torch.float64)
        for place in range(rows):
            permutation[place, butterfly_row(place, size, stage)] = 1
        adapted = permutation.T @ block_diagonal(blocks) @ permutation @ adapted
    return adapted if rescale is None else ia3_weight(adapted, rescale.flatten(), 0)


def input_oft_weight(
    weight: torch.Tensor, rotations: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weight of a layer that sees x R per block, and whose rows are scaled."""
    adapted = weight.to(torch.float64) @ block_diagonal(rotations).T
    return adapted if scale is None else ia3_weight(adapted, scale.flatten(), 0)


# ---- schedules ----


def schedule_factor(keyframes: list[tuple[float, float]], share: float, *, linear: bool) -> float:
    """The factor at a share of the course: exact, rounded once to float64.

    Args:
        keyframes: (share, factor) in any order, no share twice.
        share: From 0 to 1.
        linear: Whether the factor runs straight from one keyframe to the next, instead of staying.
    """
    before = [own for own in keyframes if own[0] <= share]
    behind = [own for own in keyframes if own[0] > share]
    if not before:
        return min(keyframes)[1]
    begin, factor = max(before)
    if not (linear and behind):
        return factor
    end, other = min(behind)
    part = (Fraction(share) - Fraction(begin)) / (Fraction(end) - Fraction(begin))
    return float((1 - part) * Fraction(factor) + part * Fraction(other))
