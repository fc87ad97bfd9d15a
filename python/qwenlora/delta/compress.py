"""The best low-rank form of a sum of low-rank deltas: exact, or near the optimum and batched.

A small sum is decomposed by QR of both stacks and SVD of the core. A large one, whose core has
hundreds or thousands of ranks, is truncated by orthogonal iteration on the Gram matrices of its
halves: with `sum = U D` its energy is tr(U^T U D D^T), and

    (U D) (U D)^T (U C) = U (D D^T U^T U) C

so that a power iteration on the sum (Halko, Martinsson and Tropp, 2011) is one product of an R x R
and an R x k matrix, whatever the layer's width. All of it is matrix products and Cholesky
factorisations, which run batched; there is no eigenvalue problem, which would not.

The operator E = D D^T U^T U is shifted from the second iteration on: E - s tells the least wanted
direction l from the largest unwanted one u as (l - s) from (u - s), which is more than l from u. A
good shift is the mean energy of the unwanted directions, which does not exceed u: the energy that
the basis Q does not hold, 1 - tr(Q^T E Q) when Q has nearly converged, over their number. Half of l
is the most, beyond which directions near zero would be lifted over wanted ones.

Orthogonal iteration finds the directions in order of size, so one basis holds the truncations to
every smaller rank, too.

Here the sum of a slot's LoRAs is cut: a pair already, at one set of strengths. One LoRA's delta
that is no pair, or of too many ranks for one, is cut before by `qwenlora.delta.truncate`.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from qwenlora import sizes
from qwenlora.delta.decomposition import singular, triangular

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["Compressed", "LowRankSum", "RowBlock", "Truncation", "decomposed", "energy", "iterated"]


TRACE_NOISE = 1e-5
"""Share of a sum's energy up to which that outside of the basis may be rounding."""
RIDGE = 1e-13
"""Added to a basis' Gram matrix: more than float64 rounds off, less than float32 tells apart."""
GRAM_NOISE = 4e-6
"""Rounding of a Gram matrix, relative to its Frobenius norm."""
CANCELLED = 1e-2
"""Below this share of its ranks' own energies a sum's energy is left to the exact way."""
ROUNDING = 1e-13
"""A sum of less than this share of its halves' energies is what float32 leaves of zero."""
SMALLEST, LARGEST = 1e-30, 1e30
"""Energies of a half that are far from the limits of float32."""
PANELS = {torch.float32: 128, torch.bfloat16: 256}
"""Rows of a Gram matrix formed at a time, of which one triangle is multiplied.

More of bfloat16: what a product is of is brought to another order first, each time."""
APART = 0.05
"""Columns of which more than this is new are orthonormalised in float32: to about 1e-4."""
TINY = 1e-300
"""Keeps a direction of length zero at zero."""
CREDIBLE = 1.001
"""A share of the energy beyond this cannot have been kept: rounding has taken over."""


@dataclass(frozen=True)
class Compressed:
    """A sum brought to a lower rank.

    Attributes:
        down: (k, in), float32 or the sum's dtype.
        up: (out, k), the same.
        energy_lost: 1 - |kept|^2 / |sum|^2 in the Frobenius norm.
        energy: |sum|^2.
    """

    down: Tensor
    up: Tensor
    energy_lost: float
    energy: float


@dataclass(frozen=True)
class Truncation:
    """One sum's directions, the strongest first: what it takes to cut it to any rank up to k.

    Attributes:
        kept: (k,) float64 on the host: the share of the energy that the first 1, 2, ... keep.
        energy: |sum|^2 in the Frobenius norm.
    """

    kept: Tensor
    energy: float
    _halves: Callable[[int], tuple[Tensor, Tensor]] = field(repr=False)

    def lost(self, rank: int) -> float:
        """The share of the energy that a cut to `rank` loses."""
        held = min(rank, self.kept.numel())
        return max(0.0, 1 - float(self.kept[held - 1])) if held else 0.0

    def cut(self, rank: int) -> Compressed:
        """The sum cut to `rank`, or to k."""
        down, up = self._halves(min(rank, self.kept.numel()))
        return Compressed(down, up, self.lost(rank), self.energy)


@dataclass(frozen=True)
class RowBlock:
    """Rows of `up` in which only some ranks have values.

    Attributes:
        up: (rows, r), any float dtype.
        ranks: Which r of the sum's ranks these columns are, as ascending (first, end).
    """

    up: Tensor
    ranks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LowRankSum:
    """A sum of low-rank deltas, without the zeros that fused projections have.

    Attributes:
        down: (R, in), any float dtype.
        blocks: All rows of the output, in order.
    """

    down: Tensor
    blocks: tuple[RowBlock, ...]

    @classmethod
    def of(
        cls,
        pairs: Sequence[tuple[Tensor, Tensor]],
        supports: Sequence[Tensor] | None = None,
    ) -> LowRankSum:
        """Join pairs; ranks that have values in the same rows come to lie side by side.

        Args:
            pairs: (down (r, in), up (out, r)) with the scale in `up`, any float dtype, one device.
            supports: For each pair (parts, r) bool on the host: in which of the equal row parts a
                rank has values. None where nothing is known to be zero.
        """
        if supports is None:
            supports = [torch.ones((1, pair[0].shape[0]), dtype=torch.bool) for pair in pairs]
        parts = math.lcm(*(support.shape[0] for support in supports))
        runs = _runs(supports, parts)
        down = torch.cat([pairs[run.pair][0][run.first : run.end] for run in runs])
        if all(all(run.parts) for run in runs):
            parts, runs = 1, [replace(run, parts=(True,)) for run in runs]
        rows = pairs[0][1].shape[0] // parts
        blocks = []
        for part in range(parts):
            within = slice(part * rows, (part + 1) * rows)
            columns = [
                pairs[run.pair][1][within, run.first : run.end] for run in runs if run.parts[part]
            ]
            up = torch.cat(columns, dim=1) if columns else pairs[0][1][within, :0]
            blocks.append(RowBlock(up, _places(runs, part)))
        return cls(down, tuple(blocks))

    @property
    def rank(self) -> int:
        """Ranks of the sum."""
        return int(self.down.shape[0])

    @property
    def most(self) -> int:
        """The most ranks that the sum's matrix can have."""
        return min(self.rank, int(self.down.shape[1]), sum(b.up.shape[0] for b in self.blocks))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.down.nbytes + sum(block.up.nbytes for block in self.blocks)

    @property
    def form(self) -> tuple[object, ...]:
        """The form of sums that are compressed in one batch."""
        blocks = tuple((tuple(block.up.shape), block.ranks) for block in self.blocks)
        return (tuple(self.down.shape), self.down.device, blocks)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The whole halves (down (R, in), up (out, R)), float32."""
        ups = []
        for block in self.blocks:
            up = self.down.new_zeros((block.up.shape[0], self.rank), dtype=torch.float32)
            up[:, _index(block.ranks, up.device)] = block.up.to(torch.float32)
            ups.append(up)
        return self.down.to(torch.float32), torch.cat(ups)


@dataclass(frozen=True)
class _Run:
    """Neighbouring ranks of one pair that have values in the same parts."""

    parts: tuple[bool, ...]
    pair: int
    first: int
    end: int


def _runs(supports: Sequence[Tensor], parts: int) -> list[_Run]:
    """All ranks that have values, those of the same parts together, else in their order."""
    runs = []
    for pair, support in enumerate(supports):
        # (n, r), n a divisor of `parts` -> r tuples of `parts` values
        whole = support.repeat_interleave(parts // support.shape[0], dim=0).mT.tolist()
        end = 0
        for held, own in itertools.groupby(tuple(rank) for rank in whole):
            first, end = end, end + sum(1 for _ in own)
            if any(held):
                runs.append(_Run(held, pair, first, end))
    return sorted(runs, key=lambda run: run.parts, reverse=True)


def _places(runs: Sequence[_Run], part: int) -> tuple[tuple[int, int], ...]:
    """The places of the ranks that have values in a part."""
    places: list[tuple[int, int]] = []
    end = 0
    for run in runs:
        first, end = end, end + run.end - run.first
        if not run.parts[part]:
            continue
        if places and places[-1][1] == first:
            first = places.pop()[0]
        places.append((first, end))
    return tuple(places)


def _index(ranks: Sequence[tuple[int, int]], device: torch.device) -> slice | Tensor:
    """An index for these ranks: a view's where they lie side by side."""
    if len(ranks) == 1:
        return slice(*ranks[0])
    return torch.tensor([at for place in ranks for at in range(*place)], device=device).long()


def decomposed(sum_: LowRankSum) -> Truncation:
    """Decompose a sum whatever its condition; its cuts are optimal (Eckart and Young, 1936).

    With down^T = Qd Rd and up = Qu Ru the sum is Qu (Ru Rd^T) Qd^T, so the SVD of the small core is
    that of the sum; the sum itself is never formed. The singular values are shared evenly between
    the halves, which keeps both in the range of float16.

    Raises:
        torch.linalg.LinAlgError: A value is not finite, or too large to decompose.
    """
    down, up = sum_.pair()
    q_down, r_down = triangular(down.mT)
    q_up, r_up = triangular(up)
    left, values, right = singular(r_up @ r_down.mT)
    energies = values.to(torch.float64).square().cpu()
    total = float(energies.sum())
    tails = energies.flip(0).cumsum(0).flip(0) - energies
    least = ROUNDING * math.prod(float(torch.linalg.matrix_norm(r)) ** 2 for r in (r_down, r_up))
    kept = 1 - tails / total if total > least else torch.ones_like(energies)

    def halves(rank: int) -> tuple[Tensor, Tensor]:
        root = values[:rank].sqrt()
        down = root.unsqueeze(1) * (right[:rank] @ q_down.mT)
        return down, (q_up @ left[:, :rank]) * root

    return Truncation(kept, total, halves)


def iterated(sums: Sequence[LowRankSum], rank: int) -> list[Truncation | None]:
    """Find the `rank` strongest directions of sums of one form, nearly, in matrix products.

    From a fixed start, so that a result depends on nothing but its sum (and, on a GPU, on the
    number of sums in the batch). The energy lost is that of the result itself, |U D - Q Q^T U D|^2
    from the Gram matrices, not an estimate: true to about 1e-6 of the sum's energy, the rounding of
    float32.

    Args:
        sums: Sums of equal `form`.
        rank: Most ranks to find; at least 1.

    Returns:
        The truncations, in order; None for sums to decompose: small ones, and those that float32
        Gram matrices cannot hold (deltas that cancel, values near the limits of float32).
    """
    first = sums[0]
    if first.most <= sizes.current().exact_side or rank >= first.most:
        return [None] * len(sums)
    core = _Core.of(sums)
    basis = core.basis(rank)
    kept, energies = basis.kept.cpu(), core.energy.tolist()
    credible = core.reliable.cpu() & (kept[:, -1] > 0) & (kept[:, -1] < CREDIBLE)
    return [
        Truncation(kept[at], energies[at], functools.partial(basis.of_sum, sum_, at))
        if credible[at]
        else None
        for at, sum_ in enumerate(sums)
    ]


@dataclass(frozen=True)
class _Gram:
    """U^T U of the ranks that some rows of U have values in."""

    values: Tensor  # (n, r, r) float32
    ranks: slice | Tensor

    def add_product(self, total: Tensor, left: Tensor) -> None:
        """Add left (n, m, R) @ U^T U to a total (n, m, R)."""
        own = left[:, :, self.ranks]
        if isinstance(self.ranks, torch.Tensor):
            # What an index takes is a copy.
            total[:, :, self.ranks] += _product(own, self.values)
        elif len(total) == 1:
            total[0, :, self.ranks].addmm_(own[0], self.values[0])
        else:
            total[:, :, self.ranks].baddbmm_(own, self.values)


@dataclass(frozen=True)
class _Basis:
    """Directions of n sums, the strongest first.

    Attributes:
        into: (n, R, k): the result's `up` is U into.
        out_of: (n, k, R): its `down` is out_of D.
        kept: (n, k) float64: the share of the energy that the first 1, 2, ... directions keep.
    """

    into: Tensor
    out_of: Tensor
    kept: Tensor

    def of_sum(self, sum_: LowRankSum, at: int, rank: int) -> tuple[Tensor, Tensor]:
        """The halves (down, up) of the sum number `at`, cut to its first `rank` directions."""
        into, out_of = self.into[at, :, :rank], self.out_of[at, :rank]
        dtype = _product_dtype(sum_.down)
        into, out_of = into.to(dtype), out_of.to(dtype)
        ups = [block.up.to(dtype) @ into[_index(block.ranks, into.device)] for block in sum_.blocks]
        down = out_of @ sum_.down.to(dtype)
        return down, ups[0] if len(ups) == 1 else torch.cat(ups)


@dataclass(frozen=True)
class _Core:
    """The facts of n sums that a truncation needs, in the coordinates of their ranks.

    Every rank is scaled so that its two halves have one norm, which keeps the condition of `U^T U`
    near the root of the sum's; and the sum so that its energy is 1.

    Attributes:
        operator: (n, R, R) D D^T U^T U.
        grams: U^T U by blocks of rows.
        balance: (n, R) factor of each rank's `up`; its `down` has the inverse.
        energy: (n,) float64, before scaling.
        reliable: (n,) whether float32 holds these products.
    """

    operator: Tensor
    grams: tuple[_Gram, ...]
    balance: Tensor
    energy: Tensor
    reliable: Tensor

    @classmethod
    def of(cls, sums: Sequence[LowRankSum]) -> _Core:
        """Form the products, one sum at a time: no more than one sum is held widened."""
        downs = torch.stack([_gram(sum_.down) for sum_ in sums])
        grams = tuple(
            _Gram(
                torch.stack([_gram(sum_.blocks[at].up.mT) for sum_ in sums]),
                _index(block.ranks, downs.device),
            )
            for at, block in enumerate(sums[0].blocks)
        )
        own_down = _diagonal(downs)
        own_up = torch.zeros_like(own_down)
        for gram in grams:
            own_up[:, gram.ranks] += _diagonal(gram.values)
        alone = own_up * own_down
        balance = torch.where(alone > 0, (own_down / own_up).pow(0.25), 1.0).to(torch.float32)
        downs /= balance.unsqueeze(1)
        downs /= balance.unsqueeze(2)
        operator = torch.zeros_like(downs)
        for gram in grams:
            factor = balance[:, gram.ranks]
            gram.values.mul_(factor.unsqueeze(1)).mul_(factor.unsqueeze(2))
            gram.add_product(operator, downs)
        energy = _diagonal(operator).sum(dim=1)
        scale = (1 / energy).to(torch.float32).view(-1, 1, 1)
        operator *= scale
        for gram in grams:
            gram.values.mul_(scale)
        extents = torch.stack([own_up.sum(dim=1), own_down.sum(dim=1), energy], dim=1)
        reliable = ((extents > SMALLEST) & (extents < LARGEST)).all(dim=1)
        reliable &= energy > CANCELLED * alone.sum(dim=1)
        return cls(operator, grams, balance, energy, reliable)

    def basis(self, rank: int) -> _Basis:
        """The `rank` strongest directions of each sum, nearly."""
        count, ranks, _ = self.operator.shape
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(ranks, rank, generator=generator, dtype=torch.float32)
        start = start.to(self.operator.device)
        found = start.expand(count, -1, -1)
        for shift in sizes.current().shifts:
            if shift:
                image = _product(self.operator, found)
                image -= self._shift(found, image, shift) * found
            else:
                image = self._of_start(found)
            found = _orthonormal(image)
        into, out_of = self._projector(found)
        # Q = U into is orthonormal but for rounding, and out_of D = Q^T (U D).
        energies = _product(out_of, _product(self.operator, into)).to(torch.float64)
        overlaps = _product(out_of, into).to(torch.float64)
        own = energies.diagonal(dim1=1, dim2=2)
        # |A - Q B|^2 = |A|^2 - 2 tr(Q^T A B^T) + tr(Q^T Q B B^T), B = Q^T A; of every leading part
        twice = (overlaps * energies).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
        # Halves of one norm, the root of the singular value, in the sum's own scale.
        size = (own.clamp(min=0) / self.energy.unsqueeze(1)).pow(0.25).to(torch.float32)
        inverse = torch.where(size > 0, 1 / size, 0)
        return _Basis(
            into=self.balance.unsqueeze(2) * into * size.unsqueeze(1),
            out_of=inverse.unsqueeze(2) * out_of / self.balance.unsqueeze(1),
            kept=2 * own.cumsum(1) - twice,
        )

    def _of_start(self, start: Tensor) -> Tensor:
        """The operator's product with a random start: coarse where that is faster."""
        if start.device.type == "cpu" and _cpu_multiplies_bfloat16():
            coarse, start = self.operator.to(torch.bfloat16), start.to(torch.bfloat16)
            return _product(coarse, start).to(torch.float32)
        return _product(self.operator, start)

    def _shift(self, found: Tensor, image: Tensor, weight: float) -> Tensor:
        """(n, 1, 1): `weight` times the mean energy outside of a basis `found` (n, R, k).

        `image` is its product with the operator, of which each column is as long as its direction
        is strong, when it has nearly converged.
        """
        _, ranks, held = found.shape
        outside = 1 - (found * image).sum(dim=(1, 2), keepdim=True) - TRACE_NOISE
        # The operator is not symmetric: of a basis far from converged this may be anything.
        outside = torch.where((outside > 0) & (outside < 1), outside, 0)
        weakest = torch.linalg.vector_norm(image, dim=1, keepdim=True).amin(dim=2, keepdim=True)
        return torch.minimum(weight * outside / (ranks - held), weakest / 2)

    def _projector(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """P (n, R, k) and P^T U^T U of an orthonormal basis U P of the directions U found."""
        rows = torch.zeros_like(found.mT)
        for gram in self.grams:
            gram.add_product(rows, found.mT)
        wide = _product(rows, found).to(torch.float64)
        norm = sum(torch.linalg.matrix_norm(gram.values) for gram in self.grams)
        inverse = _inverse_factor(wide, GRAM_NOISE * norm)
        return _product(found, inverse.mT), _product(inverse, rows)


def _gram(half: Tensor) -> Tensor:
    """(r, n) -> (r, r) float32: products of rows; what lies below the panels is mirrored."""
    if half.device.type != "cpu":
        wide = half.to(torch.float32)
        return wide @ wide.mT
    own = half.to(_product_dtype(half))
    size, panel = own.shape[0], PANELS[own.dtype]
    gram = own.new_empty((size, size), dtype=torch.float32)
    for first in range(0, size, panel):
        end = min(first + panel, size)
        _row_products(own[first:end], own[first:], gram[first:end, first:])
        gram[end:, first:end] = gram[first:end, end:].mT
    return gram


def _row_products(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left (m, c) @ right (n, c)^T to `out` (m, n) float32.

    A bfloat16 product is a float32 one that is rounded last, so a second product, of what the first
    lost, brings 8 more bits. Both take half as long as one of float32.
    """
    if left.dtype == torch.float32:
        torch.mm(left, right.mT, out=out)
        return
    rounded = left @ right.mT
    out.copy_(torch.addmm(rounded, left, right.mT, beta=-1))
    out += rounded


def _product_dtype(half: Tensor) -> torch.dtype:
    """The dtype to multiply a sum's halves in.

    Where the CPU multiplies bfloat16 faster, halves that are, and will be, bfloat16 stay so: that
    rounds their factors as the result is rounded anyway.
    """
    if half.dtype == torch.bfloat16 and half.device.type == "cpu" and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Tell if the CPU has instructions for it; without them torch takes three times as long."""
    stated = sizes.current().cpu_multiplies_bfloat16
    if stated is not None:
        return stated
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return has is not None and bool(has())


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).to(torch.float64)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Products of n matrices; of one matrix the CPU's plain product, which is twice as fast."""
    if left.shape[0] == 1:
        return (left[0] @ right[0]).unsqueeze(0)
    return left @ right


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis (n, R, k), nested as Gram and Schmidt's: QR by Cholesky.

    The Gram matrix is float64, in which that of columns which float32 can tell apart is positive.
    Columns that are far from each other, as they are when they have nearly converged, do with
    float32; a GPU, which would have to be waited for, is not asked.
    """
    if columns.device.type == "cpu" and len(columns) == 1:
        found = _well_apart(columns[0])
        if found is not None:
            return found.unsqueeze(0)
    wide = columns.to(torch.float64)
    lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp(min=TINY)
    wide /= lengths
    inverse = _inverse_factor(_product(wide.mT, wide), RIDGE)
    return _product(wide.to(torch.float32), inverse.mT)


def _well_apart(columns: Tensor) -> Tensor | None:
    """The same of columns (R, k) of which none lies close to what is spanned before it."""
    lengths = torch.linalg.vector_norm(columns, dim=0)
    unit = columns / lengths
    lower, failed = torch.linalg.cholesky_ex(unit.mT @ unit)
    # What is left of each unit column beside those before it; NaN is no more than anything.
    if failed or not lower.diagonal().amin() > APART:
        return None
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    basis: Tensor = unit @ inverse.mT
    return basis


def _inverse_factor(gram: Tensor, shift: Tensor | float) -> Tensor:
    """The inverse of the Cholesky factor of gram (n, k, k) float64 + shift, float32."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal.add_(shift.unsqueeze(1) if isinstance(shift, torch.Tensor) else shift)
    # Does not raise, nor wait for the device: a sum that is not finite is found by its energy.
    lower, _ = torch.linalg.cholesky_ex(gram)
    unit = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
    return inverse.to(torch.float32)


def energy(sum_: LowRankSum) -> float:
    """Squared Frobenius norm of a sum, from its halves' Gram matrices."""
    core = _gram(sum_.down).double()
    total = 0.0
    for block in sum_.blocks:
        index = _index(block.ranks, core.device)
        # |U D|^2 = tr(U^T U D D^T)
        total += float((_gram(block.up.mT).double() * core[index][:, index]).sum())
    return max(0.0, total)
