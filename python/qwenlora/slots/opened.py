"""Modules that run layers inside a kernel, opened because something runs beside one of them.

Such a module is opened exactly where one of its layers carries a branch. So whether it is follows
from the branches at any time: what an interrupt leaves is seen, and put right by looking again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.errors import UnsupportedModelError
from qwenlora.model.opened import OpenedForm
from qwenlora.model.subclass import forward_of, is_marked, mark_hooked, unmark_hooked
from qwenlora.slots.branch_layout import LAYOUT
from qwenlora.slots.opened_attention import run_attention, run_by_processor, run_projection
from qwenlora.slots.opened_mlp import run_mlp

if TYPE_CHECKING:
    from qwenlora.model.opened import Opened
    from qwenlora.model.subclass import Forward
    from qwenlora.model.target import Target

__all__ = ["is_as_needed", "require_openable", "set_as_needed"]


_FORWARDS: dict[OpenedForm, Forward] = {
    OpenedForm.MLP: run_mlp,
    OpenedForm.PROJECTION: run_projection,
    OpenedForm.ATTENTION: run_attention,
    OpenedForm.PROCESSOR: run_by_processor,
}
_NAMES = {
    OpenedForm.MLP: "the MLP of",
    OpenedForm.PROJECTION: "the module of",
    OpenedForm.ATTENTION: "the attention of",
    OpenedForm.PROCESSOR: "the attention of",
}
"""What a module is to one of its layers, in messages."""


def set_as_needed(opened: Opened) -> None:
    """Open a module where one of its layers carries a branch, else close it."""
    if _is_needed(opened):
        mark_hooked(opened.module, _FORWARDS[opened.form])
    else:
        unmark_hooked(opened.module)


def is_as_needed(opened: Opened) -> bool:
    """Tell if a module is opened where it must be, and nowhere else."""
    if _is_needed(opened):
        return forward_of(opened.module) is _FORWARDS[opened.form]
    return not is_marked(opened.module)


def require_openable(target: Target) -> None:
    """Check that what runs a layer that gets a branch can be opened.

    Raises:
        UnsupportedModelError: Something else runs around its forward.
    """
    opened = target.opened
    if opened is not None and "forward" in opened.module.__dict__:
        raise UnsupportedModelError(
            f"{_NAMES[opened.form]} `{target.path}` has a forward of its own, which something else"
            " put there: what runs beside the layer would be missed"
            '\nhint: take off what hooks it, or pass `ComposeOptions(mlp="rank")`'
        )


def _is_needed(opened: Opened) -> bool:
    return any(LAYOUT in layer.__dict__ for layer in opened.held())
