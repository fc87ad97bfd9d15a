"""From a slot's planned pieces to tensors, per LoRA and free of strength.

What is executed as rank becomes one pair; Kronecker products, dense deltas and values stay apart.

Q, K and V that share a slot are fused here: members of equal `down` share its rank, others are
stacked (`down` by rows, `up` block-diagonal); a missing member is a block of zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.adapters.based import based_delta, has_estimated_norms, is_based
from qwenlora.delta.adapters.lokr import kron_factors
from qwenlora.delta.adapters.table import adapter_named
from qwenlora.delta.adapters.vector import value_of
from qwenlora.delta.finite import are_finite, damaged, is_finite
from qwenlora.delta.replaced import (
    is_replacement,
    is_stored_value,
    replaced_rows,
    replaced_value,
)
from qwenlora.errors import NonFiniteError
from qwenlora.packing.layout import RowOrder
from qwenlora.packing.pack import interleave_modulation
from qwenlora.plan.documents import PieceKind
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from qwenlora.delta.adapters.based import Base, Based
    from qwenlora.delta.adapters.vector import ValueDelta
    from qwenlora.delta.diagonal import DiagonalDelta
    from qwenlora.delta.factors import Factors
    from qwenlora.delta.rotation import RotationDelta
    from qwenlora.model.target import Target
    from qwenlora.plan.documents import Piece
    from qwenlora.source.source import TensorFetcher

__all__ = [
    "CutPiece",
    "KronPair",
    "LoraPair",
    "LoraPieces",
    "Refusal",
    "fetch_pieces",
    "is_thirded",
    "is_zero",
    "read_pieces",
    "same_dtype",
    "stack_downs",
]


QKV_PARTS = 3
"""Projections that a fused attention linear is made of."""


@dataclass(frozen=True)
class LoraPair:
    """One LoRA's delta in one slot, without strength, in the dtype of its file.

    Attributes:
        down: (R, in).
        up: (out, R), rows in the slot's own order.
        scale: (parts, rank) float64, on the host: the factor of each rank in each of the slot's
            equal row parts.
        zero: Whether the delta is all zero.
        thirded: Whether a fused file's `up` is block-diagonal while its scale is at most 1/3: a
            converter that stacked q, k and v may have copied alpha from one of them.
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    zero: bool
    thirded: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.down.nbytes + self.up.nbytes


@dataclass(frozen=True)
class KronPair:
    """One Kronecker product, executed beside the layer as it is.

    Attributes:
        w1: (ol, im).
        w2: (ok, il): the layer has im il columns, and ol ok of its rows change.
        scale: Factor on the product.
        row_begin: First logical row that it changes.
        rows: (ol ok) float32, factors on its rows; None where they are 1.
        columns: (im il) float32, factors on its columns; None where they are 1.
    """

    w1: Tensor
    w2: Tensor
    scale: float
    row_begin: int
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        own = (self.w1, self.w2, self.rows, self.columns)
        return sum(tensor.nbytes for tensor in own if tensor is not None)


@dataclass(frozen=True)
class CutPiece:
    """A delta that was cut to become rank.

    Attributes:
        adapter: Its adapter's name.
        row_begin: Its first logical row.
        row_count: Its rows.
        scale: Factor on it.
        energy_lost: Squared Frobenius norm of what was cut off, scale included.
        lone: Whether no other delta of its LoRA lies in its rows.
        exact: The tensors that it is made of, by role; None where they are as large as the layer,
            or it is not alone in its rows.
    """

    adapter: str
    row_begin: int
    row_count: int
    scale: float
    energy_lost: float
    lone: bool
    exact: Mapping[str, Tensor] | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.exact or {}).values())

    def overlaps(self, rows: tuple[int, int]) -> bool:
        """Tell if it writes some of these rows: the first, and how many."""
        return self.row_begin < sum(rows) and rows[0] < self.row_begin + self.row_count


@dataclass(frozen=True)
class Refusal:
    """A module of which too much would be lost.

    Attributes:
        target: The module.
        reason: Why, in words.
    """

    target: str
    reason: str


@dataclass(frozen=True)
class LoraPieces:
    """One LoRA's deltas in one slot, without strength.

    Attributes:
        pair: All that is executed as rank.
        krons: Kronecker products, by rows.
        dense: (out, in) float32, scale included: all that a plain linear runs as a matrix.
        values: What is added to stored values.
        refused: Modules left out for what they would lose.
        cuts: What was cut to become rank.
        diagonals: Factors on the layer's rows or columns.
        rotations: Rotations of its rows or columns.
        estimated: Modules whose norms are estimated from the quantized weight.
        rows: Which rows the deltas of the layer's weight write: of each the first, and how many.
    """

    pair: LoraPair | None = None
    krons: tuple[KronPair, ...] = ()
    dense: Tensor | None = None
    values: tuple[ValueDelta, ...] = ()
    refused: tuple[Refusal, ...] = ()
    cuts: tuple[CutPiece, ...] = ()
    diagonals: tuple[DiagonalDelta, ...] = ()
    rotations: tuple[RotationDelta, ...] = ()
    estimated: tuple[str, ...] = ()
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        own = [value.delta for value in self.values]
        own += [] if self.dense is None else [self.dense]
        held = sum(tensor.nbytes for tensor in own)
        held += sum(kron.nbytes for kron in self.krons) + sum(cut.nbytes for cut in self.cuts)
        held += sum(diagonal.nbytes for diagonal in self.diagonals)
        held += sum(rotation.nbytes for rotation in self.rotations)
        return held + (0 if self.pair is None else self.pair.nbytes)

    @property
    def zero(self) -> bool:
        """True where all of it is zero."""
        return (
            not self.refused
            and (self.pair is None or self.pair.zero)
            and not any(_has_value(k.w1) and _has_value(k.w2) for k in self.krons)
            and (self.dense is None or not _has_value(self.dense))
            and not any(_has_value(value.delta) for value in self.values)
            and all(diagonal.zero for diagonal in self.diagonals)
            and all(rotation.zero for rotation in self.rotations)
        )


def fetch_pieces(
    pieces: Sequence[Piece],
    target: Target,
    fetcher: TensorFetcher,
    *,
    base: Base,
    max_energy_lost: float,
) -> LoraPieces:
    """Read one LoRA's pieces of a slot and bring them to the forms that the slot carries.

    Args:
        pieces: All pieces of one LoRA in this slot.
        target: The slot.
        fetcher: Reads the tensors.
        base: The weight that the layer computes with.
        max_energy_lost: Largest share of its energy that a full delta may lose.

    Returns:
        The deltas.

    Raises:
        NonFiniteError: A delta that must be decomposed holds NaN or infinity.
    """
    read = read_pieces(pieces, fetcher)
    rows = target.row.out_features
    values = [
        replaced_value(p, t, target) if is_replacement(p) else value_of(p, t, rows)
        for p, t in read
        if _is_value(p, target)
    ]
    if target.only_values:
        return LoraPieces(values=tuple(values))
    based = {id(p): based_delta(p, tensors, base) for p, tensors in read if is_based(p)}
    ranks, refused = _rank_members(read, based, target, max_energy_lost)
    carried = [(p, t) for p, t in read if not (_is_value(p, target) or _is_in(refused, p))]
    dense = [(p, _matrix_of(p, t, base)) for p, t in carried if _is_matrix(p, target)]
    own = tuple(based.values())
    return LoraPieces(
        pair=_fuse(ranks, target) if ranks else None,
        krons=tuple(_krons(read, based)),
        dense=_dense_sum(dense, target) if dense else None,
        values=tuple(values),
        refused=tuple(refused),
        cuts=tuple(_cut_pieces(ranks, carried)),
        diagonals=tuple(made.diagonal for made in own if made.diagonal is not None),
        rotations=tuple(made.rotation for made in own if made.rotation is not None),
        estimated=tuple(p.target for p, _ in read if has_estimated_norms(p, target, base)),
        rows=tuple(_rows_of(piece) for piece, _ in carried),
    )


def _krons(
    read: Sequence[tuple[Piece, Mapping[str, Tensor]]], based: Mapping[int, Based]
) -> Iterator[KronPair]:
    """The products that run beside the layer as they are."""
    for piece, tensors in read:
        if piece.kind is PieceKind.KRON:
            yield KronPair(*_kept(kron_factors(tensors)), piece.scale, piece.row_begin)
            continue
        made = based.get(id(piece))
        if made is not None and made.kron is not None:
            w1, w2, rows, columns = made.kron
            own = _kept((w1, w2))
            yield KronPair(*own, piece.scale, piece.row_begin, rows=rows, columns=columns)


def read_pieces(
    pieces: Sequence[Piece], fetcher: TensorFetcher
) -> list[tuple[Piece, dict[str, Tensor]]]:
    """Read pieces' tensors with one call, by role: matrices, vectors, and blocks as they are."""
    refs = [ref for piece in pieces for ref in piece.tensors.values()]
    stored = iter(fetcher.fetch(refs))
    return [
        (piece, {role: _shaped(role, next(stored)) for role in piece.tensors}) for piece in pieces
    ]


_BLOCKS = ("oft_blocks", "boft_r")
"""Roles of tensors with more than two axes of their own."""


def _shaped(role: str, tensor: Tensor) -> Tensor:
    """Flatten to a matrix, as tools store one as a 1x1 convolution; vectors stay vectors."""
    return tensor.flatten(1) if tensor.ndim > 2 and role not in _BLOCKS else tensor


def _kept(tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Copies: what is read is a view of a buffer that holds the other tensors, too."""
    return tensors[0].clone(), tensors[1].clone()


def _is_value(piece: Piece, target: Target) -> bool:
    """Tell if a piece changes a parameter that the layer stores as it is."""
    if target.only_values or piece.kind is PieceKind.VECTOR:
        return True
    return is_replacement(piece) and is_stored_value(target)


def _is_matrix(piece: Piece, target: Target) -> bool:
    """Tell if a full delta runs as it is, not as rank by a budget."""
    is_full = piece.kind is PieceKind.DENSE and piece.rank_budget is None
    return is_full and not _is_value(piece, target)


def _matrix_of(piece: Piece, tensors: Mapping[str, Tensor], base: Base) -> Tensor:
    """(rows, in): a full delta."""
    if is_replacement(piece):
        return replaced_rows(piece, tensors, base.weight)
    return tensors["diff"]


def _dense_sum(dense: Sequence[tuple[Piece, Tensor]], target: Target) -> Tensor:
    """(out, in) float32 of the whole layer; rows that no piece has are zero."""
    size = (target.row.out_features, target.row.in_features)
    total = torch.zeros(size, dtype=torch.float32, device=dense[0][1].device)
    for piece, delta in dense:
        rows = total.narrow(0, piece.row_begin, piece.row_count)
        rows.add_(delta.to(torch.float32), alpha=piece.scale)
    return total


def _rank_members(
    read: Sequence[tuple[Piece, Mapping[str, Tensor]]],
    based: Mapping[int, Based],
    target: Target,
    max_energy_lost: float,
) -> tuple[list[tuple[Piece, Factors]], list[Refusal]]:
    """The pieces that are executed as rank, and those that would lose too much by it."""
    members, refused = [], []
    for piece, tensors in read:
        made = based.get(id(piece))
        if made is not None:
            members += [] if made.pair is None else [(piece, made.pair)]
            continue
        if piece.kind is not PieceKind.LOW_RANK and piece.rank_budget is None:
            continue
        adapter = adapter_named(piece.adapter)
        try:
            factors = adapter.factors(tensors, piece.rank_budget, target.device)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            if not all(map(is_finite, tensors.values())):
                raise damaged(piece.target, f"its {piece.adapter}") from error
            raise NonFiniteError(f"`{piece.target}`: its {piece.adapter} is too large") from error
        if piece.kind is PieceKind.DENSE and factors.share_lost > max_energy_lost:
            refused.append(Refusal(piece.target, _too_much(factors, max_energy_lost)))
        else:
            members.append((piece, factors))
    return members, refused


def _is_in(refused: Sequence[Refusal], piece: Piece) -> bool:
    return piece.kind is PieceKind.DENSE and piece.target in {own.target for own in refused}


def _too_much(factors: Factors, limit: float) -> str:
    return (
        f"a full delta on a quantized layer: {counted(factors.rank, 'rank')} would lose"
        f" {factors.share_lost:.1%} of its energy, more than the {limit:.1%} allowed"
        " (ComposeOptions.max_energy_lost, truncated_rank)"
    )


def _fuse(members: Sequence[tuple[Piece, Factors]], target: Target) -> LoraPair:
    """Join one LoRA's pairs of a slot."""
    downs = same_dtype([factors.down for _, factors in members])
    ups = same_dtype([factors.up for _, factors in members])
    pieces = [piece for piece, _ in members]
    out_features = target.row.out_features
    # Rows of unequal number are a whole number of their greatest common part.
    ends = [end for piece in pieces for end in _rows_of(piece)]
    parts = out_features // math.gcd(out_features, *ends)
    starts, down = stack_downs(downs)
    rank = down.shape[0]
    up = ups[0].new_zeros((out_features, rank))
    scale = torch.zeros((parts, rank), dtype=torch.float64)
    part_rows = out_features // parts
    for piece, start, member in zip(pieces, starts, ups, strict=True):
        rows = slice(piece.row_begin, piece.row_begin + piece.row_count)
        columns = slice(start, start + member.shape[1])
        first = piece.row_begin // part_rows
        last = (piece.row_begin + piece.row_count) // part_rows
        up[rows, columns] = member
        scale[first:last, columns] = piece.scale
    if target.row_order is RowOrder.INTERLEAVED:
        up = interleave_modulation(up)
    none = all(is_zero(*pair) for pair in zip(downs, ups, strict=True))
    zero = none or not bool(scale.any())
    thirded = len(pieces) == 1 and is_thirded(pieces[0], ups[0])
    return LoraPair(down, up, scale, zero=zero, thirded=thirded)


def _cut_pieces(
    members: Sequence[tuple[Piece, Factors]],
    carried: Sequence[tuple[Piece, Mapping[str, Tensor]]],
) -> Iterator[CutPiece]:
    """The facts of deltas that were cut, besides the pair that is left of them."""
    tensors_of = {id(piece): tensors for piece, tensors in carried}
    for piece, factors in members:
        if not factors.energy_lost > 0:
            continue
        cut = CutPiece(
            adapter=piece.adapter,
            row_begin=piece.row_begin,
            row_count=piece.row_count,
            scale=piece.scale,
            energy_lost=factors.energy_lost * piece.scale**2,
            lone=True,
            exact=None,
        )
        if any(cut.overlaps(_rows_of(other)) for other, _ in carried if other is not piece):
            yield replace(cut, lone=False)
        elif piece.kind is PieceKind.DENSE or is_based(piece):
            yield cut
        else:
            tensors = tensors_of[id(piece)]
            # Copies: what is read is a view of a buffer that holds the other tensors, too.
            yield replace(cut, exact={role: tensor.clone() for role, tensor in tensors.items()})


def _rows_of(piece: Piece) -> tuple[int, int]:
    return piece.row_begin, piece.row_count


def stack_downs(downs: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """Stack the distinct downs; where each member's rank begins, and the stack (R, in).

    The one place in Python that finds equal `down` halves. Slots that are composed together have
    `qwenlora.group.load.Findings.sharing` instead, which Rust finds by the same rule while it
    reads.
    """
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


def is_thirded(piece: Piece, up: Tensor) -> bool:
    """Tell if a fused pair is block-diagonal and its scale at most 1/3; see `LoraPair.thirded`.

    Args:
        piece: The pair as it is planned.
        up: (rows, rank); the rows of one projection alone where the layer has no others.
    """
    out, rank = up.shape
    fused = piece.target.endswith(("to_qkv", "add_qkv_proj"))
    if not fused or rank % QKV_PARTS or piece.scale * QKV_PARTS > 1:
        return False
    if any(ref.first_row is not None for ref in piece.tensors.values()):
        # One projection's rows: all its values lie in one block of columns.
        blocks = up.view(out, QKV_PARTS, rank // QKV_PARTS)
        return sum(_has_value(blocks[:, column]) for column in range(QKV_PARTS)) == 1
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
    # The first row mostly tells.
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in ((a[:1], b[:1]), (a, b))
    )


def same_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Members of one slot may be stored in different dtypes; float32 holds every 16-bit one."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return list(tensors)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [tensor.to(wide) for tensor in tensors]


def is_zero(*halves: Tensor) -> bool:
    """Tell if a product is zero: a zero factor times an infinite one is not."""
    if all(_has_value(half) for half in halves):
        return False
    return all(are_finite(halves))


def _has_value(tensor: Tensor) -> bool:
    """Tell if any element is not zero (NaN counts); looks at a corner first."""
    corner = tensor[: min(8, tensor.shape[0])]
    probe = corner.to(torch.float32) if tensor.itemsize == 1 else corner
    if bool(probe.any()):
        return True
    whole = tensor.to(torch.float32) if tensor.itemsize == 1 else tensor
    return bool(whole.any())
