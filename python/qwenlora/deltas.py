"""What each slot will carry: pairs read, scaled, and brought under the slot's rank limit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qwenlora import cache
from qwenlora.compress import compress
from qwenlora.errors import NonFiniteError
from qwenlora.layout import RANK_MULTIPLE, LowRankSide, round_up
from qwenlora.pack import pack_lowrank
from qwenlora.pieces import LoraPair, ScaledPair, fuse, scaled, unpacked
from qwenlora.plan import SlotKind

if TYPE_CHECKING:
    from qwenlora.plan import Piece, SlotPlan
    from qwenlora.source import LoraSource, TensorFetcher
    from qwenlora.spec import LoraSpec
    from qwenlora.targets import Target

__all__ = ["DeltaBuilder", "SlotDeltas", "require_finite", "uniform"]


@dataclass(frozen=True)
class SlotDeltas:
    """One slot's deltas, ready to be written.

    Attributes:
        target: The slot.
        pairs: The deltas in stack order, in the slot's dtype, on its device.
        rank: Ranks of the deltas, without padding.
        rank_added: Ranks that the slot will hold beyond its base.
        energy_lost: Share of the sum's energy that compression dropped; None if not compressed.
        zero: Indices of LoRAs whose delta here is all zero, hence left out exactly.
        thirded: Indices of LoRAs whose alpha here may be a third of what is meant.
    """

    target: Target
    pairs: tuple[ScaledPair, ...] = ()
    rank: int = 0
    rank_added: int = 0
    energy_lost: float | None = None
    zero: tuple[int, ...] = ()
    thirded: tuple[int, ...] = ()


class DeltaBuilder:
    """Builds the deltas of one composition."""

    def __init__(
        self,
        specs: Sequence[LoraSpec],
        sources: Sequence[LoraSource],
        fetchers: Sequence[TensorFetcher],
        *,
        cache_bytes: int,
    ) -> None:
        self._specs = specs
        self._sources = sources
        self._fetchers = fetchers
        self._cache_bytes = cache_bytes

    def build(self, target: Target, plan: SlotPlan | None) -> SlotDeltas:
        """Read and scale one slot's pieces; without a plan the slot returns to its base."""
        if plan is None:
            return SlotDeltas(target)
        pairs, zero, thirded = [], [], []
        for lora, pieces in _by_lora(plan):
            pair = self._pair(lora, pieces, plan, target)
            if pair.thirded:
                thirded.append(lora)
            if pair.zero:
                zero.append(lora)
                continue
            strength = self._specs[lora].strength
            pairs.append(scaled(pair, strength, dtype=target.dtype, device=target.device))
        pairs, energy_lost = _within_limit(pairs, plan.rank_limit, target)
        return SlotDeltas(
            target=target,
            pairs=tuple(pairs),
            rank=sum(pair.rank for pair in pairs),
            rank_added=sum(_rank_taken(pair, target) for pair in pairs),
            energy_lost=energy_lost,
            zero=tuple(zero),
            thirded=tuple(thirded),
        )

    def _pair(self, lora: int, pieces: Sequence[Piece], plan: SlotPlan, target: Target) -> LoraPair:
        source = self._sources[lora]
        if not source.cacheable:
            return fuse(pieces, plan, target, self._fetchers[lora])
        # The same file may meet models of other sizes and row orders, of which other parts fit.
        sizes = (target.row.in_features, target.row.out_features)
        parts = tuple((piece.target, piece.row_begin) for piece in pieces)
        key = (source.identity, plan.path, plan.kind, plan.row_order, sizes, parts)
        pair = cache.pieces.get(key)
        if pair is None:
            pair = fuse(pieces, plan, target, self._fetchers[lora])
            cache.pieces.put(key, pair, limit_bytes=self._cache_bytes)
        return pair


def uniform(deltas: Sequence[SlotDeltas]) -> list[SlotDeltas]:
    """Give slots of one offload buffer the same rank; what a slot lacks is zero."""
    rank = max(d.rank_added for d in deltas)
    return [replace(d, rank_added=rank) for d in deltas]


def require_finite(built: Sequence[SlotDeltas]) -> None:
    """Check the deltas of several slots with one device synchronisation.

    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    """
    targets = [deltas.target for deltas in built for _ in deltas.pairs]
    # Extremes propagate NaN and are one pass over memory, unlike isfinite.
    extremes = [
        torch.stack([*torch.aminmax(pair.down), *torch.aminmax(pair.up)])
        for deltas in built
        for pair in deltas.pairs
    ]
    if not extremes:
        return
    finite = torch.isfinite(torch.stack(extremes)).all(dim=1).tolist()
    for target, ok in zip(targets, finite, strict=True):
        if not ok:
            raise NonFiniteError(
                f"`{target.path}` would hold NaN or infinity in {target.dtype}"
                "\nhint: a LoRA of the stack is damaged, or its strength is too high"
            )


def _by_lora(plan: SlotPlan) -> Iterator[tuple[int, list[Piece]]]:
    for lora, pieces in itertools.groupby(plan.pieces, key=lambda piece: piece.lora):
        yield lora, list(pieces)


def _rank_taken(pair: ScaledPair, target: Target) -> int:
    """A packed slot takes whole tiles, a side branch just the ranks."""
    return pair.rank_padded if target.kind is SlotKind.SVDQ else pair.rank


def _within_limit(
    pairs: list[ScaledPair], limit: int | None, target: Target
) -> tuple[list[ScaledPair], float | None]:
    """Bring a slot's deltas under its limit: exactly where they fit, else optimally.

    The limit counts ranks; the room they take is that of whole tiles.
    """
    rank = sum(pair.rank for pair in pairs)
    taken = sum(_rank_taken(pair, target) for pair in pairs)
    if limit is None or (rank <= limit and taken <= round_up(limit, RANK_MULTIPLE)):
        return pairs, None
    packed = target.kind is SlotKind.SVDQ
    factors = [unpacked(pair) if packed else (pair.down, pair.up) for pair in pairs]
    if rank <= limit:
        # Only the padding between the LoRAs is too much: closing the gaps is exact.
        down = torch.cat([pair[0] for pair in factors])
        up = torch.cat([pair[1] for pair in factors], dim=1)
        energy_lost = None
    else:
        # The decomposition would fail on them with a message that names nothing.
        require_finite([SlotDeltas(target, tuple(pairs))])
        try:
            best = compress(factors, limit)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NonFiniteError(f"`{target.path}`: its deltas are too large to sum") from error
        down, up = best.down.to(target.dtype), best.up.to(target.dtype)
        energy_lost = best.energy_lost
    kept = down.shape[0]
    if packed:
        down = pack_lowrank(down, LowRankSide.DOWN)
        up = pack_lowrank(up, LowRankSide.UP)
    return [ScaledPair(down=down, up=up, rank=kept)], energy_lost
