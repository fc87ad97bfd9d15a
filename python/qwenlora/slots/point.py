"""Points parameters at other tensors, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = ["point", "point_all", "point_back"]


def point_all(
    modules: Sequence[nn.Module],
    name: str,
    old: Sequence[Tensor],
    new: Sequence[Tensor],
    *,
    plain: bool,
) -> None:
    """Let a parameter of each module hold another tensor; see `point`."""
    if plain:
        for module, parameter, tensor in zip(modules, old, new, strict=True):
            _hold(module, parameter, tensor)
        return
    for module, tensor in zip(modules, new, strict=True):
        point(module, name, tensor)


def point(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter hold another tensor; the parameter itself stays the same object.

    A parameter made in inference mode cannot hold a normal tensor, and a tensor that outlives the
    call must be a normal one: there, and only there, a new parameter takes the old one's place.
    """
    current: Tensor = getattr(module, name)
    if not current.is_inference():
        _hold(module, current, tensor)
    elif isinstance(current, torch.nn.Parameter):
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=current.requires_grad))
    else:
        setattr(module, name, tensor)


def point_back(module: nn.Module, name: str, parameter: Tensor, data: Tensor) -> None:
    """Let a parameter hold what it held."""
    if getattr(module, name) is parameter:
        _hold(module, parameter, data)
    else:
        setattr(module, name, parameter)


def _hold(module: nn.Module, parameter: Tensor, tensor: Tensor) -> None:
    """Let a parameter of a module hold another tensor, and compiled code look at its size.

    Guards may take a parameter for what it was while the dictionary around it has the same version
    (`torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags`). PyTorch 2.5, 2.6 and 2.9 to
    2.11 would run a graph that was traced for another rank.
    """
    if parameter.shape != tensor.shape:
        # First: an interrupt between the two lines leaves a guard that looks, and finds nothing.
        _core.touch(module._parameters)
    parameter.data = tensor
