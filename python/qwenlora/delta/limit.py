"""Bringing the sums of slots under their rank limits: exactly where they fit, else by batches.

With `max_rank="auto"` a slot's rank is weighed against the error. Rank is what a stack costs at
every step: memory, time in the kernels and, under offload, bytes over the bus are all proportional
to it. So each slot takes the rank r, a multiple of 16, at which

    energy lost(r) + AUTO_PRICE * r / (ranks of the exact sum)

is least, and stays exact where no r is below AUTO_PRICE: giving up all of the rank would be worth
AUTO_PRICE of the energy, half of it half as much. The energy is that of the sum of what becomes
rank. No slot loses more than AUTO_PRICE of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qwenlora import sizes
from qwenlora.delta.balance import balanced
from qwenlora.delta.compress import LowRankSum, decomposed, energy, iterated
from qwenlora.delta.finite import is_finite, non_finite
from qwenlora.delta.loss import Loss
from qwenlora.delta.scale import ScaledPair
from qwenlora.errors import NonFiniteError
from qwenlora.packing.layout import RANK_MULTIPLE, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor

    from qwenlora.delta.compress import Truncation
    from qwenlora.delta.loss import WholeDelta
    from qwenlora.model.target import Target
    from qwenlora.spec import MaxRank

__all__ = ["AUTO_PRICE", "Fitted", "Limiter", "rank_taken", "worthwhile_rank"]


AUTO_PRICE = 0.05
"""The share of a slot's energy that all of its rank is worth.

Half of what trained LoRAs were seen to lose without effect on their training loss: beyond the
directions that they learnt, the tail of their spectrum is noise (docs/performance.md).
"""
AUTO_SHARES = (0.25, 0.5, 0.75)
"""Auto looks at ranks up to a quarter of the exact sum's, then further: most of a cut is found
early, and a sum that needs more than the last of these is left exact."""


@dataclass(frozen=True)
class Fitted:
    """A slot's low-rank deltas under its limit.

    Attributes:
        pairs: The deltas in the slot's dtype.
        rank_exact: Ranks that the slot would hold for the exact sum.
        energy_lost: Share of the energy that truncation dropped; None where there was none.
        energy: Energy of the sum, or of the slot's whole delta where that was given; None where it
            was not needed.
        is_bound: Whether both are at most so, instead of measured.
    """

    pairs: tuple[ScaledPair, ...]
    rank_exact: int
    energy_lost: float | None = None
    energy: float | None = None
    is_bound: bool = False


@dataclass(frozen=True)
class _Waiting:
    """A sum that has to be decomposed.

    Attributes:
        at: Its place among all.
        exact: What the slot carries where no rank is given up; None where that is too much.
        whole: What the sum is a part of, where it is not all of it.
    """

    at: int
    target: Target
    sum_: LowRankSum
    limit: int
    rank_exact: int
    exact: tuple[ScaledPair, ...] | None
    whole: WholeDelta | None

    @property
    def rank_needed(self) -> int:
        """Ranks that the exact sum takes without padding between its deltas."""
        return round_up(self.sum_.rank, RANK_MULTIPLE)

    @property
    def form(self) -> Hashable:
        """The form that all sums of a batch share."""
        return (self.sum_.form, self.limit, self.rank_exact, self.exact is None)

    @property
    def nbytes(self) -> int:
        """Bytes held until its batch is done: the halves, and some matrices of all its ranks."""
        ranks = self.sum_.rank
        exact = sum(pair.nbytes for pair in self.exact or ())
        exact += 0 if self.whole is None else self.whole.nbytes
        return self.sum_.nbytes + exact + 4 * ranks * (3 * ranks + 8 * min(self.limit, ranks))


class Limiter:
    """Takes the slots of one path one by one; decomposes those over their limit batch by batch.

    On the CPU a batch is one sum, which makes the result independent of what else is composed.
    """

    def __init__(self, max_rank: MaxRank, before_batch: Callable[[int], None]) -> None:
        """`before_batch` is told how many slots are done; what it raises ends the work."""
        self._auto = max_rank == "auto"
        self._before_batch = before_batch
        self._done: dict[int, Fitted] = {}
        self._waiting: list[_Waiting] = []
        self._added = 0

    def add(
        self,
        target: Target,
        pairs: Sequence[ScaledPair],
        supports: Sequence[Tensor],
        limit: int | None,
        whole: WholeDelta | None = None,
    ) -> None:
        """Take the next slot's deltas.

        Args:
            target: The slot.
            pairs: Its deltas, in the slot's dtype.
            supports: For each (parts, r) bool on the host: in which of the slot's equal row parts a
                rank has values.
            limit: Most ranks; None for any number.
            whole: All that the slot's LoRAs ask of it, where these are not all of it: what is lost
                is then measured against it.
        """
        at = self._added
        self._added += 1
        rank = sum(pair.rank for pair in pairs)
        taken = sum(rank_taken(pair, target) for pair in pairs)
        fits = limit is None or (rank <= limit and taken <= round_up(limit, RANK_MULTIPLE))
        if fits and not (self._auto and taken > RANK_MULTIPLE):
            self._done[at] = _stated(Fitted(tuple(pairs), taken), whole)
        elif not fits and limit is not None and rank <= limit:
            self._done[at] = _stated(Fitted((_closed(pairs),), taken), whole)
        else:
            sum_ = LowRankSum.of(_halves(pairs), supports)
            exact = self._exact(pairs, target) if fits else None
            most = rank if limit is None else limit
            self._wait(_Waiting(at, target, sum_, most, taken, exact, whole))

    def finish(self) -> list[Fitted]:
        """All slots, in the order in which they were added."""
        self._decompose()
        return [self._done[at] for at in range(self._added)]

    def _exact(self, pairs: Sequence[ScaledPair], target: Target) -> tuple[ScaledPair, ...]:
        """The deltas without loss, and without the padding between them where that is a tile."""
        rank = sum(pair.rank for pair in pairs)
        taken = sum(rank_taken(pair, target) for pair in pairs)
        tight = self._auto and round_up(rank, RANK_MULTIPLE) < taken
        return (_closed(pairs),) if tight else tuple(pairs)

    def _wait(self, sum_: _Waiting) -> None:
        if sum_.nbytes + sum(other.nbytes for other in self._waiting) > sizes.current().batch_bytes:
            self._decompose()
        self._waiting.append(sum_)
        if not _in_batches(sum_.target.device):
            self._decompose()

    def _decompose(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._before_batch(len(self._done))
        for batch in _grouped(waiting):
            done = _thrifty(batch) if self._auto else _limited(batch)
            for own in batch:
                self._done[own.at] = _stated(done[own.at], own.whole)


def _in_batches(device: torch.device) -> bool:
    """Tell if many small products at once pay: on the CPU one sum fills all cores."""
    return device.type != "cpu" or sizes.current().cpu_batches


def _grouped(waiting: Sequence[_Waiting]) -> list[list[_Waiting]]:
    groups: dict[Hashable, list[_Waiting]] = defaultdict(list)
    for sum_ in waiting:
        groups[sum_.form].append(sum_)
    return list(groups.values())


def _limited(batch: Sequence[_Waiting]) -> dict[int, Fitted]:
    """Cut the sums to their limit."""
    if not batch:
        return {}
    found = _truncations(batch, batch[0].limit)
    return {w.at: _cut(w, truncation, w.limit) for w, truncation in zip(batch, found, strict=True)}


def _thrifty(batch: Sequence[_Waiting]) -> dict[int, Fitted]:
    """Cut the sums to the ranks that are worth their price."""
    done: dict[int, Fitted] = {}
    left = list(batch)
    over: list[_Waiting] = []
    for share in AUTO_SHARES:
        most = min(batch[0].limit, _tiles(share * batch[0].sum_.rank))
        undecided: list[_Waiting] = []
        for w, truncation in zip(left, _truncations(left, most), strict=True):
            complete = truncation.kept.numel() == w.sum_.most
            last = complete or share == AUTO_SHARES[-1] or _is_flat(truncation, w)
            rank = worthwhile_rank(truncation, w.limit, w.rank_needed)
            if rank is not None and (last or rank < most):
                done[w.at] = _cut(w, truncation, rank)
            elif last and w.exact is not None:
                done[w.at] = Fitted(w.exact, w.rank_exact, energy=truncation.energy)
            else:
                (over if last else undecided).append(w)
        left = undecided
    return done | _limited(over)


def worthwhile_rank(
    truncation: Truncation, limit: int, rank_exact: int, *, price: float = AUTO_PRICE
) -> int | None:
    """The rank at which energy lost and the price of rank are least together.

    Args:
        truncation: The sum's directions.
        limit: Most ranks.
        rank_exact: Ranks that the exact sum takes.
        price: Share of the energy that all of them are worth.

    Returns:
        A multiple of 16 below `rank_exact`; None where exactness is worth its price.
    """
    best, least = None, price
    most = min(truncation.kept.numel(), limit, rank_exact - 1)
    for rank in range(RANK_MULTIPLE, most + 1, RANK_MULTIPLE):
        total = truncation.lost(rank) + price * rank / rank_exact
        if total < least:
            best, least = rank, total
    return best


def _is_flat(truncation: Truncation, waiting: _Waiting) -> bool:
    """Tell if no rank that is left to look at can be worth its price.

    No later direction is larger than the last that was found.
    """
    found = truncation.kept.numel()
    last = float(truncation.kept[-1] - truncation.kept[-2])
    later = _tiles(AUTO_SHARES[-1] * waiting.sum_.rank) - found
    least = truncation.lost(found) - later * last
    return least + AUTO_PRICE * found / waiting.rank_needed > AUTO_PRICE


def _tiles(ranks: float) -> int:
    return round_up(math.ceil(ranks), RANK_MULTIPLE)


def _truncations(batch: Sequence[_Waiting], rank: int) -> list[Truncation]:
    found = iterated([w.sum_ for w in batch], rank) if batch else []
    return [
        _decomposed(w) if truncation is None else truncation
        for w, truncation in zip(batch, found, strict=True)
    ]


def _decomposed(waiting: _Waiting) -> Truncation:
    """Decompose one sum, naming its slot where that cannot be done."""
    target, sum_ = waiting.target, waiting.sum_
    try:
        return decomposed(sum_)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        if all(map(is_finite, (sum_.down, *(block.up for block in sum_.blocks)))):
            raise NonFiniteError(f"`{target.path}`: its deltas are too large to sum") from error
        raise non_finite(target) from error


def _cut(waiting: _Waiting, truncation: Truncation, rank: int) -> Fitted:
    best = truncation.cut(rank)
    halves = balanced(best.down.float(), best.up.float(), waiting.target.dtype)
    return Fitted((ScaledPair(*halves),), waiting.rank_exact, best.energy_lost, best.energy)


def _closed(pairs: Sequence[ScaledPair]) -> ScaledPair:
    """Only the padding between the LoRAs is too much: closing the gaps is exact."""
    downs, ups = [pair.down for pair in pairs], [pair.up for pair in pairs]
    return ScaledPair(torch.cat(downs), torch.cat(ups, dim=1))


def _halves(pairs: Sequence[ScaledPair]) -> list[tuple[Tensor, Tensor]]:
    return [(pair.down, pair.up) for pair in pairs]


def rank_taken(pair: ScaledPair, target: Target) -> int:
    """Ranks that a pair takes in a slot, with padding."""
    return round_up(pair.rank, target.rank_multiple)


def _stated(fitted: Fitted, whole: WholeDelta | None) -> Fitted:
    """The same with what is lost of the slot's whole delta."""
    if whole is None or not (whole.is_cut or fitted.energy is not None):
        return fitted
    if whole.is_plain:
        loss = _added_up(fitted, whole.cut_energy)
    else:
        loss = whole.loss(fitted.pairs)
    share = loss.share if whole.is_cut or fitted.energy_lost is not None else None
    return replace(fitted, energy_lost=share, energy=loss.energy, is_bound=loss.is_bound)


def _added_up(fitted: Fitted, cut: float) -> Loss:
    """Add up losses: a part that was cut off is orthogonal to the kept sum."""
    summed = fitted.energy
    if summed is None:
        sum_ = LowRankSum.of(_halves(fitted.pairs)) if fitted.pairs else None
        summed = 0.0 if sum_ is None else energy(sum_)
    total = summed + cut
    lost = summed * (fitted.energy_lost or 0.0) + cut
    return Loss(total, lost / total if total > 0 else 0.0)
