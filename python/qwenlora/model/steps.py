"""Step caches on a transformer: residuals that were computed with the stack before."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["forget_steps"]


_OWN = ("_cache_context", "_prev_timestep")
"""Attributes that wrappers in the manner of Nunchaku's keep on a transformer."""


def forget_steps(model: nn.Module) -> None:
    """Drop cached steps: what they hold belongs to another stack.

    cache-dit keeps contexts on the transformer, in its transformer-only mode from call to call. Its
    own `refresh_context` refuses in pipeline mode, and clearing buffers alone leaves the state of
    its calibrators; making each context anew does both.
    """
    for name in _OWN:
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    manager = model.__dict__.get("_context_manager")
    if manager is None or not type(manager).__module__.startswith("cache_dit."):
        return
    for name in model.__dict__.get("_context_names") or ():
        context = manager._cached_context_manager.get(name)
        if context is not None:
            manager.reset_context(name, **copy.deepcopy(context._init_kwargs))
