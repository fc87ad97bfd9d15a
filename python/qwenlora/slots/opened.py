"""Fused MLPs that are run as their two linears, because something runs beside one of them.

An MLP is opened exactly where one of its linears carries a branch. So whether it is follows from
the branches at any time: what an interrupt leaves is seen, and put right by looking again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwenlora.errors import UnsupportedModelError
from qwenlora.model.fused_mlp import layers_of
from qwenlora.model.subclass import forward_of, is_marked, mark_hooked, unmark_hooked
from qwenlora.slots.branch_layout import LAYOUT
from qwenlora.slots.unsigned import takes_unsigned, unsigned_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from qwenlora.model.target import Target

__all__ = ["is_as_needed", "require_openable", "run_opened", "set_as_needed"]


def run_opened(
    module: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Forward of a fused MLP: both linears with what runs beside them, GELU between them.

    Without a branch it is the class's own: a host may have kept it.
    """
    first, second = layers_of(module)
    if not (LAYOUT in first.__dict__ or LAYOUT in second.__dict__):
        return plain(module, *args, **kwargs)
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    # Where a host casts automatically, a branch may have another dtype than the kernels take.
    hidden = torch.nn.functional.gelu(first(x), approximate="tanh").to(x.dtype)
    return unsigned_output(second, hidden) if takes_unsigned(second) else second(hidden)


def set_as_needed(mlp: nn.Module) -> None:
    """Open a fused MLP where one of its linears carries a branch, else close it."""
    if _is_needed(mlp):
        mark_hooked(mlp, run_opened)
    else:
        unmark_hooked(mlp)


def is_as_needed(mlp: nn.Module) -> bool:
    """Tell if a fused MLP is opened where it must be, and nowhere else."""
    return forward_of(mlp) is run_opened if _is_needed(mlp) else not is_marked(mlp)


def require_openable(target: Target) -> None:
    """Check that the MLP of a linear that gets a branch can be opened.

    Raises:
        UnsupportedModelError: Something else runs around its forward.
    """
    if target.mlp is not None and "forward" in target.mlp.__dict__:
        raise UnsupportedModelError(
            f"the MLP of `{target.path}` has a forward of its own, which something else put there:"
            " what runs beside the layer would be missed"
            '\nhint: take off what hooks the MLP, or pass `ComposeOptions(mlp="rank")`'
        )


def _is_needed(mlp: nn.Module) -> bool:
    return any(LAYOUT in layer.__dict__ for layer in layers_of(mlp))
