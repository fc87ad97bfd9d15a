"""Points parameters at other tensors, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
        for parameter, tensor in zip(old, new, strict=True):
            parameter.data = tensor
        return
    for module, parameter, tensor in zip(modules, old, new, strict=True):
        if parameter.is_inference():
            point(module, name, tensor)
        else:
            parameter.data = tensor


def point(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter hold another tensor; the parameter itself stays the same object.

    A parameter made in inference mode cannot hold a normal tensor, and a tensor that outlives the
    call must be a normal one: there, and only there, a new parameter takes the old one's place.
    """
    current: Tensor = getattr(module, name)
    if not current.is_inference():
        current.data = tensor
    elif isinstance(current, torch.nn.Parameter):
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=current.requires_grad))
    else:
        setattr(module, name, tensor)


def point_back(module: nn.Module, name: str, parameter: Tensor, data: Tensor) -> None:
    """Let a parameter hold what it held."""
    if getattr(module, name) is parameter:
        parameter.data = data
    else:
        setattr(module, name, parameter)
