"""Modules whose forward hooks, or forward, compiled code cannot miss.

Dynamo guards a graph by the type of every module that it went through, but not by the module's
hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`). A graph that was traced without a hook
would run on when the hook is there, and the other way round. So a module that carries hooks of ours
is of a subclass of its class, which changes nothing but its type: graphs of both are kept, and the
right one runs. `torch.nn.utils.parametrize` changes types in the same way.

A subclass may have a forward of ours as well. It is given the forward of the class itself, so it
works where a host kept it, bound, beyond the time at which the module had the subclass.
"""

from __future__ import annotations

import copyreg
import functools
from typing import TYPE_CHECKING

from qwenlora.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from torch import nn

    Forward: TypeAlias = Callable[
        [nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any
    ]
    """A forward of ours: it takes the module, the forward of the module's class, and what that
    would be called with. A function of a module, so that pickles can name it."""

__all__ = ["forward_of", "is_marked", "mark_hooked", "plain_class", "unmark_hooked"]


_PLAIN = "_qwenlora_plain_class"
"""Attribute of a subclass: the class that it stands for."""
_FORWARD = "_qwenlora_forward"
"""Attribute of a subclass: our forward that it has; None where it has its class's."""
_SUBCLASSES: dict[tuple[type, Forward | None], type] = {}
"""Subclasses by their classes and forwards. They stay: graphs are kept by them, too."""


def mark_hooked(module: nn.Module, forward: Forward | None = None) -> None:
    """Let graphs that were traced without hooks of ours be traced anew.

    Args:
        module: The module.
        forward: A forward of ours that it gets; None leaves, or gives back, its class's.

    Raises:
        UnsupportedModelError: The type of the module cannot change: there can be no subclass.
    """
    if _is_marked(type(module)) and forward_of(module) is forward:
        return
    try:
        module.__class__ = _marked(plain_class(type(module)), forward)
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


def forward_of(module: nn.Module) -> Forward | None:
    """Our forward that the module's class has, or None."""
    forward: Forward | None = type(module).__dict__.get(_FORWARD)
    return forward


def _is_marked(kind: type) -> bool:
    return _PLAIN in kind.__dict__


def _marked(kind: type, forward: Forward | None) -> type:
    key = (kind, forward)
    if key not in _SUBCLASSES:
        _SUBCLASSES.setdefault(key, _subclass(kind, forward))
    return _SUBCLASSES[key]


def _subclass(kind: type, forward: Forward | None) -> type:
    """A subclass that differs from its class in nothing but its identity, and maybe its forward."""

    def reduce(module: nn.Module, protocol: int) -> Any:
        """Copies and pickles name the class that the module's own stands for."""
        reduced: Any = super(made, module).__reduce_ex__(max(2, protocol))  # type: ignore[arg-type]
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__ and arguments[0] is made:  # type: ignore[attr-defined]
            function, arguments = _new, (kind, forward, *arguments[1:])
        return (function, arguments, *rest)

    # Under the same name: others look classes up by it, and messages show it.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    own = {_PLAIN: kind, _FORWARD: forward}
    body = {**names, "__doc__": kind.__doc__, "__reduce_ex__": reduce, **own}
    if forward is not None:
        body["forward"] = _around(kind, forward)
    made: type = type(kind)(kind.__name__, (kind,), body)
    return made


def _around(kind: Any, forward: Forward) -> Callable[..., Any]:
    """Our forward as a method. Who unwraps it, to look at the code, finds the class's."""
    plain = kind.forward

    @functools.wraps(plain)
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(module, plain, args, kwargs)

    return run


def _new(kind: type, forward: Forward | None, *arguments: Any) -> Any:
    """A new module of the subclass that stands for a class."""
    marked = _marked(kind, forward)
    return marked.__new__(marked, *arguments)
