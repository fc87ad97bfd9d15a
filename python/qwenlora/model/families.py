"""The families of models that are known. A new one is a new file and a row here."""

from __future__ import annotations

from qwenlora.model.family import Family
from qwenlora.model.qwen_image import QWEN_IMAGE
from qwenlora.model.z_image import Z_IMAGE

__all__ = ["FAMILIES", "family_of", "outer_of"]

FAMILIES: tuple[Family, ...] = (QWEN_IMAGE, Z_IMAGE)
"""All of them."""
_BY_LIST = {blocks: family for family in FAMILIES for blocks in family.lists}


def family_of(path: str) -> Family | None:
    """The family that has a block at the begin of this path; None for a path outside of blocks."""
    return _BY_LIST.get(path.partition(".")[0])


def outer_of(path: str) -> str | None:
    """The path of a module around the transformer, where a slot's path shows that there is one."""
    for blocks in _BY_LIST:
        outer, found, rest = path.partition(f".{blocks}.")
        if found and rest.partition(".")[0].isdigit():
            return outer
    return None
