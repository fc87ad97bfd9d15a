"""Checks of what must be known of a model before the picture can be promised.

A layer's tensors say where a delta goes. They do not say whether the forward reads it: some layers
take their rank from an attribute, some blocks take the rows of their modulation in another order,
some kernels compute a layer that no hook sees. What is not understood is refused by name.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

from qwenlora import _core
from qwenlora.errors import UnsupportedModelError
from qwenlora.model.build import build_of_block, reorders
from qwenlora.model.code import NamesRead, names_of_class, names_of_module
from qwenlora.model.modules import pattern
from qwenlora.model.qwen_image import BLOCKS, FUSED_ATTENTION, MODULATIONS, QUERY
from qwenlora.plan.documents import BlockBuild, SlotKind

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
        elif path.endswith(MODULATIONS):
            _require_order_of_rows(path, target, modules)


def unknown_layer(
    targets: Mapping[str, Target], modules: Iterable[tuple[str, nn.Module]]
) -> str | None:
    """The first quantized layer that is in no model's table; None where all are known.

    Args:
        targets: The model's slots by path.
        modules: All its modules by path.
    """
    known, modules = _known_patterns(), list(modules)
    paths = {path for path, _ in modules}
    for path, target in targets.items():
        if target.kind in QUANTIZED and not _is_known(path, target.row.pattern, known, paths):
            return path
    for path, module in modules:
        names = (*module._parameters, *module._buffers)
        if path not in targets and any(name.endswith(_FUSED_FACTORS) for name in names):
            return path
    return None


def _is_known(path: str, alike: str, known: Container[str], paths: Container[str]) -> bool:
    """Tell if a known model has the layer, in a block with two streams as that model's are."""
    if alike not in known:
        return False
    if not path.startswith(f"{BLOCKS}."):
        return True
    block = ".".join(path.split(".", 2)[:2])
    return all(f"{block}.{name}" in paths for name in MODULATIONS)


def _require_known_rank(path: str, module: nn.Module, place: LowRankPlace) -> None:
    """A forward that sizes buffers by another number would pass over ranks, or run past the end."""
    reads = ranks_read(module)
    if reads is None or reads.others or not reads.own <= {place.rank}:
        raise UnsupportedModelError(
            f"`{path}` is a {_name(module)} whose forward takes the rank from an attribute, or"
            " scales for each rank, and not as a known kind of layer does"
            "\nhint: load the model with Nunchaku's own loader, or with diffusers' quantizer"
        )


def _require_order_of_rows(path: str, target: Target, modules: Mapping[str, nn.Module]) -> None:
    """The order of a modulation's rows is a fact of its block, which its attention tells."""
    block = path.rsplit(".", 2)[0]
    build = build_of_block(block, modules)
    if target.kind is SlotKind.AWQ and build is None:
        raise UnsupportedModelError(
            f"the order in which `{block}` takes the rows of `{path}` is not known: it has neither"
            f" Nunchaku's `{FUSED_ATTENTION}` alone, nor diffusers' `{QUERY}` alone"
            "\nhint: load the model with Nunchaku's own loader, or with diffusers' quantizer"
        )
    if build is BlockBuild.STOCK and target.kind in QUANTIZED and reorders(modules[block]):
        raise UnsupportedModelError(
            f"the order in which `{block}` takes the rows of `{path}` is not known: it is a"
            f" {_name(modules[block])}, whose code may reorder them"
            "\nhint: load the model with diffusers' own classes"
        )
    if target.kind is SlotKind.LINEAR and build is BlockBuild.NUNCHAKU:
        raise UnsupportedModelError(
            f"`{path}` is a {_name(target.module)} in a block of Nunchaku's: the order in which the"
            " block takes the rows of one that is not quantized is not known"
            "\nhint: load a checkpoint whose modulation is quantized, as Nunchaku's are"
        )


def _name(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


@lru_cache(maxsize=1)
def _known_patterns() -> frozenset[str]:
    """Paths of the known models' slots, fused or in parts, block numbers replaced by `*`."""
    slots = json.loads(_core.known_slots())
    return frozenset(pattern(path) for slot in slots for path in (slot["path"], *slot["parts"]))


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
