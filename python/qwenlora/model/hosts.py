"""Ways of others to move a model's weights, and whether what is composed there lasts.

Some hooks hold copies of the weights that they put back after each forward. They would take a
composed branch away without a word, so they are refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenlora.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

__all__ = ["is_sequentially_offloaded", "require_lasting"]


_DIFFUSERS_HOOKS = "_diffusers_hook"
_GROUP_OFFLOADING = "group_offloading"
_ACCELERATE_HOOK = "_hf_hook"


def require_lasting(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Check that nobody puts copies of weights back that were made before.

    diffusers' group offload does so where it uses a stream, or a disk. Without either it moves what
    is there.

    Raises:
        UnsupportedModelError: Somebody does.
    """
    for path, module in modules:
        registry = module.__dict__.get(_DIFFUSERS_HOOKS)
        group = _group_of(registry) if registry is not None else None
        if group is None:
            continue
        on_disk = getattr(group, "offload_to_disk_path", None) is not None
        if on_disk or getattr(group, "stream", None) is not None:
            where = "from a disk" if on_disk else "with a stream"
            raise UnsupportedModelError(
                f"`{path}` is offloaded in groups {where}: that puts back the weights that it"
                " copied when it was turned on\nhint: compose before `enable_group_offload`, or"
                " turn it on with `use_stream=False` and without `offload_to_disk_path`"
            )


def _group_of(registry: Any) -> Any:
    hook = getattr(registry, "hooks", {}).get(_GROUP_OFFLOADING)
    return getattr(hook, "group", None)


def is_sequentially_offloaded(module: nn.Module) -> bool:
    """Tell if accelerate holds this layer's weights elsewhere between forwards."""
    hook = module.__dict__.get(_ACCELERATE_HOOK)
    hooks = getattr(hook, "hooks", (hook,))
    return any(getattr(own, "offload", False) for own in hooks)
