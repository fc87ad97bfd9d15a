"""What a side branch does when its layer runs.

All of it is read from the layer that is given. `add_side_branch` is a forward hook: it adds what
takes the layer's raw input, or its output on that. Where a part changes what the layer itself
computes with, the layer runs on such inputs: `run_layer` is its forward then.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from qwenlora.packing.layout import RowOrder
from qwenlora.packing.pack import deinterleave_modulation, interleave_modulation
from qwenlora.slots.branch_layout import BRANCH_DOWN, BRANCH_UP, LAYOUT, part_name
from qwenlora.slots.cut import can_cut, rows_output
from qwenlora.slots.parts.diagonal import factor_change
from qwenlora.slots.parts.part import Held, at
from qwenlora.slots.parts.table import OF_INPUT, OF_OUTPUT, ON_INPUT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from torch import Tensor, nn

    from qwenlora.delta.parts import PartShape
    from qwenlora.slots.branch_layout import BranchLayout, Rows

__all__ = ["add_side_branch", "layer_output", "run_layer"]


def add_side_branch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Forward hook: adds every part of the branch to the output, in the branch's dtype.

    A branch is where its layer's weights are. A host that keeps those in host memory brings them to
    the input for each forward, and so is the branch brought there.
    """
    layout: BranchLayout | None = module.__dict__.get(LAYOUT)
    if layout is None:
        return output
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    # Where the layer runs on other inputs, its forward has added what reads its output.
    readers = () if layout.runs_layer else layout.readers
    own = _logical(output, layout) if readers else output
    changes = _of_output(_held(module, layout, readers), own)
    down, up = module._buffers.get(BRANCH_DOWN), module._buffers.get(BRANCH_UP)
    if down is not None and up is not None:
        output = _add_low_rank(x.to(down.dtype), at(x, down), at(x, up), output)
    if not (changes or layout.adders):
        return output
    total = _logical(output, layout)
    for shape, change in changes:
        _add_rows(total, shape, change)
    for part in _held(module, layout, layout.adders):
        _add_rows(total, part.shape, OF_INPUT[part.shape.kind](part, x))
    return _stored(total, layout)


def run_layer(
    module: nn.Module,
    plain: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Forward of a layer whose input parts of its branch change; see `layer_output`.

    Without such parts it is the class's own: a host may have kept it.
    """
    layout: BranchLayout | None = module.__dict__.get(LAYOUT)
    if layout is None or not layout.runs_layer:
        return plain(module, *args, **kwargs)
    name = None if args else next(iter(kwargs))
    x: Tensor = args[0] if name is None else kwargs[name]

    def layer(x: Tensor) -> Tensor:
        if name is None:
            output: Tensor = plain(module, x, *args[1:], **kwargs)
        else:
            output = plain(module, **{**kwargs, name: x})
        # Who gives the memory of the output gets it written by every run.
        return output.clone() if len(args) + len(kwargs) > 1 else output

    is_cut = len(args) + len(kwargs) == 1 and can_cut(module, layout)
    of_rows = partial(rows_output, module) if is_cut else None
    return layer_output(module, layout, x, raw=layer, changed=layer, of_rows=of_rows)


def layer_output(
    module: nn.Module,
    layout: BranchLayout,
    x: Tensor,
    *,
    raw: Callable[[Tensor], Tensor],
    changed: Callable[[Tensor], Tensor],
    of_rows: Callable[[Tensor, Rows], list[Tensor]] | None = None,
) -> Tensor:
    """The output of a layer that runs on other inputs, with what reads its output on the raw one.

    Args:
        module: The layer.
        layout: Its branch's layout.
        x: The raw input (..., K).
        raw: Runs the layer on that.
        changed: Runs the layer on another input.
        of_rows: Runs some rows of it; None where it can run whole alone.

    Returns:
        (..., N) in the layer's own order of rows.
    """
    own: Tensor | None = None
    changes: list[tuple[PartShape, Tensor]] = []
    if _needs_raw(layout, is_cut=of_rows is not None):
        own = _logical(raw(x), layout)
        changes += _of_output(_held(module, layout, layout.readers), own)
    for part in _held(module, layout, layout.passes):
        run = _logical(changed(_with_changes(x, [part])), layout)
        changes.append((part.shape, factor_change(part, _rows(run, part.shape))))
    if of_rows is None:
        output = _of_runs(module, layout, x, own, changed)
    else:
        output = _of_cuts(module, layout, x, own, of_rows)
    for shape, change in changes:
        _add_rows(output, shape, change)
    return _stored(output, layout)


def _needs_raw(layout: BranchLayout, *, is_cut: bool) -> bool:
    """Tell if anything takes the layer's whole output on its raw input."""
    takes_rows = not all(run.inputs for run in layout.runs) and not is_cut
    return bool(layout.readers) or takes_rows or not layout.runs


def _of_runs(
    module: nn.Module,
    layout: BranchLayout,
    x: Tensor,
    raw: Tensor | None,
    changed: Callable[[Tensor], Tensor],
) -> Tensor:
    """The layer's own output, each of its rows from the input that it takes."""
    whole: Tensor | None = None if layout.runs else raw
    for run in layout.runs:
        held = _held(module, layout, run.inputs)
        output = raw if not held else _logical(changed(_with_changes(x, held)), layout)
        if output is None:
            continue
        if whole is None and len(layout.runs) == 1:
            return output
        whole = torch.empty_like(output) if whole is None else whole
        for begin, end in run.rows:
            whole[..., begin:end] = output[..., begin:end]
    if whole is None:
        raise ValueError("a layer of no rows")
    return whole


def _of_cuts(
    module: nn.Module,
    layout: BranchLayout,
    x: Tensor,
    raw: Tensor | None,
    of_rows: Callable[[Tensor, Rows], list[Tensor]],
) -> Tensor:
    """The same where each input runs through the rows that take it, and no others."""
    whole = x.new_empty((*x.shape[:-1], layout.out_features))
    for run in layout.runs:
        held = _held(module, layout, run.inputs)
        if not held and raw is not None:
            found = [raw[..., begin:end] for begin, end in run.rows]
        else:
            found = of_rows(_with_changes(x, held), run.rows)
        for (begin, end), rows in zip(run.rows, found, strict=True):
            whole[..., begin:end] = rows
    return whole


def _with_changes(x: Tensor, parts: Sequence[Held]) -> Tensor:
    """The raw input with what parts add to it, in its dtype."""
    total = x
    for part in parts:
        total = ON_INPUT[part.shape.kind](part, x, total)
    return total.to(x.dtype)


def _held(module: nn.Module, layout: BranchLayout, places: Sequence[int]) -> list[Held]:
    """Some parts of a layer's branch."""
    held = []
    for place in places:
        shape = layout.parts[place]
        names = layout.names[place]
        found = {name: module._buffers.get(part_name(place, name)) for name in names}
        # One that something else took away is told by name before the next composition.
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        held.append(Held(shape, tensors))
    return held


def _of_output(parts: Sequence[Held], output: Tensor) -> list[tuple[PartShape, Tensor]]:
    """What parts add to an output that they read."""
    changes = []
    # No comprehension: on Python 3.10 it is a frame of its own, which PyTorch 2.5 cannot trace.
    for part in parts:
        shape = part.shape
        changes.append((shape, OF_OUTPUT[shape.kind](part, _rows(output, shape))))
    return changes


def _rows(output: Tensor, shape: PartShape) -> Tensor:
    return output.narrow(-1, shape.row_begin, shape.row_count)


def _add_rows(output: Tensor, shape: PartShape, change: Tensor) -> None:
    # The layer's own output, which nobody else holds yet.
    _rows(output, shape).add_(change.to(output.dtype))


def _logical(output: Tensor, layout: BranchLayout) -> Tensor:
    """A layer's output with its rows as in files."""
    if layout.row_order is RowOrder.INTERLEAVED:
        return deinterleave_modulation(output, dim=-1)
    return output


def _stored(output: Tensor, layout: BranchLayout) -> Tensor:
    """The inverse of `_logical`."""
    if layout.row_order is RowOrder.INTERLEAVED:
        return interleave_modulation(output, dim=-1)
    return output


def _add_low_rank(x: Tensor, down: Tensor, up: Tensor, output: Tensor) -> Tensor:
    hidden = torch.nn.functional.linear(x, down)  # (..., R)
    if output.dtype != up.dtype or output.ndim < 2:
        return output + torch.nn.functional.linear(hidden, up).to(output.dtype)
    # One kernel adds and rounds once: launches are what a branch costs.
    added = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.mT)  # (N, out)
    # A host that casts automatically casts what is added; the layer's own dtype is what it gives.
    return added.view_as(output).to(output.dtype)
