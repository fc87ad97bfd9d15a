"""The build of a model's blocks, told by their structure and their code.

A layer's tensors do not say who calls it, nor in which order its rows are taken. Those are facts of
the block around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.model.families import family_of
from qwenlora.plan.documents import BlockBuild

if TYPE_CHECKING:
    from qwenlora.model.family import Modules

__all__ = ["Builds"]


class Builds:
    """The builds of a model's slots."""

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        self._known: dict[tuple[str, str], BlockBuild] = {}

    def of(self, path: str) -> BlockBuild:
        """The build that a slot is of; Nunchaku's for one outside of known blocks."""
        family = family_of(path)
        parts = path.split(".", 3)
        if family is None or len(parts) < 3:
            return BlockBuild.NUNCHAKU
        block, part = f"{parts[0]}.{parts[1]}", parts[2]
        build = self._known.get((block, part))
        if build is None:
            build = self._known[block, part] = family.build(block, part, self._modules)
        return build
