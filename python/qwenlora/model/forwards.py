"""Checks of what must be known of a model before the picture can be promised.

A layer's tensors say where a delta goes. They do not say whether the forward reads it: some layers
take their rank from an attribute, some blocks take the rows of their modulation in another order,
some kernels compute a layer that no hook sees. What is not understood is refused by name.
"""

from __future__ import annotations

import dis
import functools
import inspect
import json
from functools import lru_cache
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.errors import UnsupportedModelError
from qwenlora.model.modules import pattern
from qwenlora.model.qwen_image import BLOCKS, FUSED_ATTENTION, MODULATIONS, QUERY
from qwenlora.plan.documents import SlotKind

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from torch import nn

    from qwenlora.model.target import Target

__all__ = ["reads_rank", "require_understood", "unknown_layer"]


_RANK = "rank"
"""Last word of an attribute that some layers size their low-rank activations by."""
_SCALES = "lora_scales"
"""Attribute that some layers hand to the kernels: scales of the ranks that they were made with."""
_FUSED_FACTORS = ("_proj_down", "_lora_down")
"""Endings of names of low-rank factors that a fused module keeps under a prefix."""


def require_understood(targets: Mapping[str, Target], paths: Container[str]) -> None:
    """Check that the forward reads what composing would change, in the order that is known.

    Args:
        targets: A model's slots by path.
        paths: Paths of all its modules.

    Raises:
        UnsupportedModelError: It does not, or that is unknown.
    """
    for path, target in targets.items():
        if target.place is not None and target.place.rank is None:
            _require_rank_of_tensors(path, target.module)
        elif path.endswith(MODULATIONS):
            _require_order_of_rows(path, target, paths)


def unknown_layer(
    targets: Mapping[str, Target], modules: Iterable[tuple[str, nn.Module]]
) -> str | None:
    """The first quantized layer that is in no model's table; None where all are known.

    Args:
        targets: The model's slots by path.
        modules: All its modules by path.
    """
    known, modules = _known_patterns(), list(modules)
    paths = {path for path, _ in modules}
    quantized = (SlotKind.SVDQ, SlotKind.AWQ)
    for path, target in targets.items():
        if target.kind in quantized and not _is_known(path, target.row.pattern, known, paths):
            return path
    for path, module in modules:
        names = (*module._parameters, *module._buffers)
        if path not in targets and any(name.endswith(_FUSED_FACTORS) for name in names):
            return path
    return None


def _is_known(path: str, alike: str, known: Container[str], paths: Container[str]) -> bool:
    """Tell if a known model has the layer, in a block with two streams as that model's are."""
    if alike not in known:
        return False
    if not path.startswith(f"{BLOCKS}."):
        return True
    block = ".".join(path.split(".", 2)[:2])
    return all(f"{block}.{name}" in paths for name in MODULATIONS)


def _require_rank_of_tensors(path: str, module: nn.Module) -> None:
    """A forward that sizes buffers by an attribute would pass over ranks, or run past the end."""
    kind: type = type(module)
    own = module.__dict__.get("forward")
    reads = reads_rank(kind) if own is None else _reads_rank([own], kind)
    if reads:
        raise UnsupportedModelError(
            f"`{path}` is a {_name(module)} whose forward takes the rank from an attribute, or"
            " scales for each rank, not from its tensors: such layers take no LoRA yet"
            "\nhint: load the model with Nunchaku's own loader"
        )


def _require_order_of_rows(path: str, target: Target, paths: Container[str]) -> None:
    """The order of a modulation's rows is a fact of its block, which its attention tells."""
    block = path.rsplit(".", 2)[0]
    nunchakus = f"{block}.{FUSED_ATTENTION}" in paths
    stock = f"{block}.{QUERY}" in paths
    if target.kind is SlotKind.AWQ and (stock or not nunchakus):
        raise UnsupportedModelError(
            f"the order in which `{block}` takes the rows of `{path}` is not known:"
            f" without one fused `{FUSED_ATTENTION}` the block is not Nunchaku's"
            "\nhint: load the model with Nunchaku's own loader"
        )
    if target.kind is SlotKind.LINEAR and nunchakus:
        raise UnsupportedModelError(
            f"`{path}` is a {_name(target.module)} in a block of Nunchaku's: the order in which the"
            " block takes the rows of one that is not quantized is not known"
            "\nhint: load a checkpoint whose modulation is quantized, as Nunchaku's are"
        )


def _name(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


@lru_cache(maxsize=1)
def _known_patterns() -> frozenset[str]:
    """Paths of the known models' slots, block numbers replaced by `*`."""
    return frozenset(pattern(slot["path"]) for slot in json.loads(_core.known_slots()))


@lru_cache(maxsize=64)
def reads_rank(kind: type) -> bool:
    """Tell if the forward of a class, or what it calls, reads a rank from some attribute.

    Looks at the code of every `forward` and `__call__` of the class and its bases, of methods and
    functions whose names that code holds, and so on. PyTorch's own code is left out. Code that
    cannot be looked at counts as reading a rank.
    """
    return _reads_rank([], kind)


def _reads_rank(begin: Sequence[object], kind: type) -> bool:
    waiting: list[object] = [*begin, *_defined(kind, "forward"), *_defined(kind, "__call__")]
    seen: set[CodeType] = set()
    while waiting:
        function = _function_of(waiting.pop())
        if function is None:
            return True
        if function.__code__ in seen or _is_torchs(function.__module__):
            continue
        seen.add(function.__code__)
        attributes, others = _names_in(function.__code__)
        if any(_is_rank(name) for name in attributes):
            return True
        for name in attributes | others:
            waiting += _defined(kind, name)
            waiting += _of_globals(function, name, attributes)
    return False


def _is_rank(name: str) -> bool:
    """Tell if an attribute is named as a rank, as `lora_rank` is; `unpack_lowrank` is a function.

    Scales count, too: one for every 16 ranks, and what is missing of them is 0 to the kernels.
    """
    return name in (_RANK, _SCALES) or name.endswith(f"_{_RANK}")


def _defined(kind: type, name: str) -> list[object]:
    """List what a class, and each base of it before PyTorch's own, defines to be called."""
    found = []
    for base in kind.__mro__:
        own = vars(base).get(name)
        called = isinstance(own, (staticmethod, classmethod, property)) or callable(own)
        if called and not isinstance(own, type) and not _is_torchs(base.__module__):
            found.append(own)
    return found


def _of_globals(function: FunctionType, name: str, attributes: set[str]) -> list[object]:
    """A function of the same module that code names, or functions of a class that it names."""
    found = function.__globals__.get(name)
    if isinstance(found, FunctionType):
        return [found]
    if isinstance(found, type) and not _is_torchs(found.__module__):
        return [own for attribute in attributes for own in _defined(found, attribute)]
    return []


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


def _names_in(code: CodeType) -> tuple[set[str], set[str]]:
    """Attributes that code, or code inside it, looks up; and its other names.

    A text that is a name counts as an attribute: `getattr` takes one, and so does `__dict__`.
    """
    attributes, others = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            attributes.add(str(instruction.argval))
        elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            others.add(str(instruction.argval))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names_in(constant)
            attributes |= inner[0]
            others |= inner[1]
        elif isinstance(constant, str) and constant.isidentifier():
            attributes.add(constant)
    return attributes, others
