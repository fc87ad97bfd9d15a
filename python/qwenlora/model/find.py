"""The slots of the model at hand, found by structure.

Nunchaku is never imported, and the transformer's class is never looked at: two unrelated classes
share its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.errors import ModelStateError, UnsupportedModelError
from qwenlora.model.forwards import require_understood
from qwenlora.model.modules import inner_of, is_wrapper, modules_of, pattern
from qwenlora.model.offload import offload_of
from qwenlora.model.target import FACTORS, PACKED_DTYPES, Target, device_of, factors_of
from qwenlora.packing.layout import RANK_MULTIPLE, TILE
from qwenlora.plan.documents import SlotKind, SlotRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from torch import Tensor, nn

    from qwenlora.model.offload import OffloadLayout

__all__ = ["find_targets", "transformer_of"]


_TELLING = (*FACTORS, "qweight", "wscales", "wzeros", "weight", "bias")
"""Tensors that tell what a layer is."""
_META = torch.device("meta")
_Facts = tuple[SlotKind, torch.dtype, int, int, int]
"""Kind, dtype, inputs, outputs and base rank of a slot."""


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
            understood, or it is offloaded in a way that is not known.
        ModelStateError: A packed layer's tensors contradict each other.
    """
    modules = modules_of(model) if modules is None else modules
    layout = offload_of(model, modules)
    targets = {target.row.path: target for target in _found(modules, base_ranks, layout, in_flight)}
    svdq = SlotKind.SVDQ
    packed = [target for target in targets.values() if target.kind is svdq]
    _require_own_factors(packed)
    _require_the_transformer(packed)
    if not packed:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Nunchaku SVDQuant layer"
            "\nhint: load a Nunchaku Qwen-Image transformer; other models take LoRAs natively"
        )
    require_understood(targets, {path for path, _ in modules})
    return targets


def transformer_of(model: object) -> nn.Module:
    """The transformer itself: what `torch.compile` or another wrapped, or the module given.

    Raises:
        UnsupportedModelError: It is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(
            f"expected a transformer module, got {type(model).__name__}"
            "\nhint: with a diffusers pipeline, pass `pipeline.transformer`"
        )
    return inner_of(model)


def _require_own_factors(packed: Sequence[Target]) -> None:
    """Two layers over one parameter could not differ: each would carry the other's deltas."""
    modules = [target.module for target in packed]
    factors = {name: factors_of(modules, name) for name in FACTORS}
    if len({id(factor) for own in factors.values() for factor in own}) == 2 * len(packed):
        return
    owners: dict[int, str] = {}
    for index, target in enumerate(packed):
        for name, own in factors.items():
            other = owners.setdefault(id(own[index]), target.path)
            if other != target.path:
                raise UnsupportedModelError(f"`{target.path}` and `{other}` share one {name}")


def _require_the_transformer(packed: Sequence[Target]) -> None:
    """State belongs to the transformer: a module around it would have none."""
    for target in packed:
        outer, found, _ = target.path.partition(".transformer_blocks.")
        if found:
            raise UnsupportedModelError(
                f"the transformer is inside this module, at `{outer}`: pass that"
            )


def _found(
    modules: Iterable[tuple[str, nn.Module]],
    base_ranks: Mapping[str, int],
    layout: OffloadLayout | None,
    in_flight: bool,
) -> Iterator[Target]:
    """The slots among modules; raises as `find_targets` does."""
    kinds: dict[type[nn.Module], bool] = {}
    for path, module in modules:
        kind = type(module)
        plain = kinds.get(kind)
        if plain is None:
            plain = kinds[kind] = _is_plain(kind)
        if not plain and is_wrapper(module):
            # It would answer with the tensors of what it wraps.
            continue
        tensors = _tensors(module) if plain else _asked_tensors(module)
        facts = _facts(path, module, tensors, base_ranks, in_flight) if tensors else None
        if facts is not None:
            offloaded = layout is not None and layout.holds(path)
            yield _target(path, module, facts, tensors, offloaded)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether modules of this class keep their tensors where `nn.Module` does."""
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


def _facts(
    path: str,
    module: nn.Module,
    tensors: Mapping[str, object],
    base_ranks: Mapping[str, int],
    in_flight: bool,
) -> _Facts | None:
    if "qweight" in tensors:
        if _has_tensors(tensors, "proj_down", "proj_up", "qweight"):
            return _svdq(path, tensors, base_ranks.get(path), in_flight)
        if _has_tensors(tensors, "qweight", "wscales", "wzeros"):
            return _awq(module, tensors)
    if isinstance(module, torch.nn.Linear):
        return _linear(module)
    return _table(module, tensors)


def _target(
    path: str, module: nn.Module, facts: _Facts, tensors: Mapping[str, object], offloaded: bool
) -> Target:
    kind, dtype, inputs, outputs, base_rank = facts
    device = device_of(module)
    if device == _META:
        raise ModelStateError(f"`{path}` is on the meta device: load its weights first")
    biased = isinstance(tensors.get("bias"), torch.Tensor)
    name, size, alike = kind.value, dtype.itemsize, pattern(path)
    row = SlotRow(path, name, inputs, outputs, base_rank, size, offloaded, alike, biased)
    return Target(module, kind, dtype, device, row)


def _has_tensors(tensors: Mapping[str, object], *names: str) -> bool:
    for name in names:
        if not isinstance(tensors.get(name), torch.Tensor):
            return False
    return True


def _linear(module: nn.Linear) -> _Facts:
    # A weight stored below 16 bits is cast by its owner; the branch then runs in bfloat16.
    stored = module.weight.dtype
    dtype = stored if stored in PACKED_DTYPES else torch.bfloat16
    return SlotKind.LINEAR, dtype, module.in_features, module.out_features, 0


def _table(module: nn.Module, tensors: Mapping[str, object]) -> _Facts | None:
    """A layer of which only stored values change: a norm with a weight, or an embedding."""
    weight = tensors.get("weight")
    if not isinstance(weight, torch.Tensor) or weight.dtype not in PACKED_DTYPES:
        return None
    if isinstance(module, torch.nn.Embedding):
        return SlotKind.EMBEDDING, weight.dtype, weight.shape[0], weight.shape[1], 0
    if weight.ndim == 1:
        return SlotKind.NORM, weight.dtype, 1, weight.shape[0], 0
    return None


def _svdq(path: str, tensors: Mapping[str, Any], base_rank: int | None, in_flight: bool) -> _Facts:
    down: Tensor = tensors["proj_down"]
    up: Tensor = tensors["proj_up"]
    inputs, ranks = _packed_shape(path, "proj_down", down)
    outputs, up_ranks = _packed_shape(path, "proj_up", up)
    is_alike = ranks == up_ranks or in_flight
    ranks = min(ranks, up_ranks)
    if not is_alike or down.dtype != up.dtype or down.device != up.device:
        raise ModelStateError(
            f"`{path}`: proj_down is {_show(down)} and proj_up {_show(up)}\nhint: reload the model"
        )
    rank = ranks if base_rank is None else base_rank
    if not 0 < rank <= ranks:
        raise ModelStateError(
            f"`{path}` has rank {ranks}, less than the {rank} of its base: something else"
            " changed it\nhint: reload the model"
        )
    return SlotKind.SVDQ, down.dtype, inputs, outputs, rank


def _packed_shape(path: str, name: str, tensor: Tensor) -> Sequence[int]:
    """(channels, rank), checked: the kernels assume it, and would abort or return garbage."""
    shape = tensor.shape
    fits = (
        len(shape) == 2
        and shape[0] % TILE == 0
        and shape[1] % RANK_MULTIPLE == 0
        and shape[1] > 0
        and tensor.dtype in PACKED_DTYPES
        and tensor.is_contiguous()
        and not tensor.is_meta
    )
    if not fits:
        raise ModelStateError(
            f"`{path}.{name}` is {_show(tensor)}: expected a contiguous (channels, rank) of"
            f" multiples of {TILE} in float16 or bfloat16"
        )
    return shape


def _awq(module: Any, tensors: Mapping[str, Any]) -> _Facts:
    scales: Tensor = tensors["wscales"]
    dtype = scales.dtype if scales.dtype in PACKED_DTYPES else torch.bfloat16
    return SlotKind.AWQ, dtype, int(module.in_features), int(module.out_features), 0


def _show(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
