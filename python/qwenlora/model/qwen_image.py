"""Qwen-Image's blocks as Nunchaku and diffusers build them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.errors import UnsupportedModelError
from qwenlora.model.code import calls_its_layers, class_name
from qwenlora.model.family import Family, require_rows_as_they_come
from qwenlora.plan.documents import BlockBuild, SlotKind

if TYPE_CHECKING:
    from qwenlora.model.family import Modules
    from qwenlora.model.target import Target

__all__ = ["QWEN_IMAGE"]


_BLOCKS = "transformer_blocks"
_MODULATIONS = ("img_mod.1", "txt_mod.1")
"""A block's modulation linears: one for each of its two streams."""
_MLPS = ("img_mlp", "txt_mlp")
"""A block's MLPs: one for each of its two streams."""
_FUSED_ATTENTION = "attn.to_qkv"
"""The linear of query, key and value in a block of Nunchaku's."""
_QUERY = "attn.to_q"
"""The linear of the query alone in a block of diffusers'."""
_QUANTIZED = (SlotKind.SVDQ, SlotKind.AWQ)


def _build(block: str, part: str, modules: Modules) -> BlockBuild:
    build = _build_of_block(block, modules) or BlockBuild.NUNCHAKU
    if build is BlockBuild.STOCK and part in _MLPS:
        # A stock block's MLP may still have been replaced by one that fuses its layers.
        is_called = calls_its_layers(modules[f"{block}.{part}"])
        return BlockBuild.STOCK if is_called else BlockBuild.NUNCHAKU
    return build


def _build_of_block(block: str, modules: Modules) -> BlockBuild | None:
    """The build of a block by its attention; None where that does not tell."""
    is_nunchakus = f"{block}.{_FUSED_ATTENTION}" in modules
    is_stock = f"{block}.{_QUERY}" in modules
    if is_nunchakus is is_stock:
        return None
    return BlockBuild.STOCK if is_stock else BlockBuild.NUNCHAKU


def _require_order(path: str, target: Target, modules: Modules) -> None:
    """The order of a modulation's rows is a fact of its block, which its attention tells."""
    if not path.endswith(_MODULATIONS):
        return
    block = path.rsplit(".", 2)[0]
    build = _build_of_block(block, modules)
    if target.kind is SlotKind.AWQ and build is None:
        raise UnsupportedModelError(
            f"the order in which `{block}` takes the rows of `{path}` is not known: it has neither"
            f" Nunchaku's `{_FUSED_ATTENTION}` alone, nor diffusers' `{_QUERY}` alone"
            "\nhint: load the model with Nunchaku's own loader, or with diffusers' quantizer"
        )
    if build is BlockBuild.STOCK and target.kind in _QUANTIZED:
        require_rows_as_they_come(block, path, modules)
    if target.kind is SlotKind.LINEAR and build is BlockBuild.NUNCHAKU:
        raise UnsupportedModelError(
            f"`{path}` is a {class_name(target.module)} in a block of Nunchaku's: the order in"
            " which the block takes the rows of one that is not quantized is not known"
            "\nhint: load a checkpoint whose modulation is quantized, as Nunchaku's are"
        )


QWEN_IMAGE = Family(lists={_BLOCKS: _MODULATIONS}, build=_build, require_order=_require_order)
