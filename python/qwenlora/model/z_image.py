"""Z-Image's blocks as Nunchaku, nunchaku-lite, diffusers and ComfyUI build them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.errors import UnsupportedModelError
from qwenlora.model.code import calls_its_layers, class_name
from qwenlora.model.family import Family, require_rows_as_they_come
from qwenlora.model.gated import GatedMlp, RowsOfGated, rows_of
from qwenlora.plan.documents import BlockBuild, SlotKind

if TYPE_CHECKING:
    from qwenlora.model.family import Modules
    from qwenlora.model.target import Target

__all__ = ["Z_IMAGE"]


_MODULATION = "adaLN_modulation.0"
_ATTENTION = "attention"
_PROCESSOR = "processor"
"""Attribute of an attention of diffusers' that computes it."""
_PROJECTIONS = ("to_q", "to_qkv", "qkv")
"""Names of a layer that projects, in the code of an attention that calls it."""
_FUSED_ATTENTION = "fused_module"
"""The module of Nunchaku's that projects, norms and rotates in one kernel."""
_FUSED_MLPS = (
    GatedMlp(fused="net.0.proj", down="net.2"),
    GatedMlp(fused="w13", down="w2"),
)
"""MLPs whose value and gate are one linear: of diffusers' `FeedForward`, and of ComfyUI's pack."""

_APART = ("w1", "w3")
"""Value and gate where they are linears of their own."""


def _build(block: str, part: str, modules: Modules) -> BlockBuild:
    """Every linear is called as a module, but for those of an attention that a kernel fuses."""
    if part != _ATTENTION:
        return BlockBuild.STOCK
    path = f"{block}.{_ATTENTION}"
    if f"{path}.{_FUSED_ATTENTION}" in modules:
        return BlockBuild.NUNCHAKU
    attention = modules[path]
    processor = getattr(attention, _PROCESSOR, None)
    code = [attention] if processor is None else [attention, processor]
    is_called = calls_its_layers(*code, layers=_PROJECTIONS)
    return BlockBuild.STOCK if is_called else BlockBuild.NUNCHAKU


def _require_order(path: str, target: Target, modules: Modules) -> None:
    """The rows of value and gate lie in an order that only the MLP's forward tells.

    An MLP that has them apart must call them, or nothing could run beside them.
    """
    block = path.removesuffix(f".{_MODULATION}")
    if block != path and target.kind is SlotKind.AWQ:
        require_rows_as_they_come(block, path, modules)
    outer, _, name = path.rpartition(".")
    is_apart = name in _APART and target.kind is SlotKind.SVDQ
    if is_apart and not calls_its_layers(modules[outer]):
        raise UnsupportedModelError(
            f"`{outer}` is a {class_name(modules[outer])} whose forward does not call its layers,"
            " as far as its code tells"
            "\nhint: load the model with diffusers' own classes"
        )
    for mlp in _FUSED_MLPS:
        outer = path.removesuffix(f".{mlp.fused}")
        if outer != path and rows_of(modules[outer], mlp) is not RowsOfGated.VALUE_FIRST:
            raise UnsupportedModelError(
                f"the order in which `{outer}` takes the rows of `{path}` is not known: it is a"
                f" {class_name(modules[outer])} whose forward does not call its layers, or not as"
                " diffusers' and ComfyUI's do"
                "\nhint: load the model with Nunchaku's own loader, or with diffusers' quantizer"
            )


Z_IMAGE = Family(
    lists={"layers": (_MODULATION,), "noise_refiner": (_MODULATION,), "context_refiner": ()},
    build=_build,
    require_order=_require_order,
)
