"""What must be known of a model before the picture can be promised.

A layer's tensors say where a delta goes. They do not say whether the forward reads it: some layers
take their rank from an attribute, some blocks take the rows of their modulation in another order,
some kernels compute a layer that no hook sees. What is not understood is refused by name.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Container, Iterable, Mapping
from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.errors import UnsupportedModelError
from qwenlora.modules import pattern
from qwenlora.plan import SlotKind

if TYPE_CHECKING:
    from torch import nn

    from qwenlora.targets import Target

__all__ = ["reads_attribute", "require_understood", "unknown_layer"]

_RANK = "rank"
"""Attribute that some layers size their low-rank activations by."""
_MODULATIONS = (".img_mod.1", ".txt_mod.1")
_FUSED = "attn.to_qkv"
_APART = "attn.to_q"
_FUSED_FACTOR = "_proj_down"
"""How the name of a low-rank factor ends that a fused module keeps under a prefix."""


def require_understood(targets: Mapping[str, Target], paths: Container[str]) -> None:
    """Check that the forward reads what composing would change, in the order that is known.

    Args:
        targets: A model's slots by path.
        paths: Paths of all its modules.

    Raises:
        UnsupportedModelError: It does not, or that cannot be told.
    """
    for path, target in targets.items():
        if target.kind is SlotKind.SVDQ:
            _require_rank_of_tensors(path, target.module)
        elif path.endswith(_MODULATIONS):
            _require_order_of_rows(path, target, paths)


def unknown_layer(
    targets: Mapping[str, Target], modules: Iterable[tuple[str, nn.Module]]
) -> str | None:
    """The first quantized layer that is in no model's table; None where all are known.

    Args:
        targets: The model's slots by path.
        modules: All its modules by path.
    """
    known = _known_patterns()
    quantized = (SlotKind.SVDQ, SlotKind.AWQ)
    for path, target in targets.items():
        if target.kind in quantized and target.row.pattern not in known:
            return path
    for path, module in modules:
        if path not in targets and any(name.endswith(_FUSED_FACTOR) for name in module._parameters):
            return path
    return None


def _require_rank_of_tensors(path: str, module: nn.Module) -> None:
    """A forward that sizes buffers by an attribute would pass over ranks, or run past the end."""
    kind: type = type(module)
    if isinstance(module.__dict__.get(_RANK), int) and reads_attribute(kind, _RANK):
        raise UnsupportedModelError(
            f"`{path}` is a {_name(module)} whose forward takes the rank from its attribute"
            f" `{_RANK}`, not from its tensors: such layers take no LoRA yet"
            "\nhint: load the model with Nunchaku's own loader"
        )


def _require_order_of_rows(path: str, target: Target, paths: Container[str]) -> None:
    """The order of a modulation's rows is a fact of its block, which its attention tells."""
    block = path.rsplit(".", 2)[0]
    nunchakus = f"{block}.{_FUSED}" in paths
    stock = f"{block}.{_APART}" in paths
    if target.kind is SlotKind.AWQ and (stock or not nunchakus):
        raise UnsupportedModelError(
            f"the order in which `{block}` takes the rows of `{path}` is not known:"
            f" without one fused `{_FUSED}` the block is not Nunchaku's"
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
def reads_attribute(kind: type, name: str) -> bool:
    """Whether the forward of a class, or a method that it calls, reads an attribute of this name.

    Code that cannot be looked at counts as reading it.
    """
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        code = _code_of(inspect.getattr_static(kind, waiting.pop(), None))
        if code is None:
            return True
        names = _names_in(code)
        if name in names:
            return True
        methods = {own for own in names - seen if _is_own_method(kind, own)}
        seen |= methods
        waiting += methods
    return False


def _code_of(function: object) -> CodeType | None:
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    if isinstance(function, property):
        function = function.fget
    if not callable(function):
        return None
    function = inspect.unwrap(function)
    return function.__code__ if isinstance(function, FunctionType) else None


def _names_in(code: CodeType) -> set[str]:
    """Names of attributes and globals that code, or a function inside it, looks up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names_in(constant)
    return names


def _is_own_method(kind: type, name: str) -> bool:
    """Whether a class, or a base of it before PyTorch's own, defines something to call."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == torch.__name__:
            return False
        found = vars(base).get(name)
        if found is not None:
            return callable(found) or isinstance(found, (staticmethod, classmethod, property))
    return False
