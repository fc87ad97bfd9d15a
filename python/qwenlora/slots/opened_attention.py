"""Attentions whose query, key and value a kernel computes, run with that layer by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwenlora.errors import UnsupportedModelError
from qwenlora.model.code import class_name
from qwenlora.model.fused_attention import attention_norms, plain_base, projection_norms
from qwenlora.model.opened import OpenedForm
from qwenlora.model.subclass import plain_class
from qwenlora.slots.beside import add_side_branch, layer_output
from qwenlora.slots.branch_layout import LAYOUT
from qwenlora.slots.rotary import norm_and_rotate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from qwenlora.slots.branch_layout import BranchLayout

__all__ = ["run_attention", "run_by_processor", "run_projection"]


_ROTATION = "freqs_cis"
_PLACE_OF_ROTATION = 2
"""Among the arguments of an attention of ComfyUI's."""


def run_projection(
    module: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Forward of Nunchaku's `fused_module`: its branch comes before norms and rotation.

    Without a branch it is the class's own: a host may have kept it.
    """
    layout: BranchLayout | None = module.__dict__.get(LAYOUT)
    if layout is None:
        return plain(module, *args, **kwargs)
    given = {**dict(zip(("x", _ROTATION), args, strict=False)), **kwargs}
    x: Tensor = given["x"]

    def layer(x: Tensor) -> Tensor:
        # Without rotations the kernel leaves out the norms, too.
        output: Tensor = plain(module, x, None)
        return output

    if layout.runs_layer:
        output = layer_output(module, layout, x, raw=layer, changed=layer)
    else:
        output = layer(x)
    output = add_side_branch(module, (x,), {}, output)
    rotation: Tensor | None = given.get(_ROTATION)
    if rotation is None:
        return output
    return norm_and_rotate(output, *projection_norms(module), rotation)


def run_attention(
    module: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Forward of an attention of ComfyUI's whose `qkv` has a branch.

    The code of the base class does what comes behind norms and rotation. Without a branch it is the
    class's own: a host may have kept it.
    """
    if LAYOUT not in module.qkv.__dict__:
        return plain(module, *args, **kwargs)
    base: Any = _require_base(module, OpenedForm.ATTENTION)
    by_name = _ROTATION in kwargs
    rotation = kwargs[_ROTATION] if by_name else args[_PLACE_OF_ROTATION]
    x: Tensor = args[0] if args else kwargs["x"]
    turned = _turned(module, OpenedForm.ATTENTION, module.qkv(x), rotation)
    same = {"q_norm": _as_it_is, "k_norm": _as_it_is}
    view = _with(module, {"qkv": lambda _: turned, **same})
    none = _no_rotation(turned, module.head_dim)
    if by_name:
        return base.forward(view, *args, **{**kwargs, _ROTATION: none})
    return base.forward(
        view, *args[:_PLACE_OF_ROTATION], none, *args[_PLACE_OF_ROTATION + 1 :], **kwargs
    )


def run_by_processor(
    module: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Forward of an attention of diffusers' whose `to_qkv` has a branch.

    A processor of the base class, in the state of the attention's own, does what comes behind norms
    and rotation. Without a branch it is the class's own: a host may have kept it.
    """
    if LAYOUT not in module.to_qkv.__dict__:
        return plain(module, *args, **kwargs)
    base: Any = _require_base(module, OpenedForm.PROCESSOR)
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    turned = _turned(module, OpenedForm.PROCESSOR, module.to_qkv(x), kwargs.get(_ROTATION))
    query, key, value = turned.chunk(3, dim=-1)
    processor = object.__new__(base)
    processor.__dict__.update(module.processor.__dict__)
    layers = {"to_q": lambda _: query, "to_k": lambda _: key, "to_v": lambda _: value}
    view = _with(module, {**layers, "norm_q": None, "norm_k": None, "processor": processor})
    return plain(view, *args, **{**kwargs, _ROTATION: None})


def _turned(module: Any, form: OpenedForm, qkv: Tensor, rotation: Tensor | None) -> Tensor:
    """Query, key and value as the kernel gives them; without rotations it has no norms, either."""
    if rotation is None:
        return qkv
    return norm_and_rotate(qkv, *attention_norms(module, form), rotation)


def _require_base(module: nn.Module, form: OpenedForm) -> type:
    base = plain_base(module, form)
    if base is None:
        whose = module if form is OpenedForm.ATTENTION else getattr(module, "processor", None)
        raise UnsupportedModelError(
            f"the code of a {class_name(whose)} changed while something ran beside its layers"
            "\nhint: take off what replaced it, or compose again"
        )
    return base


def _with(module: nn.Module, attributes: Mapping[str, object]) -> nn.Module:
    """The same module, of the same tensors, with some attributes of its own."""
    view: nn.Module = object.__new__(plain_class(type(module)))
    view.__dict__.update(module.__dict__)
    view.__dict__.update(attributes)
    return view


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _no_rotation(x: Tensor, channels: int) -> Tensor:
    """Rotations by nothing as ComfyUI has them, (B, S, 1, D/2, 2, 2): multiplied by ones."""
    matrices = torch.eye(2, dtype=torch.float32, device=x.device)
    return matrices.expand(*x.shape[:2], 1, channels // 2, 2, 2)
