"""Checks of what must be known of a model before the picture can be promised.

A layer's tensors say where a delta goes. They do not say whether the forward reads it: some layers
take their rank from an attribute, some blocks take the rows of their modulation in another order,
some kernels compute a layer that no hook sees. What is not understood is refused by name.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from qwenlora import _core
from qwenlora.errors import UnsupportedModelError
from qwenlora.model.code import NamesRead, class_name, names_of_class, names_of_module
from qwenlora.model.families import family_of
from qwenlora.plan.documents import SlotKind

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

    from torch import nn

    from qwenlora.model.target import LowRankPlace, Target

__all__ = ["RANK", "ranks_read", "require_understood", "unknown_layer"]


RANK = "rank"
"""Last word of an attribute that some layers size their low-rank activations by."""
_SCALES = "lora_scales"
"""Attribute that some layers hand to the kernels: scales of the ranks that they were made with."""
QUANTIZED = (SlotKind.SVDQ, SlotKind.AWQ)
"""Kinds of quantized layers."""
_FUSED_FACTORS = ("_proj_down", "_lora_down")
"""Endings of names of low-rank factors that a fused module keeps under a prefix."""


def require_understood(targets: Mapping[str, Target], modules: Mapping[str, nn.Module]) -> None:
    """Check that the forward reads what composing would change, in the order that is known.

    Args:
        targets: A model's slots by path.
        modules: All its modules by path.

    Raises:
        UnsupportedModelError: It does not, or that is unknown.
    """
    for path, target in targets.items():
        if target.place is not None:
            _require_known_rank(path, target.module, target.place)
        family = family_of(path)
        if family is not None:
            family.require_order(path, target, modules)


def unknown_layer(
    targets: Mapping[str, Target], modules: Iterable[tuple[str, nn.Module]]
) -> str | None:
    """The first quantized layer that is in no model's table; None where all are known.

    Args:
        targets: The model's slots by path.
        modules: All its modules by path.
    """
    for path, target in targets.items():
        if target.kind in QUANTIZED and not _is_known(path, target.row.pattern, targets):
            return path
    for path, module in modules:
        names = (*module._parameters, *module._buffers)
        held = {own for name in names for own in _FUSED_FACTORS if name.endswith(own)}
        for ending in held:
            prefixes = (name.removesuffix(ending) for name in names if name.endswith(ending))
            if any(f"{path}.{prefix}" not in targets for prefix in prefixes):
                return path
    return None


def _is_known(path: str, alike: str, slots: Container[str]) -> bool:
    """Tell if a known model has the layer, in a block with all that that model's have."""
    if not _is_of_a_model(alike):
        return False
    family = family_of(path)
    if family is None:
        return True
    blocks, number, _ = path.split(".", 2)
    return all(f"{blocks}.{number}.{name}" in slots for name in family.lists[blocks])


def _require_known_rank(path: str, module: nn.Module, place: LowRankPlace) -> None:
    """A forward that sizes buffers by another number would pass over ranks, or run past the end."""
    reads = ranks_read(module)
    if reads is None or reads.others or not reads.own <= {place.rank}:
        raise UnsupportedModelError(
            f"`{path}` is a {class_name(module)} whose forward takes the rank from an attribute, or"
            " scales for each rank, and not as a known kind of layer does"
            "\nhint: load the model with Nunchaku's own loader, or with diffusers' quantizer"
        )


@lru_cache(maxsize=512)
def _is_of_a_model(alike: str) -> bool:
    """Tell if a known model has a layer of this path, block numbers replaced by `*`."""
    return _core.layer_kinds(alike.replace("*", "0")) is not None


def ranks_read(module: nn.Module) -> NamesRead | None:
    """The attributes named as a rank that a layer's forward, or what it calls, looks up.

    Returns:
        Their names; None where some code cannot be looked at.
    """
    if "forward" in module.__dict__:
        return _ranks_among(names_of_module(module))
    kind: type = type(module)
    return _ranks_of_class(kind)


@lru_cache(maxsize=64)
def _ranks_of_class(kind: type) -> NamesRead | None:
    return _ranks_among(names_of_class(kind))


def _ranks_among(names: NamesRead | None) -> NamesRead | None:
    if names is None:
        return None
    return NamesRead(*(frozenset(filter(_is_rank, part)) for part in names))


def _is_rank(name: str) -> bool:
    """Tell if an attribute is named as a rank, as `lora_rank` is; `unpack_lowrank` is a function.

    Scales count, too: one for every 16 ranks, and what is missing of them is 0 to the kernels.
    """
    return name in (RANK, _SCALES) or name.endswith(f"_{RANK}")
