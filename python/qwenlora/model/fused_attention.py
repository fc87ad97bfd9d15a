"""Attentions of Z-Image whose query, key and value one kernel computes, norms and rotates.

What such a kernel computes is known. So the layer can be run by itself, and norms and rotation
behind it. The rest of the attention is the code of its own host: a class that runs the kernel
stands in for a base that calls its layers, and that base's code does all that comes after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenlora.model.code import arguments_of, names_in, names_in_forward
from qwenlora.model.opened import Opened, OpenedForm
from qwenlora.model.subclass import plain_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["attention_norms", "fused_attention_of", "plain_base", "projection_norms"]


_HEAD = 128
"""Channels of a head: the kernel has no others."""
_KERNEL = "fused_qkv_norm_rotary"
"""The function that computes all, in ComfyUI-nunchaku's code and nunchaku-lite's."""
_PROCESSOR = "processor"
"""Attribute of an attention of diffusers' that computes it."""
_FUSED_MODULE = "attention.fused_module"
_COMFYUI = "attention.qkv"
_DIFFUSERS = "attention.to_qkv"
_NORMS = {OpenedForm.ATTENTION: ("q_norm", "k_norm"), OpenedForm.PROCESSOR: ("norm_q", "norm_k")}
"""The norms of query and key in an attention."""
_METHODS = {OpenedForm.ATTENTION: "forward", OpenedForm.PROCESSOR: "__call__"}
"""The method that computes an attention."""
_CALLED = {
    OpenedForm.ATTENTION: frozenset(("qkv", "q_norm", "k_norm", "out")),
    OpenedForm.PROCESSOR: frozenset(("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out")),
}
"""What a method names that calls its layers."""
_ARGUMENTS = ("x", "x_mask", "freqs_cis")
"""Arguments of an attention of ComfyUI's, in order."""
_ROTATION = "freqs_cis"


def fused_attention_of(
    path: str, layer: nn.Module, prefix: str, modules: Mapping[str, nn.Module]
) -> Opened | None:
    """What computes a layer of query, key and value inside a kernel and can be opened, or None.

    Args:
        path: The layer's path.
        layer: The module that holds its tensors.
        prefix: What their names begin with there.
        modules: All modules of the model by path.
    """
    outer, _, name = path.rpartition(".")
    if outer.endswith(_FUSED_MODULE) and prefix:
        return Opened(layer, OpenedForm.PROJECTION, ("",)) if _is_projection(layer) else None
    attention = modules.get(outer)
    if attention is None:
        return None
    form = None
    if path.endswith(_COMFYUI):
        form = OpenedForm.ATTENTION
    elif path.endswith(_DIFFUSERS):
        form = OpenedForm.PROCESSOR
    if form is None or plain_base(attention, form) is None or not _norms_fit(attention, form):
        return None
    return Opened(attention, form, (name,))


def plain_base(attention: nn.Module, form: OpenedForm) -> type | None:
    """The first base class whose code calls its layers, where the class's own runs the kernel.

    Args:
        attention: An attention.
        form: Its form, which says whose class counts: its own, or its processor's.
    """
    whose = attention if form is OpenedForm.ATTENTION else getattr(attention, _PROCESSOR, None)
    kind, method = plain_class(type(whose)), _METHODS[form]
    defined = [(base, vars(base)[method]) for base in kind.__mro__ if method in vars(base)]
    if not defined or not _is_understood(defined[0][1], form, is_fused=True):
        return None
    others = (base for base, own in defined[1:] if _is_understood(own, form, is_fused=False))
    return next(others, None)


def _is_understood(called: object, form: OpenedForm, *, is_fused: bool) -> bool:
    """Tell if a method runs the kernel, or calls its layers, and takes what is expected."""
    names, arguments = names_in(called), arguments_of(called)
    fits = _KERNEL in names if is_fused else _KERNEL not in names and names >= _CALLED[form]
    if form is OpenedForm.PROCESSOR:
        return fits and _ROTATION in arguments
    return fits and arguments[1 : 1 + len(_ARGUMENTS)] == _ARGUMENTS


def attention_norms(attention: Any, form: OpenedForm) -> tuple[Tensor, Tensor]:
    """The weights of the norms of query and key, (128,) each."""
    query, key = (getattr(attention, name).weight for name in _NORMS[form])
    return query, key


def projection_norms(module: Any) -> tuple[Tensor, Tensor]:
    """The same of a module that holds the tensors of all."""
    return module.norm_q_weight, module.norm_k_weight


def _norms_fit(attention: nn.Module, form: OpenedForm) -> bool:
    norms = [getattr(attention, name, None) for name in _NORMS[form]]
    return all(_is_norm(getattr(norm, "weight", None)) for norm in norms)


def _is_projection(module: Any) -> bool:
    """Tell if it takes an activation and rotations, without which the kernel leaves norms out."""
    fits = all(
        _is_norm(module._parameters.get(name)) for name in ("norm_q_weight", "norm_k_weight")
    )
    arguments = arguments_of(plain_class(type(module)).forward)  # type: ignore[attr-defined]
    reads = names_in_forward(module) >= {"norm_q_weight", "norm_k_weight"}
    return fits and reads and arguments[1:] == ("x", _ROTATION)


def _is_norm(weight: Tensor | None) -> bool:
    return weight is not None and tuple(weight.shape) == (_HEAD,)
