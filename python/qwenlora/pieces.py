"""From a slot's planned pieces to tensors: one pair per LoRA, free of strength.

Q, K and V that share a slot are fused here: members of equal `down` share its rank, others are
stacked (`down` by rows, `up` block-diagonal); a missing member is a block of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.layout import FRAGMENT, TILE, LowRankSide, RowOrder, round_up
from qwenlora.pack import interleave_modulation, pack_lowrank, unpack_lowrank
from qwenlora.plan import SlotKind

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.plan import Piece, SlotPlan
    from qwenlora.source import TensorFetcher
    from qwenlora.targets import Target

__all__ = ["LoraPair", "ScaledPair", "fuse", "scaled", "unpacked"]

QKV_PARTS = 3
"""Projections that a fused attention linear is made of."""


@dataclass(frozen=True)
class LoraPair:
    """One LoRA's delta in one slot, without strength, in the dtype of its file.

    Attributes:
        down: (R, in) logical, or (in, R) packed.
        up: (out, R) logical, or (out, R) packed; rows in the slot's own order.
        scale: (parts, rank) float64, on the host: the factor of each rank in each of the slot's
            equal row parts.
        rank: Ranks used; packed tensors hold `rank` rounded up to 16, the rest zero.
        packed: Whether `down` and `up` are in the packed layout.
        zero: Whether the delta is all zero.
        thirded: Whether a fused file's `up` is block-diagonal while its scale is at most 1/3: a
            converter that stacked q, k and v may have copied alpha from one of them.
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    rank: int
    packed: bool
    zero: bool
    thirded: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True)
class ScaledPair:
    """One delta ready to be written: strength and scale in `up`, both in the slot's dtype."""

    down: Tensor
    up: Tensor
    rank: int

    @property
    def rank_padded(self) -> int:
        """Ranks that it takes in a packed slot."""
        return round_up(self.rank, TILE)


def fuse(
    pieces: Sequence[Piece], slot: SlotPlan, target: Target, fetcher: TensorFetcher
) -> LoraPair:
    """Read one LoRA's pieces of a slot and join them.

    Args:
        pieces: The low-rank pieces of one LoRA in this slot.
        slot: The slot's plan.
        target: The slot in the model.
        fetcher: Reads the tensors.

    Returns:
        The pair; packed where the slot is.
    """
    refs = [piece.tensors[role] for piece in pieces for role in ("down", "up")]
    tensors = [tensor.flatten(1) for tensor in fetcher.fetch(refs)]
    downs, ups = _same_dtype(tensors[0::2]), _same_dtype(tensors[1::2])
    out_features = target.row.out_features
    parts = out_features // pieces[0].row_count
    starts, down = _stack_downs(downs)
    rank = down.shape[0]
    up = ups[0].new_zeros((out_features, rank))
    scale = torch.zeros((parts, rank), dtype=torch.float64)
    for piece, start, member in zip(pieces, starts, ups, strict=True):
        rows = slice(piece.row_begin, piece.row_begin + piece.row_count)
        columns = slice(start, start + piece.rank)
        up[rows, columns] = member
        scale[piece.row_begin // piece.row_count, columns] = piece.scale
    if slot.row_order is RowOrder.INTERLEAVED:
        up = interleave_modulation(up)
    zero = _is_zero(down, up) or not bool(scale.any())
    thirded = len(pieces) == 1 and _is_thirded(pieces[0], up)
    pair = LoraPair(down, up, scale, rank, packed=False, zero=zero, thirded=thirded)
    return _packed(pair) if slot.kind is SlotKind.SVDQ else pair


def scaled(
    pair: LoraPair, strength: float, *, dtype: torch.dtype, device: torch.device
) -> ScaledPair:
    """Multiply strength and scale into `up` and cast to the slot's dtype.

    The factor is formed in float64 and rounded once to float32; value x factor is formed in
    float32 and rounded once to `dtype`. `down` is only cast.

    Args:
        pair: Logical or packed.
        strength: Factor on the whole delta.
        dtype: The slot's dtype.
        device: The slot's device.
    """
    factor = (pair.scale * strength).to(torch.float32)
    up = pair.up.to(device).to(torch.float32)
    factor = factor.to(device)
    if pair.packed:
        values = _scale_packed(up, factor)
    else:
        parts, rank = factor.shape
        # (out, R) -> (parts, out/parts, R); a single part covers every row order.
        values = (up.view(parts, -1, rank) * factor.unsqueeze(1)).view_as(up)
    # float8 casts through float32: torch has no direct cast to the half types on every device.
    down = pair.down.to(device)
    if down.itemsize == 1:
        down = down.to(torch.float32)
    return ScaledPair(down=down.to(dtype), up=values.to(dtype), rank=pair.rank)


def _scale_packed(up: Tensor, factor: Tensor) -> Tensor:
    """Scale packed (out, R) float32 by factors (parts, rank <= R)."""
    channels, rank_padded = up.shape
    parts, rank = factor.shape
    padded = factor.new_zeros((parts, rank_padded))
    padded[:, :rank] = factor
    # The factor of each element of a fragment row: a packed matrix of 16 equal rows per part.
    # (parts, R) -> (parts*16, R) => packed (parts, R/16, 256)
    rows = padded.repeat_interleave(TILE, dim=0)
    pattern = pack_lowrank(rows, LowRankSide.UP).view(parts, 1, rank_padded // TILE, FRAGMENT)
    # (C, R) nominal -> (parts, C/16/parts, R/16, 256)
    fragments = up.view(parts, channels // TILE // parts, rank_padded // TILE, FRAGMENT)
    return (fragments * pattern).view(channels, rank_padded)


def unpacked(pair: ScaledPair) -> tuple[Tensor, Tensor]:
    """Unpack a packed pair to logical (down (r, in), up (out, r)), padding cut off."""
    down = unpack_lowrank(pair.down, LowRankSide.DOWN)[: pair.rank]
    up = unpack_lowrank(pair.up, LowRankSide.UP)[:, : pair.rank]
    return down, up


def _packed(pair: LoraPair) -> LoraPair:
    """Bring a logical pair to the packed layout; ranks are padded to 16 with zeros."""
    return LoraPair(
        down=pack_lowrank(pair.down, LowRankSide.DOWN),
        up=pack_lowrank(pair.up, LowRankSide.UP),
        scale=pair.scale,
        rank=pair.rank,
        packed=True,
        zero=pair.zero,
        thirded=pair.thirded,
    )


def _stack_downs(downs: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """Stack the distinct downs; where each member's rank begins, and the stack (R, in)."""
    starts: list[int] = []
    distinct: list[tuple[int, Tensor]] = []
    end = 0
    for down in downs:
        start = next((at for at, other in distinct if _same_bytes(down, other)), None)
        if start is None:
            start = end
            distinct.append((start, down))
            end += down.shape[0]
        starts.append(start)
    if len(distinct) == 1:
        # A copy: what is read is a view of a buffer that holds the other tensors, too.
        return starts, distinct[0][1].clone()
    return starts, torch.cat([down for _, down in distinct])


def _is_thirded(piece: Piece, up: Tensor) -> bool:
    out, rank = up.shape
    fused = piece.target.endswith(("to_qkv", "add_qkv_proj"))
    if not fused or rank % QKV_PARTS or piece.scale * QKV_PARTS > 1:
        return False
    blocks = up.view(QKV_PARTS, out // QKV_PARTS, QKV_PARTS, rank // QKV_PARTS)
    return not any(
        _has_value(blocks[row, :, column])
        for row in range(QKV_PARTS)
        for column in range(QKV_PARTS)
        if row != column
    )


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _same_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Members of one slot may be stored in different dtypes; float32 holds every 16-bit one."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return list(tensors)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [tensor.to(wide) for tensor in tensors]


def _is_zero(down: Tensor, up: Tensor) -> bool:
    """Whether the product is zero: a zero half times an infinite one is not."""
    halves = (down, up)
    if all(_has_value(half) for half in halves):
        return False
    extremes = torch.stack([x for half in halves for x in torch.aminmax(half.to(torch.float32))])
    return bool(torch.isfinite(extremes).all())


def _has_value(tensor: Tensor) -> bool:
    """Whether any element is not zero (NaN counts); looks at a corner first, which mostly tells."""
    corner = tensor[: min(8, tensor.shape[0])]
    probe = corner.to(torch.float32) if tensor.itemsize == 1 else corner
    if bool(probe.any()):
        return True
    whole = tensor.to(torch.float32) if tensor.itemsize == 1 else tensor
    return bool(whole.any())
