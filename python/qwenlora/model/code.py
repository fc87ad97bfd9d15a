"""The code of a class's forward: which names it looks up, also in what it calls.

Tensors do not say whether a forward reads them, or what else it reads. Its code does.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from functools import lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

__all__ = [
    "NamesRead",
    "arguments_of",
    "calls_its_layers",
    "class_name",
    "names_in",
    "names_in_forward",
    "names_of_class",
    "names_of_module",
    "own_forward",
]


_OF_A_LAYER = frozenset(("forward_quant", "proj", "proj_down", "proj_up", "quantize", "qweight"))
"""What code names that computes a layer without calling it; `proj` is the layer inside an
activation."""


def class_name(value: object) -> str:
    """The full name of an object's class."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


class NamesRead(NamedTuple):
    """The attributes that code looks up.

    Attributes:
        own: On the object whose method the code is.
        others: On any other object, or by a text that is a name.
    """

    own: frozenset[str]
    others: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        """All of them."""
        return self.own | self.others


class _Called(NamedTuple):
    """Something that code calls; `is_method` where its first argument is the object itself."""

    called: object
    is_method: bool


@lru_cache(maxsize=64)
def names_of_class(kind: type, *, through_modules: bool = False) -> NamesRead | None:
    """All attributes that the forward of a class looks up, also in what it calls.

    Looks at the code of every `forward` and `__call__` of the class and its bases, of methods and
    functions whose names that code holds, and so on. PyTorch's own code is left out.

    Args:
        kind: The class.
        through_modules: Whether functions count that code reaches as attributes of Python modules.

    Returns:
        Their names; None where some code cannot be looked at.
    """
    return _names_read([], kind, through_modules=through_modules)


def names_of_module(module: nn.Module, *, through_modules: bool = False) -> NamesRead | None:
    """The same of one module, which may have its own forward, or one around its class's."""
    kind: type = type(module)
    forward = own_forward(module)
    if forward is None:
        return names_of_class(kind, through_modules=through_modules)
    begin = [_Called(forward, isinstance(forward, MethodType))]
    return _names_read(begin, kind, through_modules=through_modules)


def own_forward(module: nn.Module) -> object | None:
    """The forward that one module has instead of its class's.

    None where it has none, or where it is only one around its class's, as hosts' hooks are.
    """
    forward = module.__dict__.get("forward")
    if forward is None:
        return None
    function = _function_of(forward)
    kind: type = type(module)
    is_class_s = any(_function_of(own.called) is function for own in _defined(kind, "forward"))
    return None if is_class_s else forward


def names_in_forward(module: nn.Module) -> frozenset[str]:
    """All names in the code of a module's own forward, or of its class's; not in what it calls."""
    kind: Any = type(module)
    return names_in(own_forward(module) or kind.forward)


def names_in(called: object) -> frozenset[str]:
    """All names in the code of a function or method; not in what it calls."""
    function = _function_of(called)
    if function is None:
        return frozenset()
    code = function.__code__
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(name for own in (code, *inner) for name in own.co_names)


def arguments_of(called: object) -> tuple[str, ...]:
    """The names of the arguments of a function or method that may be given by place."""
    function = _function_of(called)
    if function is None:
        return ()
    code = function.__code__
    return code.co_varnames[: code.co_argcount]


def calls_its_layers(*code: object, layers: Iterable[str] = ()) -> bool:
    """Tell if code calls the layers that it computes, as far as the names in it tell.

    Args:
        code: Modules, whose forwards are looked at, and other objects that are called.
        layers: Names of which the code must hold one: that of code around the real one does not.
    """
    found: set[str] = set()
    for own in code:
        if isinstance(own, torch.nn.Module):
            names = names_of_module(own, through_modules=True)
        else:
            kind: type = type(own)
            names = names_of_class(kind, through_modules=True)
        if names is None or not names.all.isdisjoint(_OF_A_LAYER):
            return False
        found |= names.all
    wanted = frozenset(layers)
    return not wanted or not wanted.isdisjoint(found)


def _names_read(begin: Sequence[_Called], kind: type, *, through_modules: bool) -> NamesRead | None:
    waiting = [*begin, *_defined(kind, "forward"), *_defined(kind, "__call__")]
    seen: set[tuple[CodeType, bool]] = set()
    own: set[str] = set()
    others: set[str] = set()
    while waiting:
        called, is_method = waiting.pop()
        function = _function_of(called)
        if function is None:
            return None
        code = function.__code__
        if (code, is_method) in seen or _is_torchs(function.__module__):
            continue
        seen.add((code, is_method))
        of_first, of_others, free = _names_in(code)
        own |= of_first if is_method else set()
        others |= of_others if is_method else of_first | of_others
        attributes = of_first | of_others
        for name in attributes | free:
            waiting += _defined(kind, name)
            waiting += _of_globals(function, name, attributes)
            waiting += _of_module(function, name, attributes) if through_modules else ()
    return NamesRead(frozenset(own), frozenset(others))


def _defined(kind: type, name: str) -> list[_Called]:
    """List what a class, and each base of it before PyTorch's own, defines to be called."""
    found = []
    for base in kind.__mro__:
        own = vars(base).get(name)
        called = isinstance(own, (staticmethod, classmethod, property)) or callable(own)
        if called and not isinstance(own, type) and not _is_torchs(base.__module__):
            found.append(_Called(own, not isinstance(own, (staticmethod, classmethod))))
    return found


def _of_globals(function: FunctionType, name: str, attributes: Iterable[str]) -> list[_Called]:
    """A function of the same module that code names, or functions of a class that it names."""
    found = function.__globals__.get(name)
    if isinstance(found, FunctionType):
        return [_Called(found, is_method=False)]
    if isinstance(found, type) and not _is_torchs(found.__module__):
        defined = [own for attribute in attributes for own in _defined(found, attribute)]
        return [_Called(own.called, is_method=False) for own in defined]
    return []


def _of_module(function: FunctionType, name: str, attributes: Iterable[str]) -> list[_Called]:
    """Functions of a Python module that code names, of which it names them."""
    found = function.__globals__.get(name)
    if not isinstance(found, ModuleType) or _is_torchs(found.__name__):
        return []
    if found.__name__.partition(".")[0] in sys.stdlib_module_names:
        return []
    own = (vars(found).get(attribute) for attribute in attributes)
    return [_Called(one, is_method=False) for one in own if isinstance(one, FunctionType)]


def _is_torchs(module: str | None) -> bool:
    return (module or "").partition(".")[0] in (torch.__name__, "builtins")


def _function_of(called: object) -> FunctionType | None:
    """The function behind a method, a property, a partial or a decorated one, if it is Python's."""
    while True:
        if isinstance(called, (staticmethod, classmethod, MethodType)):
            called = called.__func__
        elif isinstance(called, property):
            called = called.fget
        elif isinstance(called, functools.partial):
            called = called.func
        else:
            break
    called = inspect.unwrap(called) if callable(called) else called
    return called if isinstance(called, FunctionType) else None


def _names_in(code: CodeType) -> tuple[set[str], set[str], set[str]]:
    """Attributes that code, or code inside it, looks up: on its first argument, and on others.

    A text that is a name counts as an attribute: `getattr` takes one, and so does `__dict__`. The
    code's other names come third.
    """
    of_first: set[str] = set()
    others: set[str] = set()
    free: set[str] = set()
    first = code.co_varnames[0] if code.co_argcount else None
    loaded = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            names = of_first if loaded is not None and loaded == first else others
            names.add(str(instruction.argval))
        elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            free.add(str(instruction.argval))
        loaded = _loaded_by(instruction)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names_in(constant)
            others |= inner[0] | inner[1]
            free |= inner[2]
        elif isinstance(constant, str) and constant.isidentifier():
            others.add(constant)
    return of_first, others, free


def _loaded_by(instruction: dis.Instruction) -> str | None:
    """The variable that an instruction has just loaded; of two the second."""
    if not instruction.opname.startswith("LOAD_FAST"):
        return None
    name = instruction.argval
    return str(name[-1] if isinstance(name, tuple) else name)
