"""A module's deltas to one pair: exactly, or truncated: optimally where that costs seconds at most.

The sum is formed in float32. Where a pair would be no smaller than the matrix, the matrix itself
is one half of it and the identity the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora import sizes
from qwenlora.delta.compress import LowRankSum, Truncation, decomposed, energy, iterated
from qwenlora.delta.pieces import same_dtype, stack_downs
from qwenlora.delta.scale import scaled_energy
from qwenlora.delta.truncate import of_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from qwenlora.delta.factors import Factors
    from qwenlora.merge.cut import Cut
    from qwenlora.merge.member import ModuleDelta

__all__ = ["Joined", "combine", "stacked"]


@dataclass(frozen=True)
class Joined:
    """The deltas of one module as one pair.

    Attributes:
        down: (r, in), in a stored dtype or float32.
        up: (out, r) float32, strengths and scales included.
        energy: Squared Frobenius norm of the whole sum; None where it was not asked for.
        energy_lost: That of what was cut off.
    """

    down: Tensor
    up: Tensor
    energy: float | None = None
    energy_lost: float = 0.0

    @property
    def rank(self) -> int:
        """Ranks of the pair."""
        return int(self.down.shape[0])


def combine(members: Sequence[ModuleDelta], sides: tuple[int, int], cut: Cut | None) -> Joined:
    """Join the deltas of one module.

    Args:
        members: At least one.
        sides: (out, in) of the module.
        cut: What is kept; None is exact.

    Raises:
        torch.linalg.LinAlgError: A tensor holds NaN or infinity, and the sum is to be cut.
    """
    if cut is not None and len(members) == 1 and members[0].is_spectral:
        return _lone(members[0], cut, min(sides))
    if any(member.has_full_rank(min(sides)) for member in members):
        return _of_dense(members, sides, cut)
    down, up = stacked(members)
    rank = down.shape[0]
    if cut is None:
        # A stored pair is kept, even one with more ranks than its module has.
        is_stored = len(members) == 1 and members[0].is_stored
        is_small = rank <= min(sides) or is_stored
        return Joined(down, up) if is_small else _of_dense(members, sides, cut)
    if cut.rank is not None and rank <= cut.rank:
        return Joined(down, up, energy=energy(LowRankSum.of([(down, up)])))
    # In float32, so that no product is rounded to what the file stores.
    return _of_sum(LowRankSum.of([(down.to(torch.float32), up)]), cut)


def stacked(members: Sequence[ModuleDelta]) -> tuple[Tensor, Tensor]:
    """All pairs side by side; members of equal `down` share its ranks, as `stack_downs` finds."""
    pairs = [member.factors() for member in members]
    starts, down = stack_downs(same_dtype([pair.down for pair in pairs]))
    # value x factor in float32
    scaled = [
        pair.up.to(torch.float32) * member.factor
        for member, pair in zip(members, pairs, strict=True)
    ]
    if len(set(starts)) == len(starts):
        return down, torch.cat(scaled, dim=1)
    up = torch.zeros(scaled[0].shape[0], down.shape[0])
    for own, start in zip(scaled, starts, strict=True):
        up[:, start : start + own.shape[1]] += own
    return down, up


def _of_sum(sum_: LowRankSum, cut: Cut) -> Joined:
    truncation = _truncation(sum_, cut)
    kept = cut.kept(truncation.kept)
    best = truncation.cut(truncation.kept.numel() if kept is None else kept)
    return Joined(best.down, best.up, best.energy, best.energy_lost * best.energy)


def _truncation(sum_: LowRankSum, cut: Cut) -> Truncation:
    """All directions of the sum; of a large one as many as the cut needs, near the optimum."""
    if sum_.rank > sizes.current().merge_exact_rank:
        most = cut.rank or sizes.current().merge_first_rank
        while most < sum_.most:
            (found,) = iterated([sum_], most)
            if found is None:
                break
            if cut.kept(found.kept) is not None:
                return found
            most *= 2
    return decomposed(sum_)


def _of_dense(members: Sequence[ModuleDelta], sides: tuple[int, int], cut: Cut | None) -> Joined:
    total = torch.zeros(sides)
    for member in members:
        total.add_(member.dense(), alpha=member.factor)
    if cut is not None:
        return _leading(functools.partial(of_matrix, total), cut, min(sides))
    out, columns = sides
    if columns <= out:
        return Joined(down=torch.eye(columns), up=total)
    return Joined(down=total, up=torch.eye(out))


def _lone(member: ModuleDelta, cut: Cut, side: int) -> Joined:
    full = min(side, member.piece.rank_bound)
    joined = _leading(member.truncated, cut, full)
    return Joined(
        joined.down,
        joined.up * member.factor,
        energy=scaled_energy(joined.energy or 0.0, member.factor),
        energy_lost=scaled_energy(joined.energy_lost, member.factor),
    )


def _leading(decompose: Callable[[int], Factors], cut: Cut, full: int) -> Joined:
    """Decompose as far as the cut needs to see, and cut.

    Args:
        decompose: Gives at most that number of leading ranks, in descending order.
        cut: What is kept.
        full: Ranks that leave nothing out.
    """
    most = min(full, cut.rank or sizes.current().merge_first_rank)
    best = decompose(most)
    shares, total = _spectrum(best)
    while most < full and cut.kept(shares) is None:
        most = min(full, 2 * most)
        best = decompose(most)
        shares, total = _spectrum(best)
    kept = cut.kept(shares)
    # All of it was asked for, or rounding leaves the last rank a hair short of enough.
    kept = best.rank if kept is None else kept
    return Joined(
        down=best.down[:kept],
        up=best.up[:, :kept],
        energy=total,
        energy_lost=max(0.0, total * (1 - float(shares[kept - 1]))),
    )


def _spectrum(best: Factors) -> tuple[Tensor, float]:
    """Shares (r,) float64 of the energy that the first 1, 2, ... ranks of a pair hold; all of it.

    The pair's directions are orthogonal, those of its largest singular values first.
    """
    norms = best.up.double().norm(dim=0) * best.down.double().norm(dim=1)
    held = norms.square().cumsum(0)
    total = float(held[-1]) if best.energy is None else best.energy
    return held / total if total > 0 else torch.ones_like(held), total
