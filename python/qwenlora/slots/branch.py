"""Side branches: deltas added to the output of a layer that is called as a module.

A branch's tensors are non-persistent buffers of the layer, its layout an attribute, and its code
functions that read both from the module they are given: a deep copy carries its own branch, and
block offload copies the buffers as it does all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from qwenlora.errors import UnsupportedModelError
from qwenlora.model.opened import OpenedForm
from qwenlora.model.subclass import forward_of, is_marked, mark_hooked, unmark_hooked
from qwenlora.plan.documents import Route
from qwenlora.slots.beside import add_side_branch, run_layer
from qwenlora.slots.branch_layout import (
    BRANCH_DOWN,
    BRANCH_UP,
    LAYOUT,
    PREFIX,
    BranchLayout,
    Joined,
    part_name,
)
from qwenlora.slots.opened import is_as_needed, require_openable, set_as_needed
from qwenlora.slots.opened_attention import run_projection
from qwenlora.slots.unsigned import centre_tensors, takes_unsigned

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from torch import Tensor, nn

    from qwenlora.delta.parts import PartShape, ScaledPart
    from qwenlora.delta.scale import ScaledPair
    from qwenlora.delta.slot_deltas import SlotDeltas
    from qwenlora.model.opened import Opened
    from qwenlora.model.target import Target

__all__ = [
    "BRANCH_DOWN",
    "BRANCH_UP",
    "Branch",
    "BranchChange",
    "BranchLayout",
    "SideBranchSlot",
    "add_side_branch",
    "branch_of",
    "has_branch",
    "is_clean",
    "is_whole",
    "low_rank_branch",
    "set_branch",
]


@dataclass(frozen=True)
class Branch:
    """A branch's tensors by buffer name, in the order in which they are registered."""

    layout: BranchLayout
    tensors: dict[str, Tensor]

    @property
    def room(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes: what offload needs to be the same in every block."""
        return tuple((name, tuple(tensor.shape)) for name, tensor in self.tensors.items())

    @property
    def rank(self) -> int:
        """Ranks of its low-rank part."""
        down = self.tensors.get(BRANCH_DOWN)
        return 0 if down is None else int(down.shape[0])


def branch_of(module: nn.Module) -> Branch | None:
    """The branch that a layer carries now."""
    layout = module.__dict__.get(LAYOUT)
    tensors = {
        name: buffer
        for name, buffer in module._buffers.items()
        if name.startswith(PREFIX) and buffer is not None
    }
    return Branch(layout, tensors) if layout is not None and tensors else None


def is_clean(module: nn.Module) -> bool:
    """Tell if nothing of a branch is there, not even a part of an interrupted change."""
    return (
        LAYOUT not in module.__dict__
        and not any(name.startswith(PREFIX) for name in module._buffers)
        and add_side_branch not in module._forward_hooks.values()
        and not is_marked(module)
    )


def has_branch(module: nn.Module) -> bool:
    """Tell if a layer carries a branch; after a completed change its layout alone says so."""
    return LAYOUT in module.__dict__


def is_whole(module: nn.Module) -> bool:
    """Tell if a branch has all that it was installed with, or there is none at all."""
    layout: BranchLayout | None = module.__dict__.get(LAYOUT)
    if layout is None:
        return is_clean(module)
    low_rank = [module._buffers.get(name) is not None for name in (BRANCH_DOWN, BRANCH_UP)]
    return (
        all(module._buffers.get(name) is not None for name in layout.buffers())
        and all(low_rank) == any(low_rank)
        and _is_in_place(module, layout)
    )


def _is_in_place(module: nn.Module, layout: BranchLayout) -> bool:
    """Tell if what runs a branch is there."""
    if layout.joined is Joined.BY_FORWARD:
        return forward_of(module) is run_projection
    return _is_hooked(module) and (not layout.runs_layer or forward_of(module) is run_layer)


def set_branch(module: nn.Module, branch: Branch | None) -> None:
    """Install, replace or remove a branch; the hook leaves with it.

    A module whose own forward adds its branch is opened by `set_as_needed`.
    """
    if branch is None:
        _remove_hook(module)
    for name in [name for name in module._buffers if name.startswith(PREFIX)]:
        delattr(module, name)
    module.__dict__.pop(LAYOUT, None)
    if branch is None:
        unmark_hooked(module)
        return
    module.__dict__[LAYOUT] = branch.layout
    for name, tensor in branch.tensors.items():
        module.register_buffer(name, tensor, persistent=False)
    if branch.layout.joined is Joined.BY_FORWARD:
        return
    mark_hooked(module, run_layer if branch.layout.runs_layer else None)
    if not _is_hooked(module):
        _remove_hook(module)
        module.register_forward_hook(add_side_branch, with_kwargs=True)


def make_branch(
    target: Target,
    pairs: Sequence[ScaledPair],
    *,
    rank: int,
    parts: Sequence[ScaledPart],
    room: Sequence[PartShape],
    pinned: bool,
) -> Branch | None:
    """Allocate and fill a branch.

    Args:
        target: The layer.
        pairs: Low-rank deltas, rows in the layer's own order.
        rank: Ranks to hold, at least the pairs' in all; what exceeds them is zero.
        parts: The other parts, in the order of their shapes.
        room: Shapes to hold, in order, at least the parts' own; the others are zero.
        pinned: Whether to allocate pinned memory, as the layer's own tensors are: offload copies
            from it asynchronously.

    Returns:
        The branch, or None where it holds nothing.

    Raises:
        UnsupportedModelError: The layer would run on other inputs, and has a forward of its own.
    """

    def zeros(*shape: int) -> Tensor:
        # Scalars do not lie among values whose dtype the slot's is.
        dtype = target.dtype if shape else torch.float32
        return torch.zeros(shape, dtype=dtype, device=target.device, pin_memory=pinned)

    tensors = _low_rank(target, pairs, rank, zeros) if rank else {}
    tensors |= _of_parts(target, parts, room, zeros)
    if not tensors:
        return None
    require_openable(target)
    is_module_s = target.opened is not None and target.opened.form is OpenedForm.PROJECTION
    joined = Joined.BY_FORWARD if is_module_s else Joined.BY_HOOK
    rows = target.row.out_features
    layout = BranchLayout(tuple(room), target.row_order, rows, joined=joined)
    if layout.runs_layer and takes_unsigned(target.module):
        centre = centre_tensors(target)
        tensors |= {name: zeros(*own.shape).copy_(own) for name, own in centre.items()}
        layout = replace(layout, centre=tuple(centre))
    elif layout.runs_layer:
        _require_class_forward(target)
    return Branch(layout, tensors)


def _low_rank(
    target: Target, pairs: Sequence[ScaledPair], rank: int, zeros: Callable[..., Tensor]
) -> dict[str, Tensor]:
    down, up = zeros(rank, target.row.in_features), zeros(target.row.out_features, rank)
    end = 0
    for pair in pairs:
        ranks = slice(end, end + pair.rank)
        down[ranks] = pair.down
        up[:, ranks] = pair.up
        end = ranks.stop
    return {BRANCH_DOWN: down, BRANCH_UP: up}


def _of_parts(
    target: Target,
    parts: Sequence[ScaledPart],
    room: Sequence[PartShape],
    zeros: Callable[..., Tensor],
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    waiting = list(parts)
    for index, shape in enumerate(room):
        own = {name: zeros(*sizes) for name, sizes in shape.tensors.items()}
        if waiting and waiting[0].shape == shape:
            for name, tensor in waiting.pop(0).tensors.items():
                own[name].copy_(tensor)
        tensors |= {part_name(index, name): tensor for name, tensor in own.items()}
    if waiting:
        raise ValueError(f"`{target.path}` has no room for {waiting[0].shape}")
    return tensors


def _require_class_forward(target: Target) -> None:
    """A layer of ours runs its class's forward; one that a host put around that would not run."""
    if "forward" in target.module.__dict__:
        raise UnsupportedModelError(
            f"`{target.path}` has a forward of its own, which something else put there: a delta"
            " that changes the layer's input cannot run"
            "\nhint: take off what hooks the layer (group offload, layer-wise casting,"
            " accelerate's hooks), or leave this LoRA's part there out"
        )


def low_rank_branch(target: Target, factors: Sequence[Tensor]) -> Branch:
    """A branch of one pair that is in its layer's form already: (R, in) and (out, R)."""
    down, up = factors
    layout = BranchLayout(row_order=target.row_order)
    return Branch(layout, {BRANCH_DOWN: down, BRANCH_UP: up})


def _is_hooked(module: nn.Module) -> bool:
    """Tell if the hook is there, with all that it was registered with."""
    keys = [key for key, hook in module._forward_hooks.items() if hook is add_side_branch]
    return len(keys) == 1 and keys[0] in module._forward_hooks_with_kwargs


def _remove_hook(module: nn.Module) -> None:
    # By function, not by handle: the handle of a deep copy would point at the original.
    for key in [k for k, hook in module._forward_hooks.items() if hook is add_side_branch]:
        # Last of all the hook itself: what an interrupt leaves is found by it.
        module._forward_hooks_with_kwargs.pop(key, None)
        del module._forward_hooks[key]


class SideBranchSlot:
    """What runs beside a layer: its own tensors do not change.

    Low-rank pairs of an SVDQ layer are its packed slot's, unless their route is beside it.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._module = target.module
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
        """Tell if no part of a branch is there, and what runs the layer is as its layers need."""
        opened = self._target.opened
        return is_clean(self._module) and (opened is None or is_as_needed(opened))

    def restore(self) -> None:
        """Remove the branch."""
        set_branch(self._module, None)
        if self._target.opened is not None:
            set_as_needed(self._target.opened)

    def prepare(self, deltas: SlotDeltas) -> BranchChange:
        """Allocate and fill the branch; ranks are not padded unless `rank_added` asks for it."""
        carries_rank = self._target.place is None or deltas.route is Route.BESIDE
        branch = make_branch(
            self._target,
            deltas.pairs if carries_rank else (),
            rank=deltas.rank_added if carries_rank else 0,
            parts=deltas.parts,
            room=deltas.room,
            pinned=any(p.is_pinned() for p in self._module.parameters(recurse=False)),
        )
        return BranchChange(self._module, new=branch, opened=self._target.opened)


@dataclass
class BranchChange:
    """A new side branch of a layer, or none; what runs it inside a kernel opens with it."""

    module: nn.Module
    new: Branch | None
    opened: Opened | None = None
    old: Branch | None = field(init=False)

    def __post_init__(self) -> None:
        self.old = branch_of(self.module)

    def make(self) -> None:
        """Put the new branch in place."""
        if self.new is not None or self.old is not None:
            self._set(self.new)

    def unmake(self) -> None:
        """Put the old branch back."""
        self._set(self.old)

    def _set(self, branch: Branch | None) -> None:
        set_branch(self.module, branch)
        if self.opened is not None:
            set_as_needed(self.opened)
