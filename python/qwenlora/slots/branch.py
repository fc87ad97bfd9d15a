"""Side branches: deltas added to the output of a layer that is called as a module.

A branch's tensors are non-persistent buffers of the layer, its layout an attribute, and its code
one function that reads both from the module it is given: a deep copy carries its own branch, and
block offload copies the buffers as it does all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qwenlora.model.subclass import is_marked, mark_hooked, unmark_hooked
from qwenlora.packing.layout import RowOrder
from qwenlora.packing.pack import interleave_modulation

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from typing import Any

    from torch import Tensor, nn

    from qwenlora.delta.scale import KronShape, ScaledDense, ScaledKron
    from qwenlora.delta.slot_deltas import SlotDeltas
    from qwenlora.model.target import Target

__all__ = [
    "BRANCH_DENSE",
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
    "kron_product",
    "low_rank_branch",
    "set_branch",
]


BRANCH_DOWN = "qwenlora_down"
"""Name of the low-rank part's (R, in) buffer."""
BRANCH_UP = "qwenlora_up"
"""Name of the low-rank part's (out, R) buffer."""
BRANCH_DENSE = "qwenlora_dense"
"""Name of the dense part's (out, in) buffer."""
_LAYOUT = "_qwenlora_branch"
_PREFIX = "qwenlora_"


@dataclass(frozen=True)
class BranchLayout:
    """The meaning of a branch's buffers.

    Attributes:
        krons: First row of each Kronecker product, in the order of their buffers.
        row_order: The order of the layer's output rows.
        dense_exponent: The dense part is the delta times two to this power.
    """

    krons: tuple[int, ...] = ()
    row_order: RowOrder = RowOrder.PLANAR
    dense_exponent: int = 0


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


def kron_names(index: int) -> tuple[str, str]:
    """The buffers of the factors of one product."""
    return (f"{_PREFIX}kron{index}_w1", f"{_PREFIX}kron{index}_w2")


def branch_of(module: nn.Module) -> Branch | None:
    """The branch that a layer carries now."""
    layout = module.__dict__.get(_LAYOUT)
    tensors = {
        name: buffer
        for name, buffer in module._buffers.items()
        if name.startswith(_PREFIX) and buffer is not None
    }
    return Branch(layout, tensors) if layout is not None and tensors else None


def is_clean(module: nn.Module) -> bool:
    """Tell if nothing of a branch is there, not even a part of an interrupted change."""
    return (
        _LAYOUT not in module.__dict__
        and not any(name.startswith(_PREFIX) for name in module._buffers)
        and add_side_branch not in module._forward_hooks.values()
        and not is_marked(module)
    )


def has_branch(module: nn.Module) -> bool:
    """Tell if a layer carries a branch; after a completed change its layout alone says so."""
    return _LAYOUT in module.__dict__


def is_whole(module: nn.Module) -> bool:
    """Tell if a branch has all that it was installed with, or there is none at all."""
    layout: BranchLayout | None = module.__dict__.get(_LAYOUT)
    if layout is None:
        return is_clean(module)
    names = [name for index in range(len(layout.krons)) for name in kron_names(index)]
    low_rank = [module._buffers.get(name) is not None for name in (BRANCH_DOWN, BRANCH_UP)]
    return (
        all(module._buffers.get(name) is not None for name in names)
        and all(low_rank) == any(low_rank)
        and _is_hooked(module)
    )


def set_branch(module: nn.Module, branch: Branch | None) -> None:
    """Install, replace or remove a branch; the hook leaves with it."""
    if branch is None:
        _remove_hook(module)
    for name in [name for name in module._buffers if name.startswith(_PREFIX)]:
        delattr(module, name)
    module.__dict__.pop(_LAYOUT, None)
    if branch is None:
        unmark_hooked(module)
        return
    module.__dict__[_LAYOUT] = branch.layout
    for name, tensor in branch.tensors.items():
        module.register_buffer(name, tensor, persistent=False)
    mark_hooked(module)
    if not _is_hooked(module):
        _remove_hook(module)
        module.register_forward_hook(add_side_branch, with_kwargs=True)


def make_branch(
    target: Target,
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    rank: int,
    krons: Sequence[ScaledKron],
    kron_room: Sequence[KronShape],
    dense: ScaledDense | None,
    row_order: RowOrder,
    pinned: bool,
) -> Branch | None:
    """Allocate and fill a branch.

    Args:
        target: The layer.
        pairs: (down (r, in), up (out, r)), rows in the layer's own order.
        rank: Ranks to hold, at least the pairs' in all; what exceeds them is zero.
        krons: Kronecker products.
        kron_room: Shapes to hold, at least the products' own; the others are zero.
        dense: A matrix over all of the layer.
        row_order: The order of the layer's rows, for the products.
        pinned: Whether to allocate pinned memory, as the layer's own tensors are: offload copies
            from it asynchronously.

    Returns:
        The branch, or None where it holds nothing.
    """
    row = target.row

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=target.dtype, device=target.device, pin_memory=pinned)

    tensors: dict[str, Tensor] = {}
    if rank:
        down, up = zeros(rank, row.in_features), zeros(row.out_features, rank)
        end = 0
        for pair_down, pair_up in pairs:
            ranks = slice(end, end + pair_down.shape[0])
            down[ranks] = pair_down
            up[:, ranks] = pair_up
            end = ranks.stop
        tensors |= {BRANCH_DOWN: down, BRANCH_UP: up}
    if dense is not None:
        tensors[BRANCH_DENSE] = zeros(*dense.values.shape).copy_(dense.values)
    waiting = list(krons)
    for index, shape in enumerate(kron_room):
        w1, w2 = zeros(shape.w1_rows, shape.w1_columns), zeros(shape.w2_rows, shape.w2_columns)
        if waiting and waiting[0].shape == shape:
            kron = waiting.pop(0)
            w1.copy_(kron.w1)
            w2.copy_(kron.w2)
        tensors |= dict(zip(kron_names(index), (w1, w2), strict=True))
    if not tensors:
        return None
    exponent = 0 if dense is None else dense.exponent
    rows = tuple(shape.row_begin for shape in kron_room)
    return Branch(BranchLayout(rows, row_order, exponent), tensors)


def low_rank_branch(target: Target, factors: Sequence[Tensor]) -> Branch:
    """A branch of one pair that is in its layer's form already: (R, in) and (out, R)."""
    down, up = factors
    layout = BranchLayout(row_order=target.row_order)
    return Branch(layout, {BRANCH_DOWN: down, BRANCH_UP: up})


def add_side_branch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Forward hook: adds every part of the branch to the output, in the branch's dtype.

    A branch is where its layer's weights are. A host that keeps those in host memory brings them to
    the input for each forward, and so is the branch brought there.
    """
    buffers = module._buffers
    layout: BranchLayout | None = module.__dict__.get(_LAYOUT)
    if layout is None:
        return output
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    down, up = buffers.get(BRANCH_DOWN), buffers.get(BRANCH_UP)
    if down is not None and up is not None:
        output = _add_low_rank(x.to(down.dtype), _at(x, down), _at(x, up), output)
    dense = buffers.get(BRANCH_DENSE)
    if dense is not None:
        product = torch.nn.functional.linear(x.to(dense.dtype), _at(x, dense))
        if layout.dense_exponent:
            product = product * 2.0**-layout.dense_exponent
        output = output + product.to(output.dtype)
    if layout.krons:
        output = _add_krons(x, buffers, layout, output)
    return output


def _at(x: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.device == x.device else tensor.to(x.device, non_blocking=True)


def _add_low_rank(x: Tensor, down: Tensor, up: Tensor, output: Tensor) -> Tensor:
    hidden = torch.nn.functional.linear(x, down)  # (..., R)
    if output.dtype != up.dtype or output.ndim < 2:
        return output + torch.nn.functional.linear(hidden, up).to(output.dtype)
    # One kernel adds and rounds once: launches are what a branch costs.
    added = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.mT)  # (N, out)
    return added.view_as(output)


def _add_krons(
    x: Tensor, buffers: dict[str, Tensor | None], layout: BranchLayout, output: Tensor
) -> Tensor:
    for index, row_begin in enumerate(layout.krons):
        w1, w2 = (buffers[name] for name in kron_names(index))
        if w1 is None or w2 is None:
            continue
        product = kron_product(x.to(w1.dtype), _at(x, w1), _at(x, w2))
        if layout.row_order is RowOrder.INTERLEAVED:
            product = interleave_modulation(product, dim=-1)
        # The layer's own output, which nobody else holds yet.
        output.narrow(-1, row_begin, product.shape[-1]).add_(product.to(output.dtype))
    return output


def kron_product(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """X kron(w1, w2)^T without forming the product: Y = w1 X w2^T per token.

    Args:
        x: (..., im il).
        w1: (ol, im).
        w2: (ok, il).

    Returns:
        (..., ol ok), row i ok + k of the product at i ok + k.
    """
    # (..., im il) -> (..., im, il)
    tokens = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])
    return torch.matmul(w1, torch.matmul(tokens, w2.mT)).flatten(-2)


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
    """A layer called as a module: deltas run in a side branch, its own tensors do not change.

    Low-rank pairs of an SVDQ layer are its packed slot's; here only its Kronecker products run.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._module = target.module
        self._carries_rank = target.place is None
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
        """Tell if no part of a branch is there."""
        return is_clean(self._module)

    def restore(self) -> None:
        """Remove the branch."""
        set_branch(self._module, None)

    def prepare(self, deltas: SlotDeltas) -> BranchChange:
        """Allocate and fill the branch; ranks are not padded unless `rank_added` asks for it."""
        branch = make_branch(
            self._target,
            [(pair.down, pair.up) for pair in deltas.pairs] if self._carries_rank else (),
            rank=deltas.rank_added if self._carries_rank else 0,
            krons=deltas.krons,
            kron_room=deltas.kron_room,
            dense=deltas.dense,
            row_order=self._target.row_order,
            pinned=any(p.is_pinned() for p in self._module.parameters(recurse=False)),
        )
        return BranchChange(self._module, new=branch)


@dataclass
class BranchChange:
    """A new side branch of a layer, or none."""

    module: nn.Module
    new: Branch | None
    old: Branch | None = field(init=False)

    def __post_init__(self) -> None:
        self.old = branch_of(self.module)

    def make(self) -> None:
        """Put the new branch in place."""
        if self.new is not None or self.old is not None:
            set_branch(self.module, self.new)

    def unmake(self) -> None:
        """Put the old branch back."""
        set_branch(self.module, self.old)
