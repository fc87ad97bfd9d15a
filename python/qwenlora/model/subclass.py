"""Modules whose forward hooks compiled code cannot miss.

Dynamo guards a graph by the type of every module that it went through, but not by the module's
hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`). A graph that was traced without a hook
would run on when the hook is there, and the other way round. So a module that carries hooks of ours
is of a subclass of its class, which changes nothing but its type: graphs of both are kept, and the
right one runs. `torch.nn.utils.parametrize` changes types in the same way.
"""

from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING

from qwenlora.errors import UnsupportedModelError

if TYPE_CHECKING:
    from typing import Any

    from torch import nn

__all__ = ["is_marked", "mark_hooked", "plain_class", "unmark_hooked"]


_PLAIN = "_qwenlora_plain_class"
"""Attribute of a subclass: the class that it stands for."""
_SUBCLASSES: dict[type, type] = {}
"""Subclasses by their classes. They stay: graphs are kept by them, too."""


def mark_hooked(module: nn.Module) -> None:
    """Let graphs that were traced without hooks of ours be traced anew.

    Raises:
        UnsupportedModelError: The type of the module cannot change: there can be no subclass.
    """
    if _is_marked(type(module)):
        return
    try:
        module.__class__ = _marked(type(module))
    except TypeError as error:
        raise UnsupportedModelError(
            f"a {type(module).__name__} cannot carry a side branch: {error}"
            "\nhint: load the model with its own loader"
        ) from error


def unmark_hooked(module: nn.Module) -> None:
    """Let the graphs run again that were traced without hooks of ours."""
    if _is_marked(type(module)):
        module.__class__ = plain_class(type(module))


def plain_class(kind: type) -> type:
    """The class itself, or the one that a subclass of ours stands for."""
    plain: type = kind.__dict__.get(_PLAIN, kind)
    return plain


def is_marked(module: nn.Module) -> bool:
    """Tell if the module is of such a subclass."""
    return _is_marked(type(module))


def _is_marked(kind: type) -> bool:
    return _PLAIN in kind.__dict__


def _marked(kind: type) -> type:
    if kind not in _SUBCLASSES:
        _SUBCLASSES.setdefault(kind, _subclass(kind))
    return _SUBCLASSES[kind]


def _subclass(kind: type) -> type:
    """A subclass that differs from its class in nothing but its identity."""

    def reduce(module: nn.Module, protocol: int) -> Any:
        """Copies and pickles name the class that the module's own stands for."""
        reduced: Any = super(made, module).__reduce_ex__(max(2, protocol))  # type: ignore[arg-type]
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__ and arguments[0] is made:  # type: ignore[attr-defined]
            function, arguments = _new, (kind, *arguments[1:])
        return (function, arguments, *rest)

    # Under the same name: others look classes up by it, and messages show it.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    body = {**names, "__doc__": kind.__doc__, "__reduce_ex__": reduce, _PLAIN: kind}
    made: type = type(kind)(kind.__name__, (kind,), body)
    return made


def _new(kind: type, *arguments: Any) -> Any:
    """A new module of the subclass that stands for a class."""
    marked = _marked(kind)
    return marked.__new__(marked, *arguments)
