"""Each slot's deltas: pairs are read, scaled, and brought under the slot's rank limit."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from qwenlora import cache
from qwenlora.delta.adapters.based import depends_on_weight
from qwenlora.delta.base import SlotBase
from qwenlora.delta.change import weight_change
from qwenlora.delta.diagonal import summed
from qwenlora.delta.limit import Limiter, rank_taken
from qwenlora.delta.loss import LoraShare, WholeDelta
from qwenlora.delta.outcome import SlotOutcome
from qwenlora.delta.pieces import LoraPieces, fetch_pieces
from qwenlora.delta.scale import (
    scaled,
    scaled_dense,
    scaled_kron,
    scaled_matrix,
    scaled_values,
)
from qwenlora.delta.slot_deltas import BuiltSlot, SlotDeltas
from qwenlora.plan.documents import Route

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from qwenlora.delta.diagonal import DiagonalDelta
    from qwenlora.delta.limit import Fitted
    from qwenlora.delta.parts import ScaledPart
    from qwenlora.delta.pieces import Refusal
    from qwenlora.delta.rotation import RotationDelta
    from qwenlora.delta.scale import ScaledPair
    from qwenlora.model.target import Target
    from qwenlora.plan.documents import Piece, SlotPlan
    from qwenlora.source.source import LoraSource, TensorFetcher
    from qwenlora.spec import ComposeOptions, LoraSpec, MaxRank

__all__ = ["DeltaBuilder"]


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
        base_of: Callable[[Target], SlotBase] = SlotBase,
    ) -> None:
        self._base_of = base_of
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
    ) -> list[BuiltSlot]:
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
        base = self._base_of(target)
        sum_ = _SlotSum(target, base, Route.INSIDE if plan is None else plan.route)
        if plan is not None:
            for lora, pieces in _by_lora(plan):
                own = self._pieces(lora, pieces, plan, target, base)
                sum_.add(lora, own, self._specs[lora].strength_at(plan.path))
        sum_.hand_over(limiter, None if plan is None else plan.rank_limit)
        return sum_

    def _pieces(
        self, lora: int, pieces: Sequence[Piece], plan: SlotPlan, target: Target, base: SlotBase
    ) -> LoraPieces:
        source = self._sources[lora]
        limit = self._options.max_energy_lost
        fetcher = self._fetchers[lora]
        if not source.cacheable:
            return fetch_pieces(pieces, target, fetcher, base=base, max_energy_lost=limit)
        # The same file may meet models of other sizes and row orders, of which other parts fit,
        # and settings that lead to other pieces.
        sizes = (target.row.in_features, target.row.out_features)
        parts = tuple(
            (p.target, p.row_begin, p.kind, p.rank_budget, p.scale, p.parameter) for p in pieces
        )
        # What is made of the weight is this model's alone.
        of_model = base.key if any(depends_on_weight(piece) for piece in pieces) else None
        key = (source.identity, plan.path, plan.kind, plan.row_order, sizes, parts, limit, of_model)
        own = cache.pieces.get(key)
        if not isinstance(own, LoraPieces):
            own = fetch_pieces(pieces, target, fetcher, base=base, max_energy_lost=limit)
            cache.pieces.put(key, own, limit_bytes=self._options.cache_bytes)
        return own


class _SlotSum:
    """The deltas of a slot while its LoRAs are added one by one."""

    def __init__(self, target: Target, base: SlotBase, route: Route) -> None:
        self._target = target
        self._base = base
        self._route = route
        # Ranks beside a layer need no padding.
        self._carrier = target if route is Route.INSIDE else target._replace(place=None)
        self._diagonals: list[tuple[DiagonalDelta, float]] = []
        self._rotations: list[tuple[RotationDelta, float]] = []
        self._pairs: list[ScaledPair] = []
        self._supports: list[Tensor] = []
        self._krons: list[ScaledPart] = []
        self._dense: Tensor | None = None
        self._values: dict[str, Tensor] = {}
        self._shares: list[LoraShare] = []
        self._rows: list[tuple[int, tuple[int, int]]] = []
        self._zero: list[int] = []
        self._thirded: list[int] = []
        self._refused: list[tuple[int, Refusal]] = []
        self._estimated: list[tuple[int, str]] = []

    def add(self, lora: int, own: LoraPieces, strength: float) -> None:
        """Add one LoRA's pieces at its strength."""
        target = self._target
        self._refused += [(lora, refusal) for refusal in own.refused]
        self._estimated += [(lora, module) for module in own.estimated]
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
        self._krons += [scaled_kron(kron, strength, target) for kron in own.krons]
        if own.dense is not None:
            dense = scaled_matrix(own.dense.to(target.device), strength)
            self._dense = dense if self._dense is None else self._dense + dense
        self._diagonals += [(diagonal, strength) for diagonal in own.diagonals]
        self._rotations += [(rotation, strength) for rotation in own.rotations]
        for value in own.values:
            delta = scaled_values(value.delta, strength)
            before = self._values.get(value.parameter)
            self._values[value.parameter] = delta if before is None else before + delta

    def hand_over(self, limiter: Limiter, rank_limit: int | None) -> None:
        """Give the low-rank deltas away, to be brought under their limit."""
        limiter.add(self._carrier, self._pairs, self._supports, rank_limit, self._whole())
        self._pairs, self._supports, self._shares = [], [], []

    def _whole(self) -> WholeDelta | None:
        """The whole delta where pairs are not all of it or were cut before their sum, or None."""
        acts = bool(self._diagonals or self._rotations)
        beside = bool(self._krons) or self._dense is not None or acts
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
        change = self._change if acts else None
        return WholeDelta(self._target, shares, krons, self._dense, change, shared)

    def _change(self) -> Tensor:
        """(N, K) float32: what factors and rotations change in the layer's weight."""
        weight = self._base.weight
        rows = weight.rows(0, weight.rows_total)
        return weight_change(rows, self._diagonals, self._rotations)

    def finish(self, fitted: Fitted) -> BuiltSlot:
        """The slot's deltas, the low-rank ones as they came back, and their outcome."""
        # Equal shapes in one order: a slot of another block is copied into the same buffers.
        dense = [] if self._dense is None else [scaled_dense(self._dense, self._target)]
        own = [*self._krons, *dense, *self._of_output()]
        parts = tuple(sorted(own, key=lambda part: part.shape))
        deltas = SlotDeltas(
            target=self._target,
            pairs=fitted.pairs,
            rank_added=sum(rank_taken(pair, self._carrier) for pair in fitted.pairs),
            parts=parts,
            room=tuple(part.shape for part in parts),
            route=self._route,
            values=self._values,
        )
        return BuiltSlot(deltas, self._outcome(deltas, fitted))

    def _of_output(self) -> list[ScaledPart]:
        """What acts on the layer's own output or input: factors summed, rotations one by one."""
        diagonals = summed(self._diagonals)
        if not diagonals and not self._rotations:
            return []
        target = self._target
        bias = self._base.bias(self._values)
        kept = self._base.kept_bias(self._values)
        parts: list[ScaledPart] = []
        dtype, device = target.dtype, target.device
        for diagonal in diagonals:
            parts += diagonal.scaled_parts(1.0, dtype=dtype, device=device, bias=bias, kept=kept)
        for rotation, strength in self._rotations:
            parts += rotation.scaled_parts(strength, dtype=dtype, device=device, bias=bias)
        return parts

    def _outcome(self, deltas: SlotDeltas, fitted: Fitted) -> SlotOutcome:
        return SlotOutcome(
            targets=(self._target,),
            rank=sum(pair.rank for pair in deltas.pairs),
            rank_added=deltas.rank_added,
            rank_exact=fitted.rank_exact,
            krons=len(self._krons),
            dense=self._dense is not None,
            room=deltas.room,
            values=tuple(deltas.values),
            energy_lost=fitted.energy_lost,
            energy=fitted.energy,
            energy_is_bound=fitted.is_bound,
            zero=tuple(self._zero),
            thirded=tuple(self._thirded),
            refused=tuple(self._refused),
            estimated=tuple(self._estimated),
        )


def _by_lora(plan: SlotPlan) -> Iterator[tuple[int, list[Piece]]]:
    for lora, pieces in itertools.groupby(plan.pieces, key=lambda piece: piece.lora):
        yield lora, list(pieces)
