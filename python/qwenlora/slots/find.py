"""The slots of the model at hand, found by structure.

Nunchaku is never imported, and the transformer's class is never looked at: two unrelated classes
share its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.errors import ModelStateError, QwenLoraError, UnsupportedModelError
from qwenlora.model.build import Builds
from qwenlora.model.families import outer_of
from qwenlora.model.forwards import require_understood
from qwenlora.model.fused_attention import fused_attention_of
from qwenlora.model.fused_mlp import fused_mlp_of
from qwenlora.model.hosts import is_sequentially_offloaded, require_lasting
from qwenlora.model.modules import is_wrapper, modules_of, pattern
from qwenlora.model.offload import offload_of
from qwenlora.model.target import Target, device_of, factors_of
from qwenlora.packing.layout import LowRankSide, RowOrder
from qwenlora.plan.documents import BlockBuild, SlotRow
from qwenlora.slots.kind import Found
from qwenlora.slots.kinds import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from qwenlora.model.offload import OffloadLayout
    from qwenlora.model.opened import Opened
    from qwenlora.slots.kind import LayerFacts, LayerKind

__all__ = ["find_targets"]


_TELLING = ("proj_down", "proj_up", "qweight", "wscales", "wzeros", "weight", "bias")
"""Tensors that tell what a layer is."""
_OF_FUSED = ("proj_down", "proj_up", "qweight", "weight", "bias")
"""Tensors of a layer whose names a fused module keeps behind the layer's own name."""
_FUSED = "_qweight"
_META = torch.device("meta")


def find_targets(
    model: nn.Module,
    base_ranks: Mapping[str, int],
    *,
    modules: Sequence[tuple[str, nn.Module]] | None = None,
    in_flight: bool = False,
) -> dict[str, Target]:
    """Find every layer that can carry a delta.

    Args:
        model: The transformer.
        base_ranks: Base rank of the slots that are composed now; the others' is their whole rank.
        modules: What `modules_of` gave for it, where that is at hand.
        in_flight: Whether slots were being written: the two factors of one may differ in rank.

    Returns:
        Targets by path, in module order.

    Raises:
        UnsupportedModelError: The model is no transformer with such layers, their forward is not
            understood, or it is offloaded in a way that is not known or undoes what is composed.
        ModelStateError: A packed layer's tensors contradict each other.
    """
    modules = modules_of(model) if modules is None else modules
    layout = offload_of(model, modules)
    require_lasting(modules)
    by_path = dict(modules)
    found = _found(modules, base_ranks, layout, by_path, in_flight)
    targets = {target.row.path: target for target in found}
    packed = [target for target in targets.values() if target.place is not None]
    _require_own_factors(packed)
    _require_the_transformer(packed)
    if not packed:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no SVDQuant layer"
            "\nhint: load a Qwen-Image or Z-Image transformer that Nunchaku or diffusers quantized;"
            " other models take LoRAs natively"
        )
    require_understood(targets, by_path)
    return targets


def _require_own_factors(packed: Sequence[Target]) -> None:
    """Two layers over one parameter could not differ: each would carry the other's deltas."""
    factors = {side: factors_of(packed, side) for side in LowRankSide}
    if len({id(factor) for own in factors.values() for factor in own}) == 2 * len(packed):
        return
    owners: dict[int, str] = {}
    for index, target in enumerate(packed):
        for side, own in factors.items():
            other = owners.setdefault(id(own[index]), target.path)
            if other != target.path and target.place is not None:
                name = target.place.name(side)
                raise UnsupportedModelError(f"`{target.path}` and `{other}` share one {name}")


def _require_the_transformer(packed: Sequence[Target]) -> None:
    """State belongs to the transformer: a module around it would have none."""
    for target in packed:
        outer = outer_of(target.path)
        if outer is not None:
            raise UnsupportedModelError(
                f"the transformer is inside this module, at `{outer}`: pass that"
            )


def _found(
    modules: Iterable[tuple[str, nn.Module]],
    base_ranks: Mapping[str, int],
    layout: OffloadLayout | None,
    by_path: Mapping[str, nn.Module],
    in_flight: bool,
) -> Iterator[Target]:
    """The slots among modules; raises as `find_targets` does."""
    kinds: dict[type[nn.Module], bool] = {}
    builds = Builds(by_path)
    for path, module in modules:
        kind = type(module)
        plain = kinds.get(kind)
        if plain is None:
            plain = kinds[kind] = _is_plain(kind)
        if not plain and is_wrapper(module):
            # It would answer with the tensors of what it wraps.
            continue
        tensors = _tensors(module) if plain else _asked_tensors(module)
        if not tensors:
            continue
        for own, name, prefix in _layers(path, tensors):
            found = Found(name, module, own, base_ranks.get(name), in_flight, prefix)
            known = _facts(found)
            if known is not None:
                offloaded = layout is not None and layout.holds(name)
                build = builds.of(name)
                opened = _opened(found, by_path) if known[0].place is not None else None
                yield _target(found, *known, build, offloaded=offloaded, opened=opened)


def _layers(
    path: str, tensors: Mapping[str, object]
) -> Iterable[tuple[Mapping[str, object], str, str]]:
    """The layers that a module may be: their tensors, paths, and what their names begin with.

    A module is one itself, or a fused one that holds the tensors of several, under names such as
    `qkv_proj_down` and `norm_q_weight`.
    """
    is_itself = "weight" in tensors or "qweight" in tensors
    if is_itself or not any(name.endswith(_FUSED) for name in tensors):
        return ((tensors, path, ""),)
    held: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        for own in _OF_FUSED:
            if name.endswith(f"_{own}"):
                held.setdefault(name.removesuffix(own), {})[own] = tensor
    return [(own, f"{path}.{prefix[:-1]}", prefix) for prefix, own in held.items()]


def _without_weights(path: str, module: nn.Module) -> QwenLoraError:
    if is_sequentially_offloaded(module):
        return UnsupportedModelError(
            f"the weights of `{path}` are held elsewhere between forwards, by sequential offload"
            "\nhint: compose before `enable_sequential_cpu_offload`, or use"
            " `enable_model_cpu_offload`"
        )
    return ModelStateError(f"`{path}` is on the meta device: load its weights first")


def _is_plain(kind: type[nn.Module]) -> bool:
    """Tell if modules of this class keep their tensors where `nn.Module` does."""
    return (
        kind.__getattr__ is torch.nn.Module.__getattr__
        and kind.__getattribute__ is object.__getattribute__
        and all(vars(base).keys().isdisjoint(_TELLING) for base in kind.__mro__)
    )


def _asked_tensors(module: nn.Module) -> Mapping[str, object]:
    return {name: getattr(module, name, None) for name in _TELLING}


def _tensors(module: nn.Module) -> Mapping[str, object]:
    """A layer's tensors by name, past `__getattr__`, which is slow for what is not there."""
    own, parameters, buffers = module.__dict__, module._parameters, module._buffers
    if not own.keys().isdisjoint(_TELLING):
        return {**buffers, **parameters, **own}
    return {**buffers, **parameters} if buffers else parameters


def _facts(found: Found) -> tuple[LayerKind, LayerFacts] | None:
    for kind in KINDS.values():
        facts = kind.facts(found) if kind.telling in found.tensors else None
        if facts is not None:
            return kind, facts
    return None


def _opened(found: Found, modules: Mapping[str, nn.Module]) -> Opened | None:
    """What runs a packed layer inside a kernel, and can run it by itself."""
    fused_mlp = fused_mlp_of(found.path, modules)
    return fused_mlp or fused_attention_of(found.path, found.module, found.prefix, modules)


def _target(
    found: Found,
    kind: LayerKind,
    facts: LayerFacts,
    build: BlockBuild,
    *,
    offloaded: bool,
    opened: Opened | None,
) -> Target:
    path, module = found.path, found.module
    place = None if kind.place is None else kind.place(found)
    owner = module if place is None else place.owner_of(module)
    device = device_of(owner)
    if device == _META:
        raise _without_weights(path, module)
    row = SlotRow(
        path,
        kind.kind.value,
        facts.in_features,
        facts.out_features,
        facts.base_rank,
        facts.dtype.itemsize,
        offloaded,
        pattern(path),
        found.has_tensors("bias"),
        build.value,
        # Where something else runs around its forward, it stays as it is.
        opens=opened is not None and "forward" not in opened.module.__dict__,
    )
    order = kind.row_order if build is BlockBuild.NUNCHAKU else RowOrder.PLANAR
    prefix = found.prefix
    return Target(module, kind.kind, facts.dtype, device, row, order, place, owner, prefix, opened)
