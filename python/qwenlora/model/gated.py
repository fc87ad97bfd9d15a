"""The order in which a gated MLP takes the rows of its fused linear, found by running it.

`SwiGLU(x) = value(x) * silu(gate(x))`. Where value and gate are the rows of one linear, nothing but
the forward tells which comes first.
"""

from __future__ import annotations

import copy
import enum
from functools import lru_cache
from types import MethodType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from qwenlora.model.code import own_forward
from qwenlora.model.modules import inner_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

__all__ = ["GatedMlp", "RowsOfGated", "rows_of"]


class GatedMlp(NamedTuple):
    """An MLP with a fused linear of value and gate.

    Attributes:
        fused: Path of that linear in the MLP.
        down: Path of the linear behind the product.
    """

    fused: str
    down: str


class RowsOfGated(enum.Enum):
    """The order of the rows."""

    VALUE_FIRST = "value first"
    GATE_FIRST = "gate first"


_VALUES = 4
"""Values and gates that are tried."""
_MAX_KNOWN = 64
_known: dict[Hashable, RowsOfGated | None] = {}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def rows_of(mlp: nn.Module, layers: GatedMlp) -> RowsOfGated | None:
    """The order in which an MLP takes the rows of its fused linear.

    A copy of the MLP is run once on the CPU. Its fused linear gives numbers that are known, and
    the linear behind gives back what it gets. Neither has a weight, so an MLP that computes with
    those of its layers, and does not call them, gives an error.

    Args:
        mlp: The MLP; it is not changed, and nobody's hooks are run.
        layers: Where its linears are.

    Returns:
        The order; None where its forward is not a SwiGLU over layers that it calls.
    """
    signature = _signature(inner_of(mlp), "", layers)
    if signature is None:
        return _tried(mlp, layers)
    key = (layers, signature)
    if key not in _known:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = _tried(mlp, layers)
    return _known[key]


def _signature(module: nn.Module, path: str, layers: GatedMlp) -> Hashable | None:
    """All that decides what an MLP computes, its linears aside; None where that cannot be told."""
    if path in layers:
        return path
    if own_forward(module) is not None or module._parameters or module._buffers:
        return None
    settings = {name: own for name, own in vars(module).items() if name not in _of_any_module()}
    if not all(isinstance(own, (str, int, float, type(None))) for own in settings.values()):
        return None
    children = []
    for name, child in module._modules.items():
        inner = None if child is None else inner_of(child)
        own = None if inner is None else _signature(inner, f"{path}.{name}".strip("."), layers)
        if inner is not None and own is None:
            return None
        children.append((name, own))
    kind: type[nn.Module] = type(module)
    return (kind, kind.forward, tuple(sorted(settings.items())), tuple(children))


@lru_cache(maxsize=1)
def _of_any_module() -> frozenset[str]:
    return frozenset(vars(nn.Module())) - {"training"}


def _tried(mlp: nn.Module, layers: GatedMlp) -> RowsOfGated | None:
    with torch.device("cpu"):
        first, second = torch.linspace(-2, 1, _VALUES), torch.linspace(3, 1.5, _VALUES)
        fused = _Given(torch.cat((first, second)))
        stand_ins = {layers.fused: fused, layers.down: nn.Identity()}
        try:
            copied = _copy(mlp, "", stand_ins)
            with torch.no_grad():
                out = copied.forward(torch.zeros(1, 1, _VALUES))
        # Code of others, on stand-ins: whatever it raises, it is not the known form.
        except Exception:  # noqa: BLE001
            return None
    if not isinstance(out, torch.Tensor) or out.numel() != _VALUES or fused.calls != 1:
        return None
    silu = nn.functional.silu
    products = {
        RowsOfGated.VALUE_FIRST: first * silu(second),
        RowsOfGated.GATE_FIRST: silu(first) * second,
    }
    alike = [order for order, own in products.items() if torch.allclose(out.flatten(), own)]
    return alike[0] if alike else None


class _Given(nn.Module):
    """Gives the same values, whatever it gets."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self._values = values
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self._values.expand(*x.shape[:-1], -1)


def _copy(module: nn.Module, path: str, stand_ins: dict[str, nn.Module]) -> nn.Module:
    """A copy of a tree of modules without hooks, with other modules at some paths.

    It shares all else, and leaves out wrappers.
    """
    if path in stand_ins:
        return stand_ins[path]
    module = inner_of(module)
    copied = copy.copy(module)
    copied.__dict__ = {**module.__dict__}
    forward = own_forward(module)
    copied.__dict__.pop("forward", None)
    if isinstance(forward, MethodType):
        copied.__dict__["forward"] = MethodType(forward.__func__, copied)
    elif forward is not None:
        # One that is bound to the original in another way would run that.
        copied.__dict__["forward"] = forward
    for hooks in _HOOKS:
        copied.__dict__[hooks] = type(module.__dict__[hooks])()
    copied.__dict__["_modules"] = {
        name: child and _copy(child, f"{path}.{name}".strip("."), stand_ins)
        for name, child in module._modules.items()
    }
    return copied
