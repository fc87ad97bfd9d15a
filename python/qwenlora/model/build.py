"""The build of a model's blocks, told by their structure and their code.

A layer's tensors do not say who calls it, nor in which order its rows are taken. Those are facts of
the block around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.model.code import names_of_module
from qwenlora.model.qwen_image import BLOCKS, FUSED_ATTENTION, MLPS, QUERY
from qwenlora.plan.documents import BlockBuild

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["Builds", "build_of_block", "reorders"]


_REORDERING = frozenset(
    ("movedim", "permute", "rearrange", "swapaxes", "swapdims", "transpose", "unflatten", "view")
)
"""What code calls that takes the rows of a modulation in another order than they come."""
_OF_A_LAYER = frozenset(("forward_quant", "proj", "proj_down", "proj_up", "quantize", "qweight"))
"""What code names that computes a layer without calling it; `proj` is the layer inside an
activation."""


def build_of_block(block: str, modules: Mapping[str, nn.Module]) -> BlockBuild | None:
    """The build of a block by its attention; None where that does not tell.

    Args:
        block: Its path.
        modules: The model's modules by path.
    """
    is_nunchakus = f"{block}.{FUSED_ATTENTION}" in modules
    is_stock = f"{block}.{QUERY}" in modules
    if is_nunchakus is is_stock:
        return None
    return BlockBuild.STOCK if is_stock else BlockBuild.NUNCHAKU


def reorders(block: nn.Module) -> bool:
    """Tell if a block's code may take the rows of its modulations in another order.

    The code of its forward is looked at. Code that cannot be counts as reordering.
    """
    names = names_of_module(block)
    return names is None or not names.all.isdisjoint(_REORDERING)


class Builds:
    """The builds of a model's slots."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._blocks: dict[str, BlockBuild] = {}
        self._mlps: dict[str, BlockBuild] = {}

    def of(self, path: str) -> BlockBuild:
        """The build that a slot is part of.

        What does not tell counts as Nunchaku's, whose layers carry least. An order of rows that is
        not known is refused elsewhere.
        """
        if not path.startswith(f"{BLOCKS}."):
            return BlockBuild.NUNCHAKU
        blocks, number, name = path.split(".", 2)
        block = f"{blocks}.{number}"
        build = self._blocks.get(block)
        if build is None:
            build = build_of_block(block, self._modules) or BlockBuild.NUNCHAKU
            self._blocks[block] = build
        part = name.partition(".")[0]
        if build is BlockBuild.STOCK and part in MLPS:
            return self._build_of_mlp(f"{block}.{part}")
        return build

    def _build_of_mlp(self, path: str) -> BlockBuild:
        """A stock block's MLP may still have been replaced by one that fuses its layers."""
        build = self._mlps.get(path)
        if build is None:
            names = names_of_module(self._modules[path])
            is_called = names is not None and names.all.isdisjoint(_OF_A_LAYER)
            build = BlockBuild.STOCK if is_called else BlockBuild.NUNCHAKU
            self._mlps[path] = build
        return build
