"""A fused MLP, run as its two linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwenlora.model.fused_mlp import LINEARS
from qwenlora.model.modules import submodule_of
from qwenlora.slots.branch_layout import LAYOUT
from qwenlora.slots.unsigned import takes_unsigned, unsigned_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["run_mlp"]


def run_mlp(
    module: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Forward of a fused MLP: both linears with what runs beside them, GELU between them.

    Without a branch it is the class's own: a host may have kept it.
    """
    first, second = (submodule_of(module, name) for name in LINEARS)
    if not (LAYOUT in first.__dict__ or LAYOUT in second.__dict__):
        return plain(module, *args, **kwargs)
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    # Where a host casts automatically, a branch may have another dtype than the kernels take.
    hidden = torch.nn.functional.gelu(first(x), approximate="tanh").to(x.dtype)
    return unsigned_output(second, hidden) if takes_unsigned(second) else second(hidden)
