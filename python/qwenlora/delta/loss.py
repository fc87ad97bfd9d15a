"""The share of a slot's delta that is lost: |delta - kept|^2 / |delta|^2 in the Frobenius norm.

The whole delta is all that the slot's LoRAs ask of it: what becomes rank, before anything of it is
cut, and what runs beside the layer as it is. Where what is kept is a projection of the whole, as a
single truncation is, that is 1 - |kept|^2 / |delta|^2.

Both norms are measured by rows: deltas that cancel leave no rounding of their own norms, as they
would in Gram matrices, and no matrix is formed whole. Of a full delta that was cut, only the norm
of what it lacks is known. Where nothing else lies in its rows, that norm adds up exactly: what it
lacks is orthogonal to what was kept of it. Elsewhere the figures are bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora import sizes
from qwenlora.delta.adapters.lokr import kron_rows
from qwenlora.delta.adapters.table import adapter_named
from qwenlora.delta.scale import scaled_energy
from qwenlora.delta.strength import factor_at
from qwenlora.packing.layout import RowOrder
from qwenlora.packing.pack import interleave_modulation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from qwenlora.delta.parts import ScaledPart
    from qwenlora.delta.pieces import CutPiece
    from qwenlora.delta.scale import ScaledPair
    from qwenlora.model.target import Target

__all__ = ["LoraShare", "Loss", "WholeDelta"]


CANCELLED = 1e-11
"""A sum below this share of its terms' own energies is what float32 leaves of zero."""


@dataclass(frozen=True)
class LoraShare:
    """One LoRA's delta in a slot, as rank.

    Attributes:
        lora: Its index in the stack.
        strength: Its strength.
        pair: What the slot will hold of it where nothing more is cut.
        cuts: Its deltas that were cut to become rank.
    """

    lora: int
    strength: float
    pair: ScaledPair
    cuts: tuple[CutPiece, ...]


@dataclass(frozen=True)
class Loss:
    """A slot's loss.

    Attributes:
        energy: Squared Frobenius norm of the whole delta.
        share: The share of it that is lost; infinite where no bound can be given.
        is_bound: Whether both are at most so, instead of measured.
    """

    energy: float
    share: float
    is_bound: bool = False


@dataclass(frozen=True)
class WholeDelta:
    """The sum of all deltas that the LoRAs ask of a slot.

    Attributes:
        target: The slot.
        shares: What those bring that bring rank.
        krons: Kronecker products that run beside the layer.
        dense: (out, in): what runs beside the layer as a matrix, rows as in files.
        change: Makes (out, in) float32 of what factors and rotations change in the layer's weight,
            rows as in files; None where there are none.
        shared: The cut deltas in whose rows others lie: of each its LoRA, and its place in `cuts`.
    """

    target: Target
    shares: tuple[LoraShare, ...]
    krons: tuple[ScaledPart, ...] = ()
    dense: Tensor | None = None
    change: Callable[[], Tensor] | None = None
    shared: frozenset[tuple[int, int]] = frozenset()

    @property
    def is_cut(self) -> bool:
        """True where a delta was cut to become rank."""
        return any(share.cuts for share in self.shares)

    @property
    def is_plain(self) -> bool:
        """True where the norms of the parts that were cut off add to that of the sum of ranks."""
        beside = self.krons or self.dense is not None or self.change is not None
        return not beside and len(self.shares) == 1 and not self.shared

    @property
    def cut_energy(self) -> float:
        """The energy that was cut off before the ranks were summed, each delta for itself."""
        return sum(
            scaled_energy(cut.energy_lost, share.strength)
            for share in self.shares
            for cut in share.cuts
        )

    @property
    def nbytes(self) -> int:
        """Bytes held of pairs."""
        return sum(share.pair.nbytes for share in self.shares)

    def loss(self, kept: Sequence[ScaledPair]) -> Loss:
        """Measure, or bound, what is lost where the slot holds these pairs as rank."""
        return _Measure(self, kept).loss()


class _Measure:
    """The sums of a measurement while it goes through the rows."""

    def __init__(self, whole: WholeDelta, kept: Sequence[ScaledPair]) -> None:
        row, device = whole.target.row, whole.target.device
        self._whole = whole
        self._kept = [_wide(pair) for pair in kept]
        self._shares = [_Rows(share, whole.target) for share in whole.shares]
        self._columns, self._count = row.in_features, row.out_features
        logical = torch.arange(self._count, device=device)
        if whole.target.row_order is RowOrder.INTERLEAVED:
            logical = interleave_modulation(logical)
        self._logical = logical
        matrices = (whole.dense, None if whole.change is None else whole.change())
        self._matrices = [own.to(device) for own in matrices if own is not None]
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._energy = self._lost = self._own = self._zero
        self._fulls = [
            _Full(share.strength, cut, (share.lora, place) not in whole.shared, at)
            for at, share in enumerate(whole.shares)
            for place, cut in enumerate(share.cuts)
            if cut.exact is None
        ]
        self._beside = [self._zero for _ in self._fulls]

    def loss(self) -> Loss:
        """Go through all rows."""
        step = max(1, sizes.current().panel_bytes // (4 * self._columns))
        for first in range(0, self._count, step):
            self._add(slice(first, min(first + step, self._count)))
        if float(self._energy) <= CANCELLED * float(self._own):
            self._energy = self._lost = self._zero
        apart = sum(full.energy for full in self._fulls if full.lone)
        energy, lost = float(self._energy) + apart, float(self._lost) + apart
        if all(full.lone for full in self._fulls):
            return Loss(energy, lost / energy if energy > 0 else 0.0)
        return self._bound(energy, lost)

    def _add(self, rows: slice) -> None:
        logical = self._logical[rows]
        shape = (len(logical), self._columns)
        ranks = torch.zeros(shape, dtype=torch.float32, device=logical.device)
        owns = [share.rows(rows, logical) for share in self._shares]
        for own in owns:
            ranks += own
            self._own = self._own + _energy(own)
        whole = self._with_beside(ranks, logical)
        self._energy = self._energy + _energy(whole)
        for at, full in enumerate(self._fulls):
            if not full.lone:
                within = full.holds(logical)
                others = whole[within] - owns[full.share][within]
                self._beside[at] = self._beside[at] + _energy(others)
        for down, up in self._kept:
            ranks -= up[rows] @ down
        self._lost = self._lost + _energy(ranks)

    def _with_beside(self, ranks: Tensor, logical: Tensor) -> Tensor:
        if not self._matrices and not self._whole.krons:
            return ranks
        whole = ranks.clone()
        for matrix in self._matrices:
            own = matrix[logical].float()
            whole += own
            self._own = self._own + _energy(own)
        for kron in self._whole.krons:
            begin, count = kron.shape.row_begin, kron.shape.row_count
            within = (logical >= begin) & (logical < begin + count)
            own = kron_rows(kron.tensors["w1"], kron.tensors["w2"], logical[within] - begin)
            whole[within] += own
            self._own = self._own + _energy(own)
        return whole

    def _bound(self, energy: float, lost: float) -> Loss:
        """The most that may be lost: the angles between what is missing and the rest are unknown.

        With r the norm of all that is missing, x that of what is measured as lost, and c the most
        that the missing and the rest have in common, the share is at most
        (x + r)^2 / (energy - 2 c + r^2). It grows with r up to (energy - 2 c) / x, then falls.
        """
        missed: dict[int, float] = {}
        common = 0.0
        for full, beside in zip(self._fulls, self._beside, strict=True):
            if not full.lone:
                missed[full.share] = missed.get(full.share, 0.0) + full.energy
                common += math.sqrt(full.energy * float(beside))
        most = sum(math.sqrt(size) for size in missed.values())
        measured = math.sqrt(lost)
        upper = (math.sqrt(energy) + most) ** 2
        apart = energy - 2 * common
        if apart <= 0:
            return Loss(upper, math.inf, is_bound=True)
        missing = min(most, apart / measured) if measured > 0 else most
        share = (measured + missing) ** 2 / (apart + missing**2)
        return Loss(upper, share, is_bound=True)


@dataclass(frozen=True)
class _Full:
    """A full delta that was cut, of which only norms are known."""

    strength: float
    cut: CutPiece
    lone: bool
    share: int

    @property
    def energy(self) -> float:
        """The energy of the part that it lacks."""
        return scaled_energy(self.cut.energy_lost, self.strength)

    def holds(self, logical: Tensor) -> Tensor:
        """Which rows it writes."""
        return _within(self.cut, logical)


class _Rows:
    """Rows of what one LoRA asks for as rank."""

    def __init__(self, share: LoraShare, target: Target) -> None:
        self._down, self._up = _wide(share.pair)
        self._cuts = [
            (
                cut,
                factor_at(cut.scale, share.strength),
                {role: tensor.to(target.device) for role, tensor in cut.exact.items()},
            )
            for cut in share.cuts
            if cut.exact is not None
        ]

    def rows(self, rows: slice, logical: Tensor) -> Tensor:
        """The rows (n, in) float32."""
        own = self._up[rows] @ self._down
        for cut, factor, tensors in self._cuts:
            within = _within(cut, logical)
            delta = adapter_named(cut.adapter).rows(tensors, logical[within] - cut.row_begin)
            own[within] = delta * factor
        return own


def _within(cut: CutPiece, logical: Tensor) -> Tensor:
    return (logical >= cut.row_begin) & (logical < cut.row_begin + cut.row_count)


def _wide(pair: ScaledPair) -> tuple[Tensor, Tensor]:
    return pair.down.float(), pair.up.float()


def _energy(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dtype=torch.float64)
    return norm.square()
