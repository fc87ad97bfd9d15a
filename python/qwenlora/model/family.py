"""A family of models whose blocks are known: what tells one build of a block from another.

Sizes and all modules are Rust's (`rust/core/src/model`). A new model is a file beside
`model/z_image.py` and a row in `model/families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from qwenlora.errors import UnsupportedModelError
from qwenlora.model.code import class_name, names_of_module
from qwenlora.plan.documents import BlockBuild

if TYPE_CHECKING:
    from qwenlora.model.target import Target

__all__ = ["Family", "Modules", "require_rows_as_they_come"]

Modules: TypeAlias = Mapping[str, nn.Module]
"""A model's modules by path."""
_REORDERING = frozenset(
    ("movedim", "permute", "rearrange", "swapaxes", "swapdims", "transpose", "unflatten", "view")
)
"""What code calls that takes the rows of a modulation in another order than they come."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        lists: Paths of the lists of its blocks, each with the slots that all of those blocks have,
            however they are built. A block that lacks one is another model's.
        build: The build that the slots of one part of a block are of. Takes the block's path, the
            part's name in it, and the model's modules. What does not tell counts as Nunchaku's,
            whose layers carry least.
        require_order: Checks that the order in which a block takes a slot's rows is the known one.
            Takes the slot's path, the slot, and the model's modules. Raises `UnsupportedModelError`
            where it is not, or is not known.
    """

    lists: Mapping[str, tuple[str, ...]]
    build: Callable[[str, str, Modules], BlockBuild]
    require_order: Callable[[str, Target, Modules], None]


def require_rows_as_they_come(block: str, path: str, modules: Modules) -> None:
    """Check that a block takes the rows of a modulation in the order in which they come.

    The code of its forward is looked at. Code that cannot be counts as reordering.

    Raises:
        UnsupportedModelError: It may take them in another order.
    """
    names = names_of_module(modules[block])
    if names is None or not names.all.isdisjoint(_REORDERING):
        raise UnsupportedModelError(
            f"the order in which `{block}` takes the rows of `{path}` is not known: it is a"
            f" {class_name(modules[block])}, whose code may reorder them"
            "\nhint: load the model with diffusers' own classes"
        )
