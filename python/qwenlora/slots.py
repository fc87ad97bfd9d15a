"""Slots that take deltas: the only module that writes to a model.

One small interface separates planning from leaf kinds: a slot prepares a `Change`, which can be
made and unmade by moving pointers. No tensor of the base model is written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qwenlora.layout import FRAGMENT, TILE
from qwenlora.plan import SlotKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qwenlora.pieces import ScaledPair
    from qwenlora.targets import Target

__all__ = ["Change", "PackedSlot", "SideBranchSlot", "Slot", "add_side_branch", "slot_of"]

FACTORS = ("proj_down", "proj_up")
"""The factors of a packed slot's low-rank branch."""
BRANCH_DOWN = "qwenlora_down"
"""Name of a side branch's (R, in) buffer."""
BRANCH_UP = "qwenlora_up"
"""Name of a side branch's (out, R) buffer."""


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

    def prepare(self, pairs: Sequence[ScaledPair], rank_added: int) -> Change:
        """Allocate and fill new tensors that hold the base and these deltas.

        `rank_added` is at least the pairs' padded ranks; what exceeds them is zero. With no pairs
        and no rank the change restores the base.
        """

    def rank_added(self) -> int:
        """Ranks beyond the base that are in place now."""

    def is_base(self) -> bool:
        """Whether nothing is in place, not even one half of a change that was interrupted."""

    def restore(self) -> None:
        """Put the base in place, even where the device has no memory left."""


def slot_of(target: Target) -> Slot:
    """The slot implementation for a leaf kind."""
    if target.kind is SlotKind.SVDQ:
        return PackedSlot(target)
    return SideBranchSlot(target)


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

    def prepare(self, pairs: Sequence[ScaledPair], rank_added: int) -> _PackedChange:
        """Allocate and fill both factors."""
        down: Tensor = self._module.proj_down
        up: Tensor = self._module.proj_up
        return _PackedChange(
            module=self._module,
            old=(down, up),
            old_data=(down.data, up.data),
            new=(
                self._joined(down, [pair.down for pair in pairs], rank_added),
                self._joined(up, [pair.up for pair in pairs], rank_added),
            ),
        )

    def is_base(self) -> bool:
        """Whether both factors have the base's rank."""
        return all(getattr(self._module, name).shape[1] == self._base_rank for name in FACTORS)

    def restore(self) -> None:
        """Put the base in place; through the host where the device is full."""
        try:
            self.prepare((), 0).make()
        except torch.OutOfMemoryError:
            for name in FACTORS:
                self._restore_by_host(name)

    def _restore_by_host(self, name: str) -> None:
        current: Tensor = getattr(self._module, name)
        channels, rank = current.shape
        tiles, base_tiles = channels // TILE, self._base_rank // TILE
        host = current.detach().cpu().view(tiles, rank // TILE, FRAGMENT)[:, :base_tiles]
        device = current.device
        # Let go of the composed tensor first: the smaller one then fits in its place.
        _point(self._module, name, torch.empty(0, dtype=current.dtype, device=device))
        del current
        _point(self._module, name, host.reshape(channels, self._base_rank).to(device))

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
    module: nn.Module
    old: tuple[Tensor, Tensor]
    old_data: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]

    def make(self) -> None:
        for name, tensor in zip(FACTORS, self.new, strict=True):
            _point(self.module, name, tensor)

    def unmake(self) -> None:
        for name, parameter, data in zip(FACTORS, self.old, self.old_data, strict=True):
            if getattr(self.module, name) is parameter:
                parameter.data = data
            else:
                setattr(self.module, name, parameter)


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


class SideBranchSlot:
    """A layer called as a module: deltas run beside it, its own tensors stay as they are.

    The branch's tensors are non-persistent buffers of the module and its code is one function that
    reads them from the module it is given, so that a deep copy carries a branch of its own.
    """

    def __init__(self, target: Target) -> None:
        self._module = target.module
        self._sizes = (target.row.in_features, target.row.out_features)
        self._dtype = target.dtype
        self._device = target.device
        self._pinned = any(p.is_pinned() for p in target.module.parameters(recurse=False))
        self.path = target.path

    def rank_added(self) -> int:
        """Ranks of the branch in place now."""
        down = self._module._buffers.get(BRANCH_DOWN)
        return 0 if down is None else int(down.shape[0])

    def is_base(self) -> bool:
        """Whether neither a buffer nor the hook is there."""
        buffers = self._module._buffers
        hooks = self._module._forward_hooks.values()
        return (
            BRANCH_DOWN not in buffers
            and BRANCH_UP not in buffers
            and (add_side_branch not in hooks)
        )

    def restore(self) -> None:
        """Remove the branch."""
        _set_branch(self._module, None)

    def prepare(self, pairs: Sequence[ScaledPair], rank_added: int) -> _BranchChange:
        """Allocate and fill the branch; ranks are not padded unless `rank_added` asks for it."""
        if rank_added == 0:
            return _BranchChange(self._module, new=None)
        down, up = (
            torch.zeros(
                shape,
                dtype=self._dtype,
                device=self._device,
                # As the layer's own tensors: offload copies from pinned memory asynchronously.
                pin_memory=self._pinned,
            )
            for shape in ((rank_added, self._sizes[0]), (self._sizes[1], rank_added))
        )
        end = 0
        for pair in pairs:
            down[end : end + pair.rank] = pair.down
            up[:, end : end + pair.rank] = pair.up
            end += pair.rank
        return _BranchChange(self._module, new=(down, up))


@dataclass
class _BranchChange:
    module: nn.Module
    new: tuple[Tensor, Tensor] | None
    old: tuple[Tensor, Tensor] | None = field(init=False)

    def __post_init__(self) -> None:
        down, up = (self.module._buffers.get(name) for name in (BRANCH_DOWN, BRANCH_UP))
        self.old = None if down is None or up is None else (down, up)

    def make(self) -> None:
        _set_branch(self.module, self.new)

    def unmake(self) -> None:
        _set_branch(self.module, self.old)


def add_side_branch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Forward hook: `output + (x down^T) up^T`, in the branch's dtype."""
    buffers = module._buffers
    down, up = buffers[BRANCH_DOWN], buffers[BRANCH_UP]
    if down is None or up is None:
        return output
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    hidden = torch.nn.functional.linear(x.to(down.dtype), down)  # (..., R)
    if output.dtype != up.dtype or output.ndim < 2:
        return output + torch.nn.functional.linear(hidden, up).to(output.dtype)
    # One kernel adds and rounds once: launches are what a branch costs.
    added = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.mT)  # (N, out)
    return added.view_as(output)


def _set_branch(module: nn.Module, branch: tuple[Tensor, Tensor] | None) -> None:
    """Install, replace or remove a branch; the hook leaves with it."""
    if branch is None:
        _remove_hook(module)
        for name in (BRANCH_DOWN, BRANCH_UP):
            if name in module._buffers:
                delattr(module, name)
        return
    module.register_buffer(BRANCH_DOWN, branch[0], persistent=False)
    module.register_buffer(BRANCH_UP, branch[1], persistent=False)
    if add_side_branch not in module._forward_hooks.values():
        module.register_forward_hook(add_side_branch, with_kwargs=True)


def _remove_hook(module: nn.Module) -> None:
    # By function, not by handle: the handle of a deep copy would point at the original.
    for key in [k for k, hook in module._forward_hooks.items() if hook is add_side_branch]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
