"""The order in which a gated MLP takes the rows of its fused linear, found by running it.

`SwiGLU(x) = value(x) * silu(gate(x))`. Where value and gate are the rows of one linear, nothing but
the forward tells which comes first.
"""

from __future__ import annotations

import copy
import enum
from types import MethodType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from qwenlora.model.code import own_forward
from qwenlora.model.modules import inner_of

if TYPE_CHECKING:
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
_known: dict[tuple[type, ...], RowsOfGated | None] = {}


def rows_of(mlp: nn.Module, layers: GatedMlp) -> RowsOfGated | None:
    """The order in which an MLP takes the rows of its fused linear.

    A copy of the MLP is run once on the CPU. Its fused linear gives numbers that are known, and
    the linear behind gives back what it gets. Neither has a weight, so an MLP that computes with
    those of its layers, and does not call them, gives an error.

    Args:
        mlp: The MLP; it is not changed.
        layers: Where its linears are.

    Returns:
        The order; None where its forward is not a SwiGLU over layers that it calls.
    """
    inner = inner_of(mlp)
    key = _code_of(inner, layers)
    if key is not None and key in _known:
        return _known[key]
    found = _tried(inner, layers)
    if key is not None:
        _known[key] = found
    return found


def _code_of(mlp: nn.Module, layers: GatedMlp) -> tuple[type, ...] | None:
    """The classes that run; None where a module has a forward of its own."""
    owners = [mlp]
    for name in layers.fused.split(".")[:-1]:
        owners.append(inner_of(owners[-1].get_submodule(name)))
    if any(own_forward(owner) is not None for owner in owners):
        return None
    return tuple(map(type, owners))


def _tried(mlp: nn.Module, layers: GatedMlp) -> RowsOfGated | None:
    first, second = torch.linspace(-2, 1, _VALUES), torch.linspace(3, 1.5, _VALUES)
    fused = _Given(torch.cat((first, second)))
    try:
        copied = _with(_with(mlp, layers.fused, fused), layers.down, nn.Identity())
        with torch.no_grad():
            out = copied.forward(torch.zeros(1, 1, _VALUES)).flatten()
    # Code of others, on stand-ins: whatever it raises, it is not the known form.
    except Exception:  # noqa: BLE001
        return None
    silu = nn.functional.silu
    products = {
        RowsOfGated.VALUE_FIRST: first * silu(second),
        RowsOfGated.GATE_FIRST: silu(first) * second,
    }
    is_called = isinstance(out, torch.Tensor) and out.shape == first.shape and fused.calls == 1
    alike = [order for order, own in products.items() if is_called and torch.allclose(out, own)]
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


def _with(module: nn.Module, path: str, stand_in: nn.Module) -> nn.Module:
    """A copy in which another module is at this path. It shares all else, and has no hooks."""
    name, _, rest = path.partition(".")
    module = inner_of(module)
    child = module._modules[name]
    if child is None:
        raise KeyError(name)
    copied = copy.copy(module)
    copied.__dict__ = {**module.__dict__}
    forward = own_forward(module)
    copied.__dict__.pop("forward", None)
    if isinstance(forward, MethodType):
        copied.__dict__["forward"] = MethodType(forward.__func__, copied)
    elif forward is not None:
        # One that is bound to the original in another way would run that.
        copied.__dict__["forward"] = forward
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        copied.__dict__[hooks] = type(module.__dict__[hooks])()
    inner = _with(child, rest, stand_in) if rest else stand_in
    copied.__dict__["_modules"] = {**module._modules, name: inner}
    return copied
