"""The modules of a model by path, as if no wrapper stood between them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qwenlora.errors import ModelStateError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["inner_of", "is_wrapper", "modules_of", "pattern", "submodule_of"]


_TORCHS_OWN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which PyTorch's wrappers hold what they wrap: of `torch.compile`, of fully sharded
data parallel, of activation checkpointing."""
_COMMON = "module"
"""The name that data parallel, and most wrappers of others, use."""
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""A block's number: a whole segment of a path."""


def is_wrapper(module: nn.Module) -> bool:
    """Tell if a module only wraps another: it has one child, under a wrapper's name."""
    children = module._modules
    if len(children) != 1:
        return False
    (name, child), *_ = children.items()
    if child is None:
        return False
    bare = not module._parameters and not module._buffers
    return name in _TORCHS_OWN or (name == _COMMON and bare)


def inner_of(module: nn.Module) -> nn.Module:
    """The module inside any number of wrappers; the module itself where it is no wrapper."""
    while is_wrapper(module):
        module = _only_child(module)
    return module


def _only_child(wrapper: nn.Module) -> nn.Module:
    children = [child for child in wrapper._modules.values() if child is not None]
    return children[0]


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List what `named_modules` gives, in half the time.

    A wrapper has the path of what it wraps, and comes before it: paths are those of the model
    before somebody wrapped its parts.
    """
    found: list[tuple[str, nn.Module]] = []
    _visit("", model, found, set())
    return found


# A function within would refer to itself, and keep the model alive until cycles are looked for.
def _visit(
    path: str, module: nn.Module, found: list[tuple[str, nn.Module]], seen: set[nn.Module]
) -> None:
    seen.add(module)
    found.append((path, module))
    children = module._modules
    if not children:
        return
    if len(children) == 1 and is_wrapper(module):
        inner = _only_child(module)
        if inner not in seen:
            _visit(path, inner, found, seen)
        return
    prefix = f"{path}." if path else ""
    for name, child in children.items():
        if child is not None and child not in seen:
            _visit(prefix + name, child, found, seen)


def pattern(path: str) -> str:
    """The path with its block's number replaced by `*`."""
    return _NUMBER.sub("*", path, count=1)


def submodule_of(module: nn.Module, path: str) -> nn.Module:
    """The module at a path as `modules_of` gives it.

    Raises:
        ModelStateError: There is none.
    """
    found = inner_of(module)
    for name in path.split("."):
        child = found._modules.get(name)
        if child is None:
            raise ModelStateError(f"a {type(module).__name__} has no `{path}`: `{name}` is missing")
        found = inner_of(child)
    return found
