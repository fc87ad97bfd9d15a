"""A model as ComfyUI's key maps see it: with the names of the dense model.

ComfyUI finds out from a model's state dict which weights a LoRA can change. A quantized layer has
no `weight` there, so its names are added, without values, by a second object over the same modules.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from qwenlora.model.modules import modules_of

from .. import host

__all__ = ["PREFIX", "is_view", "names_of", "view_of"]

PREFIX = "diffusion_model."
"""What stands before a transformer's names in ComfyUI's."""

_PACKED = "qweight"
_FUSED = "fused_module."
_DENSE = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "w13": ("w1", "w3"),
}
"""Fused layers, and the layers that ComfyUI's dense model has in their place."""

_SAVED = (
    "a Nunchaku model is saved without its LoRAs, as its file has no place for them: save them"
    " as one file with `qwenlora merge`"
)

_views: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
_names: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


def view_of(model: nn.Module) -> nn.Module:
    """The view of a model of the host's: another object over the same attributes.

    There is one for each model, which lives as long as that does.
    """
    if is_view(model):
        return model
    view = _views.get(model)
    if view is None:
        own = _view_class(type(model))
        view = cast(nn.Module, own.__new__(own))
        object.__setattr__(view, "__dict__", model.__dict__)
        _views[model] = view
    return view


def is_view(model: object) -> bool:
    """Tell if a model is a view of another."""
    return getattr(type(model), "_qwenlora_is_view", False)


def names_of(view: nn.Module) -> frozenset[str]:
    """The names of all weights that a patch may change; looked for once for each transformer."""
    transformer = cast(nn.Module, view.diffusion_model)
    names = _names.get(transformer)
    if names is None:
        names = _names[transformer] = frozenset(view.state_dict())
    return names


@functools.cache
def _view_class(model_class: type) -> type:
    # Modules find their methods here by the class, and their state in the attributes.
    def state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = model_class.state_dict(self, *args, **kwargs)  # type: ignore[attr-defined]
        # Without values: the host adds up the sizes of all entries.
        nothing = torch.empty(0)
        for name in _dense_names(self.diffusion_model):
            state.setdefault(PREFIX + name, nothing)
        return cast(dict[str, Any], state)

    def state_dict_for_saving(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # A file with the ranks of LoRAs, and without what runs beside layers, is no model.
        host.take_out(self.diffusion_model, host.compose_options())
        host.warn_once(_SAVED)
        saved = model_class.state_dict_for_saving(self, *args, **kwargs)  # type: ignore[attr-defined]
        return cast(dict[str, Any], saved)

    members = {
        "state_dict": state_dict,
        "state_dict_for_saving": state_dict_for_saving,
        "_qwenlora_is_view": True,
        "__module__": __name__,
    }
    return type(model_class.__name__, (model_class,), members)


def _dense_names(transformer: nn.Module) -> Iterator[str]:
    """Names that the dense model has and the quantized one lacks."""
    for path, module in modules_of(transformer):
        if getattr(module, _PACKED, None) is None:
            continue
        parent, _, leaf = path.replace(_FUSED, "").rpartition(".")
        kinds = ("weight",) if getattr(module, "bias", None) is None else ("weight", "bias")
        for part in _DENSE.get(leaf, (leaf,)):
            yield from (f"{parent}.{part}.{kind}" for kind in kinds)
