"""What each slot will carry: pairs read, scaled, and brought under the slot's rank limit."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from qwenlora import cache
from qwenlora.branch import KronShape, ScaledDense, ScaledKron
from qwenlora.errors import NonFiniteError
from qwenlora.limit import Fitted, Limiter, MaxRank, rank_taken
from qwenlora.loss import LoraShare, WholeDelta
from qwenlora.pending import Pending
from qwenlora.pieces import LoraPieces, Refusal, ScaledPair, fetch_pieces, scaled

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.arena import SlotFactors
    from qwenlora.plan import Piece, SlotPlan
    from qwenlora.source import LoraSource, TensorFetcher
    from qwenlora.spec import ComposeOptions, LoraSpec
    from qwenlora.targets import Target

__all__ = ["DeltaBuilder", "GroupDeltas", "SlotDeltas", "non_finite", "require_finite", "uniform"]

NO_FACTORS: Pending[SlotFactors] = Pending.ready(((), ()))


@dataclass(frozen=True)
class SlotDeltas:
    """One slot's deltas, ready to be written.

    Attributes:
        target: The slot.
        pairs: The deltas in stack order, in the slot's dtype, on its device.
        rank: Ranks of the deltas, without padding.
        rank_added: Ranks that the slot will hold beyond its base.
        krons: Kronecker products that run beside the layer, in the slot's dtype.
        kron_room: Shapes of those that the layer holds; more than `krons` where offload wants every
            block to hold the same.
        kron_count: How many the LoRAs brought.
        dense: A matrix that runs beside a plain linear.
        dense_held: Whether the layer holds one.
        values: What is added to stored parameters, by name: float64, in storage order.
        energy_lost: Share of the whole delta's energy that truncation dropped; None where there was
            none.
        energy: Energy of the whole delta, where it had to be known.
        energy_is_bound: Whether both are at most so, instead of measured.
        rank_exact: Ranks that the slot would hold for the exact sum.
        zero: Indices of LoRAs whose delta here is all zero, hence left out exactly.
        thirded: Indices of LoRAs whose alpha here may be a third of what is meant.
        refused: (LoRA, module) left out for what they would lose.
    """

    target: Target
    pairs: tuple[ScaledPair, ...] = ()
    rank: int = 0
    rank_added: int = 0
    krons: tuple[ScaledKron, ...] = ()
    kron_room: tuple[KronShape, ...] = ()
    dense: ScaledDense | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    energy_lost: float | None = None
    zero: tuple[int, ...] = ()
    thirded: tuple[int, ...] = ()
    refused: tuple[tuple[int, Refusal], ...] = ()
    dense_held: bool = False
    kron_count: int = 0
    energy: float | None = None
    energy_is_bound: bool = False
    rank_exact: int = 0

    @property
    def composed(self) -> bool:
        """Whether the slot differs from its base."""
        return bool(self.rank_added or self.kron_room or self.dense_held or self.values)

    @property
    def nbytes(self) -> int:
        """Bytes that the slot's tensors grow by; swapped values take the old ones' place."""
        row = self.target.row
        elements = sum(shape.elements for shape in self.kron_room)
        elements += row.in_features * row.out_features if self.dense_held else 0
        return elements * row.element_bytes + self.target.rank_bytes * self.rank_added

    @property
    def saved_bytes(self) -> int:
        """Bytes that the exact sum would take beyond these."""
        return self.target.rank_bytes * max(0, self.rank_exact - self.rank_added)

    def tensors(self) -> list[Tensor]:
        """All that will be written beside the base, for checking."""
        pairs = [half for pair in self.pairs for half in (pair.down, pair.up)]
        factors = [factor for kron in self.krons for factor in (kron.w1, kron.w2)]
        dense = [] if self.dense is None else [self.dense.values]
        return pairs + factors + dense + list(self.values.values())

    def without_tensors(self) -> SlotDeltas:
        """The record of deltas whose tensors have been copied into place."""
        return replace(
            self,
            pairs=(),
            krons=(),
            dense=None,
            values=dict.fromkeys(self.values, torch.empty(0)),
        )


@dataclass(frozen=True)
class GroupDeltas:
    """The deltas of slots that are alike, joined to their bases, ready to be put in place.

    Attributes:
        targets: The slots.
        rank: Ranks of the deltas, without padding.
        rank_added: Ranks that each slot will hold beyond its base.
        factors: Every slot's new `down` and `up`; none in the record of what is in place.
    """

    targets: tuple[Target, ...]
    rank: int
    rank_added: int
    factors: Pending[SlotFactors] = NO_FACTORS

    @property
    def composed(self) -> bool:
        """Whether the slots differ from their bases."""
        return self.rank_added > 0

    @property
    def nbytes(self) -> int:
        """Bytes that the slots' tensors grow by."""
        return sum(target.rank_bytes for target in self.targets) * self.rank_added

    @property
    def saved_bytes(self) -> int:
        """None: such slots hold the exact sums."""
        return 0

    def without_tensors(self) -> GroupDeltas:
        """The record of deltas that are in place."""
        return replace(self, factors=NO_FACTORS)


class DeltaBuilder:
    """Builds the deltas of one composition."""

    def __init__(
        self,
        specs: Sequence[LoraSpec],
        sources: Sequence[LoraSource],
        fetchers: Sequence[TensorFetcher],
        options: ComposeOptions,
        *,
        max_rank: MaxRank,
    ) -> None:
        self._specs = specs
        self._max_rank = max_rank
        self._sources = sources
        self._fetchers = fetchers
        self._options = options

    def build(
        self,
        members: Sequence[tuple[Target, SlotPlan | None]],
        *,
        before_slot: Callable[[], None],
        before_batch: Callable[[int], None],
    ) -> list[SlotDeltas]:
        """Read, scale and bring under their limits the pieces of one path's slots.

        Args:
            members: The slots with their plans; without a plan a slot returns to its base.
            before_slot: Called before each slot is read.
            before_batch: Told, before sums are compressed, how many slots of the path are done.

        Raises:
            NonFiniteError: A sum that must be decomposed holds NaN or infinity.
        """
        limiter = Limiter(self._max_rank, before_batch)
        sums = []
        for target, plan in members:
            before_slot()
            sums.append(self._sum(target, plan, limiter))
        return [sum_.finish(own) for sum_, own in zip(sums, limiter.finish(), strict=True)]

    def _sum(self, target: Target, plan: SlotPlan | None, limiter: Limiter) -> _SlotSum:
        sum_ = _SlotSum(target)
        if plan is not None:
            for lora, pieces in _by_lora(plan):
                own = self._pieces(lora, pieces, plan, target)
                sum_.add(lora, own, self._specs[lora].strength)
        sum_.hand_over(limiter, None if plan is None else plan.rank_limit)
        return sum_

    def _pieces(
        self, lora: int, pieces: Sequence[Piece], plan: SlotPlan, target: Target
    ) -> LoraPieces:
        source = self._sources[lora]
        limit = self._options.max_energy_lost
        fetcher = self._fetchers[lora]
        if not source.cacheable:
            return fetch_pieces(pieces, plan, target, fetcher, max_energy_lost=limit)
        # The same file may meet models of other sizes and row orders, of which other parts fit,
        # and settings that lead to other pieces.
        sizes = (target.row.in_features, target.row.out_features)
        parts = tuple(
            (p.target, p.row_begin, p.kind, p.rank_budget, p.scale, p.parameter) for p in pieces
        )
        key = (source.identity, plan.path, plan.kind, plan.row_order, sizes, parts, limit)
        own = cache.pieces.get(key)
        if not isinstance(own, LoraPieces):
            own = fetch_pieces(pieces, plan, target, fetcher, max_energy_lost=limit)
            cache.pieces.put(key, own, limit_bytes=self._options.cache_bytes)
        return own


class _SlotSum:
    """The deltas of a slot while its LoRAs are added one by one."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._pairs: list[ScaledPair] = []
        self._supports: list[Tensor] = []
        self._krons: list[ScaledKron] = []
        self._dense: Tensor | None = None
        self._values: dict[str, Tensor] = {}
        self._shares: list[LoraShare] = []
        self._rows: list[tuple[int, tuple[int, int]]] = []
        self._zero: list[int] = []
        self._thirded: list[int] = []
        self._refused: list[tuple[int, Refusal]] = []

    def add(self, lora: int, own: LoraPieces, strength: float) -> None:
        """Add one LoRA's pieces at its strength."""
        target = self._target
        self._refused += [(lora, refusal) for refusal in own.refused]
        if own.pair is not None and own.pair.thirded:
            self._thirded.append(lora)
        if own.zero:
            self._zero.append(lora)
            return
        if own.pair is not None and not own.pair.zero:
            pair = scaled(own.pair, strength, dtype=target.dtype, device=target.device)
            self._pairs.append(pair)
            self._supports.append(own.pair.scale != 0)
            self._shares.append(LoraShare(lora, strength, pair, own.cuts))
        if own.krons or own.dense is not None or not (own.pair is None or own.pair.zero):
            self._rows += [(lora, rows) for rows in own.rows]
        self._krons += [ScaledKron.of(kron, strength, target) for kron in own.krons]
        if own.dense is not None:
            dense = own.dense.to(target.device) * strength
            self._dense = dense if self._dense is None else self._dense + dense
        for value in own.values:
            delta = value.delta * strength
            before = self._values.get(value.parameter)
            self._values[value.parameter] = delta if before is None else before + delta

    def hand_over(self, limiter: Limiter, rank_limit: int | None) -> None:
        """Give the low-rank deltas away, to be brought under their limit."""
        limiter.add(self._target, self._pairs, self._supports, rank_limit, self._whole())
        self._pairs, self._supports, self._shares = [], [], []

    def _whole(self) -> WholeDelta | None:
        """All of it, where the low-rank deltas are not all, or were cut before they are summed."""
        beside = bool(self._krons) or self._dense is not None
        if not self._shares or not (beside or any(share.cuts for share in self._shares)):
            return None
        # One file may be in the stack twice: its deltas are the same objects, of two LoRAs.
        shared = frozenset(
            (share.lora, at)
            for share in self._shares
            for at, cut in enumerate(share.cuts)
            if not cut.lone
            or any(cut.overlaps(rows) for lora, rows in self._rows if lora != share.lora)
        )
        shares, krons = tuple(self._shares), tuple(self._krons)
        return WholeDelta(self._target, shares, krons, self._dense, shared)

    def finish(self, fitted: Fitted) -> SlotDeltas:
        """The slot's deltas, the low-rank ones as they came back."""
        target, pairs = self._target, fitted.pairs
        # Equal shapes in one order: a slot of another block is copied into the same buffers.
        krons = tuple(sorted(self._krons, key=lambda kron: kron.shape))
        return SlotDeltas(
            target=target,
            pairs=pairs,
            rank=sum(pair.rank for pair in pairs),
            rank_added=sum(rank_taken(pair, target) for pair in pairs),
            rank_exact=fitted.rank_exact,
            krons=krons,
            kron_room=tuple(kron.shape for kron in krons),
            kron_count=len(krons),
            dense=None if self._dense is None else ScaledDense.of(self._dense, target),
            dense_held=self._dense is not None,
            values=self._values,
            energy_lost=fitted.energy_lost,
            energy=fitted.energy,
            energy_is_bound=fitted.is_bound,
            zero=tuple(self._zero),
            thirded=tuple(self._thirded),
            refused=tuple(self._refused),
        )


def uniform(deltas: Sequence[SlotDeltas]) -> list[SlotDeltas]:
    """Give slots of one offload buffer the same tensors; what a slot lacks is zero."""
    rank = max(d.rank_added for d in deltas)
    room: Counter[KronShape] = Counter()
    for d in deltas:
        room |= Counter(d.kron_room)
    shapes = tuple(sorted(room.elements()))
    exact = max(d.rank_exact for d in deltas)
    return [replace(d, rank_added=rank, rank_exact=exact, kron_room=shapes) for d in deltas]


def require_finite(built: Sequence[SlotDeltas]) -> None:
    """Check the deltas of several slots with one device synchronisation.

    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    """
    held = [(deltas.target, tensor) for deltas in built for tensor in deltas.tensors()]
    if not held:
        return
    # Extremes propagate NaN and are one pass over memory, unlike isfinite.
    device = held[0][0].device
    extremes = [torch.stack(torch.aminmax(tensor)).to(device, torch.float32) for _, tensor in held]
    finite = torch.isfinite(torch.stack(extremes)).all(dim=1).tolist()
    for (target, _), ok in zip(held, finite, strict=True):
        if not ok:
            raise non_finite(target)


def non_finite(target: Target) -> NonFiniteError:
    """What is raised where a slot's delta holds NaN or infinity."""
    return NonFiniteError(
        f"`{target.path}` would hold NaN or infinity in {target.dtype}"
        "\nhint: a LoRA of the stack is damaged, or its strength is too high"
    )


def _by_lora(plan: SlotPlan) -> Iterator[tuple[int, list[Piece]]]:
    for lora, pieces in itertools.groupby(plan.pieces, key=lambda piece: piece.lora):
        yield lora, list(pieces)
