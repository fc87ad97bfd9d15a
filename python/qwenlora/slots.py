"""Slots that take deltas: they put tensors into a model's layers, and take them out again.

One small interface separates planning from leaf kinds: a slot prepares a `Change`, which can be
made and unmade by moving pointers. No tensor of the base model is written to. A slot's parts (its
packed low-rank branch, a side branch, stored values) are slots themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qwenlora.branch import (
    Branch,
    branch_of,
    has_branch,
    is_clean,
    low_rank_branch,
    make_branch,
    row_order_of,
    set_branch,
)
from qwenlora.deltas import SlotDeltas
from qwenlora.errors import NonFiniteError
from qwenlora.layout import FRAGMENT, TILE
from qwenlora.pending import Pending
from qwenlora.plan import SlotKind
from qwenlora.targets import FACTORS, factors_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qwenlora.arena import SlotFactors
    from qwenlora.deltas import GroupDeltas
    from qwenlora.kept import KeptGroup
    from qwenlora.pieces import ScaledPair
    from qwenlora.targets import Target

__all__ = [
    "Change",
    "PackedSlot",
    "SideBranchSlot",
    "Slot",
    "ValueSlot",
    "WholeSlot",
    "prepare_group",
    "slot_of",
]

_BASE_VALUES = "_qwenlora_base"
"""Attribute of a layer that keeps the base's tensors whose parameters point elsewhere, by name."""


class Change(Protocol):
    """New tensors of one slot, allocated and filled, not yet in place."""

    def make(self) -> None:
        """Put the new tensors in place."""

    def unmake(self) -> None:
        """Put back what was there before; allowed before, during and after `make`."""


class Slot(Protocol):
    """One slot of the model at hand."""

    @property
    def path(self) -> str:
        """Its path in the transformer."""

    def prepare(self, deltas: SlotDeltas) -> Change:
        """Allocate and fill new tensors that hold the base and these deltas.

        `deltas.rank_added` is at least the pairs' padded ranks, and `kron_room` at least their
        products; what exceeds them is zero. With nothing in `deltas` the change restores the base.
        """

    def rank_added(self) -> int:
        """Ranks beyond the base that are in place now."""

    def room(self) -> Hashable:
        """What is in place beyond the base, in shapes that offload needs to be uniform."""

    def is_base(self) -> bool:
        """Whether nothing is in place, not even one half of a change that was interrupted."""

    def restore(self) -> None:
        """Put the base in place, even where the device has no memory left."""


def prepare_group(deltas: GroupDeltas, left: KeptGroup | None = None) -> Change:
    """What puts the joined tensors of many slots in place.

    Args:
        deltas: The tensors.
        left: What the same packed slots hold now, where that is known.
    """
    targets = deltas.targets
    changes: list[Change] = []
    if targets[0].kind is SlotKind.SVDQ:
        modules = [target.module for target in targets]
        changes.append(_PackedChange(modules, deltas.factors, left))
        changes += [
            SideBranchSlot(target).prepare(SlotDeltas(target))
            for target in targets
            if has_branch(target.module)
        ]
    else:
        changes += [
            _BranchChange(target.module, new=low_rank_branch(target, factors))
            for target, *factors in zip(targets, *deltas.factors.wait(), strict=True)
        ]
    changes += [
        ValueSlot(target).prepare(SlotDeltas(target))
        for target in targets
        if _BASE_VALUES in target.module.__dict__
    ]
    return _Changes(changes)


def slot_of(target: Target) -> WholeSlot:
    """The slot implementation for a leaf kind."""
    packed = target.kind is SlotKind.SVDQ
    tables = target.kind in (SlotKind.NORM, SlotKind.EMBEDDING)
    ranks: list[Slot] = [PackedSlot(target)] if packed else []
    branches: list[Slot] = [] if tables else [SideBranchSlot(target)]
    return WholeSlot(target.path, [*ranks, *branches, ValueSlot(target)])


class WholeSlot:
    """A layer with all the parts that deltas may change."""

    def __init__(self, path: str, parts: Sequence[Slot]) -> None:
        self.path = path
        self._parts = parts

    def prepare(self, deltas: SlotDeltas) -> _Changes:
        """Prepare every part."""
        return _Changes([part.prepare(deltas) for part in self._parts])

    def rank_added(self) -> int:
        """Ranks beyond the base that are in place now."""
        return sum(part.rank_added() for part in self._parts)

    def room(self) -> Hashable:
        """What is in place, part by part."""
        return tuple(part.room() for part in self._parts)

    def is_base(self) -> bool:
        """Whether every part is."""
        return all(part.is_base() for part in self._parts)

    def restore(self) -> None:
        """Restore every part that is not the base."""
        for part in self._parts:
            if not part.is_base():
                part.restore()


@dataclass
class _Changes:
    parts: Sequence[Change]

    def make(self) -> None:
        for part in self.parts:
            part.make()

    def unmake(self) -> None:
        for part in reversed(self.parts):
            part.unmake()


class _NoChange:
    """A part that stays as it is."""

    def make(self) -> None:
        """Nothing to do."""

    def unmake(self) -> None:
        """Nothing to do."""


class PackedSlot:
    """A Nunchaku SVDQ layer: deltas join its low-rank branch in packed space.

    Stored tensors are (channels, R) in name; memory is (channels/16, R/16, 256), so ranks are
    appended by a strided copy and the base is never unpacked. While composed, the base is held
    once: as the first fragments of the composed tensors.
    """

    def __init__(self, target: Target) -> None:
        self._module: Any = target.module
        self._base_rank = target.row.base_rank
        self.path = target.path

    def rank_added(self) -> int:
        """Ranks beyond the base that are in place now."""
        return int(self._module.proj_down.shape[1]) - self._base_rank

    def room(self) -> Hashable:
        """Ranks beyond the base."""
        return self.rank_added()

    def prepare(self, deltas: SlotDeltas) -> Change:
        """Allocate and fill both factors."""
        if deltas.rank_added == 0 and self.is_base():
            return _NoChange()
        return self._change(deltas.pairs, deltas.rank_added)

    def _change(self, pairs: Sequence[ScaledPair], rank_added: int) -> _PackedChange:
        down: Tensor = self._module.proj_down
        up: Tensor = self._module.proj_up
        return _PackedChange(
            modules=[self._module],
            new=Pending.ready(
                (
                    [self._joined(down, [pair.down for pair in pairs], rank_added)],
                    [self._joined(up, [pair.up for pair in pairs], rank_added)],
                )
            ),
        )

    def is_base(self) -> bool:
        """Whether both factors have the base's rank."""
        return all(getattr(self._module, name).shape[1] == self._base_rank for name in FACTORS)

    def restore(self) -> None:
        """Put the base in place; through the host where the device is full."""
        try:
            self._change((), 0).make()
        except torch.OutOfMemoryError:
            for name in FACTORS:
                self._restore_by_host(name)

    def _restore_by_host(self, name: str) -> None:
        current: Tensor = getattr(self._module, name)
        channels, rank = current.shape
        tiles, base_tiles = channels // TILE, self._base_rank // TILE
        host = current.detach().cpu().view(tiles, rank // TILE, FRAGMENT)[:, :base_tiles]
        device = current.device
        # Let go of the composed tensor first: the smaller one then fits in its place. Until it is
        # there, the base is not where it belongs, but not lost.
        base = host.reshape(channels, self._base_rank)
        _point(self._module, name, base)
        del current
        _point(self._module, name, base.to(device))

    def _joined(self, current: Tensor, added: Sequence[Tensor], rank_added: int) -> Tensor:
        channels, rank = current.shape
        tiles, base_tiles = channels // TILE, self._base_rank // TILE
        # Pinned host memory stays pinned: offload copies from it asynchronously.
        joined = torch.empty(
            (channels, self._base_rank + rank_added),
            dtype=current.dtype,
            device=current.device,
            pin_memory=current.is_pinned(),
        )
        # (C, R) nominal -> (C/16, R/16, 256)
        fragments = joined.view(tiles, -1, FRAGMENT)
        base = current.detach().view(tiles, rank // TILE, FRAGMENT)[:, :base_tiles]
        fragments[:, :base_tiles].copy_(base)
        end = base_tiles
        for piece in added:
            piece_tiles = piece.shape[1] // TILE
            fragments[:, end : end + piece_tiles].copy_(piece.view(tiles, piece_tiles, FRAGMENT))
            end += piece_tiles
        fragments[:, end:].zero_()
        return joined


@dataclass
class _PackedChange:
    """New factors of packed layers: `new` holds every layer's down, and every layer's up.

    `left` is what is in place, where that is known; `plain` says that none of the parameters was
    made in inference mode.
    """

    modules: Sequence[nn.Module]
    new: Pending[SlotFactors]
    left: InitVar[KeptGroup | None] = None
    old: Sequence[Sequence[Tensor]] = field(init=False)
    old_data: Sequence[Sequence[Tensor]] = field(init=False)
    plain: bool = field(init=False, default=False)

    def __post_init__(self, left: KeptGroup | None) -> None:
        if left is not None:
            self.old = left.parameters
            self.old_data = left.deltas.factors.wait()
            self.plain = left.group.plain
            return
        self.old = [factors_of(self.modules, name) for name in FACTORS]
        self.old_data = [[parameter.data for parameter in own] for own in self.old]

    def make(self) -> None:
        for name, old, new in zip(FACTORS, self.old, self.new.wait(), strict=True):
            _point_all(self.modules, name, old, new, plain=self.plain)

    def unmake(self) -> None:
        for name, old, old_data in zip(FACTORS, self.old, self.old_data, strict=True):
            for module, parameter, data in zip(self.modules, old, old_data, strict=True):
                _point_back(module, name, parameter, data)


class SideBranchSlot:
    """A layer called as a module: deltas run beside it, its own tensors stay as they are.

    Low-rank pairs of an SVDQ layer are its packed slot's; here only its Kronecker products run.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._module = target.module
        self._carries_rank = target.kind is not SlotKind.SVDQ
        self.path = target.path

    def rank_added(self) -> int:
        """Ranks of the branch in place now."""
        branch = branch_of(self._module)
        return 0 if branch is None else branch.rank

    def room(self) -> Hashable:
        """Names and shapes of the branch's buffers."""
        branch = branch_of(self._module)
        return () if branch is None else branch.room

    def is_base(self) -> bool:
        """Whether no part of a branch is there."""
        return is_clean(self._module)

    def restore(self) -> None:
        """Remove the branch."""
        set_branch(self._module, None)

    def prepare(self, deltas: SlotDeltas) -> _BranchChange:
        """Allocate and fill the branch; ranks are not padded unless `rank_added` asks for it."""
        branch = make_branch(
            self._target,
            [(pair.down, pair.up) for pair in deltas.pairs] if self._carries_rank else (),
            rank=deltas.rank_added if self._carries_rank else 0,
            krons=deltas.krons,
            kron_room=deltas.kron_room,
            dense=deltas.dense,
            row_order=row_order_of(self._target.kind),
            pinned=any(p.is_pinned() for p in self._module.parameters(recurse=False)),
        )
        return _BranchChange(self._module, new=branch)


@dataclass
class _BranchChange:
    module: nn.Module
    new: Branch | None
    old: Branch | None = field(init=False)

    def __post_init__(self) -> None:
        self.old = branch_of(self.module)

    def make(self) -> None:
        if self.new is not None or self.old is not None:
            set_branch(self.module, self.new)

    def unmake(self) -> None:
        set_branch(self.module, self.old)


class ValueSlot:
    """Stored values of a layer: its bias, a norm's weight, an embedding's table.

    A parameter whose value changes is pointed at a new tensor; the base's is kept by the layer,
    where a deep copy of it takes its own along, and put back.
    """

    def __init__(self, target: Target) -> None:
        self._module = target.module
        self.path = target.path

    def rank_added(self) -> int:
        """Values hold no rank."""
        return 0

    def room(self) -> Hashable:
        """Swapped values have the base's shapes."""
        return ()

    def is_base(self) -> bool:
        """Whether every parameter holds its base."""
        return not self._bases()

    def restore(self) -> None:
        """Point every parameter at its base again."""
        self._change({}).make()

    def prepare(self, deltas: SlotDeltas) -> Change:
        """Add the deltas to the base's values in float64 and round once.

        Raises:
            NonFiniteError: A value would be too large for the parameter's dtype.
        """
        return self._change(deltas.values) if deltas.values or self._bases() else _NoChange()

    def _bases(self) -> dict[str, Tensor]:
        bases: dict[str, Tensor] = self._module.__dict__.get(_BASE_VALUES, {})
        return bases

    def _change(self, values: Mapping[str, Tensor]) -> _ValueChange:
        bases = self._bases()
        new, kept = {}, {}
        for name in {**bases, **values}:
            current: Tensor = getattr(self._module, name)
            base = bases.get(name, current.data)
            # A parameter that is a normal one by then could not hold an inference tensor again.
            base = base.clone() if base.is_inference() else base
            # After a move of the model the base's tensor is where the parameter was.
            base = base.to(current.device, current.dtype)
            if name in values:
                kept[name] = base
                new[name] = self._sum(name, base, values[name], pinned=current.is_pinned())
            else:
                new[name] = base
        return _ValueChange(self._module, new=new, kept=kept)

    def _sum(self, name: str, base: Tensor, delta: Tensor, *, pinned: bool) -> Tensor:
        total = (base.double().cpu() + delta.view(base.shape)).to(base.dtype)
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteError(
                f"`{self.path}.{name}` would hold NaN or infinity in {base.dtype}"
                "\nhint: a LoRA of the stack is damaged, or its strength is too high"
            )
        return total.pin_memory() if pinned else total.to(base.device)


@dataclass
class _ValueChange:
    module: Any
    new: dict[str, Tensor]
    kept: dict[str, Tensor]
    old: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    old_kept: dict[str, Tensor] | None = field(init=False)

    def __post_init__(self) -> None:
        self.old = {
            name: (getattr(self.module, name), getattr(self.module, name).data) for name in self.new
        }
        self.old_kept = self.module.__dict__.get(_BASE_VALUES)

    def make(self) -> None:
        # The base is recorded before a parameter leaves it, and forgotten after all are back.
        self.module.__dict__[_BASE_VALUES] = {**(self.old_kept or {}), **self.kept}
        for name, tensor in self.new.items():
            _point(self.module, name, tensor)
        self._record(self.kept)

    def unmake(self) -> None:
        for name, (parameter, data) in self.old.items():
            _point_back(self.module, name, parameter, data)
        self._record(self.old_kept or {})

    def _record(self, kept: dict[str, Tensor]) -> None:
        if kept:
            self.module.__dict__[_BASE_VALUES] = kept
        else:
            self.module.__dict__.pop(_BASE_VALUES, None)


def _point_all(
    modules: Sequence[nn.Module],
    name: str,
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    *,
    plain: bool,
) -> None:
    """Let a parameter of each module hold another tensor; see `_point`."""
    if plain:
        for parameter, tensor in zip(old, new, strict=True):
            parameter.data = tensor
        return
    for module, parameter, tensor in zip(modules, old, new, strict=True):
        if parameter.is_inference():
            _point(module, name, tensor)
        else:
            parameter.data = tensor


def _point(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter hold another tensor; the parameter itself stays the same object.

    A parameter made in inference mode cannot hold a normal tensor, and a tensor that outlives the
    call must be a normal one: there, and only there, a new parameter takes the old one's place.
    """
    current: Tensor = getattr(module, name)
    if not current.is_inference():
        current.data = tensor
    elif isinstance(current, torch.nn.Parameter):
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=current.requires_grad))
    else:
        setattr(module, name, tensor)


def _point_back(module: nn.Module, name: str, parameter: Tensor, data: Tensor) -> None:
    """Let a parameter hold what it held."""
    if getattr(module, name) is parameter:
        parameter.data = data
    else:
        setattr(module, name, parameter)
