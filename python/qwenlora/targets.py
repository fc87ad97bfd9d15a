"""The slots of the model at hand, found by structure.

Nunchaku is never imported, and the transformer's class is never looked at: two unrelated classes
share its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qwenlora.errors import ModelStateError, UnsupportedModelError
from qwenlora.layout import RANK_MULTIPLE, TILE
from qwenlora.offload import offload_of
from qwenlora.plan import SlotKind

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "FACTORS",
    "SlotRow",
    "Target",
    "device_of",
    "factors_of",
    "find_targets",
    "pattern",
    "transformer_of",
]

FACTORS = ("proj_down", "proj_up")
"""The factors of a packed slot's low-rank branch."""
PACKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of a low-rank branch: the kernels' two, and the exact emulation's."""


@dataclass(frozen=True)
class SlotRow:
    """What planning needs to know of a slot; JSON-able."""

    path: str
    kind: str
    in_features: int
    out_features: int
    base_rank: int
    element_bytes: int
    offloaded: bool
    pattern: str
    has_bias: bool


@dataclass(frozen=True)
class Target:
    """A slot of the model at hand; `device` is where it was when it was found."""

    module: nn.Module
    kind: SlotKind
    dtype: torch.dtype
    device: torch.device
    row: SlotRow

    @property
    def path(self) -> str:
        """The slot's path in the transformer."""
        return self.row.path

    def twin(self, module: nn.Module, path: str) -> Target:
        """The same slot of another block."""
        row = replace(self.row, path=path)
        return replace(self, module=module, device=device_of(module), row=row)

    @property
    def rank_bytes(self) -> int:
        """Bytes that one rank takes in this slot."""
        return (self.row.in_features + self.row.out_features) * self.row.element_bytes

    @property
    def base_bytes(self) -> int:
        """Bytes of the base branch."""
        return self.row.base_rank * self.rank_bytes


def factors_of(modules: Iterable[nn.Module], name: str) -> list[Tensor]:
    """One of `FACTORS` of packed layers, past `__getattr__`, which is slow a thousand times."""
    found = [(module, module._parameters.get(name)) for module in modules]
    return [getattr(module, name) if own is None else own for module, own in found]


def device_of(module: nn.Module) -> torch.device:
    """The device that a layer's own tensors are on."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        return tensor.device
    return torch.device("cpu")


def pattern(path: str) -> str:
    """The path with its block's number replaced by `*`."""
    segments = path.split(".")
    block = next((i for i, segment in enumerate(segments) if segment.isdigit()), None)
    if block is not None:
        segments[block] = "*"
    return ".".join(segments)


def find_targets(model: nn.Module, base_ranks: Mapping[str, int]) -> dict[str, Target]:
    """Find every layer that can carry a delta.

    Args:
        model: The transformer.
        base_ranks: Base rank of the slots that are composed now; the others' is their whole rank.

    Returns:
        Targets by path, in module order.

    Raises:
        UnsupportedModelError: The model is no transformer with such layers, or it is offloaded in
            a way that is not known.
        ModelStateError: A packed layer's tensors contradict each other.
    """
    layout = offload_of(model)
    targets: dict[str, Target] = {}
    for path, module in model.named_modules():
        target = _target(path, module, base_ranks.get(path))
        if target is not None:
            if layout is not None and layout.holds(path):
                target = replace(target, row=replace(target.row, offloaded=True))
            targets[path] = target
    packed = [target for target in targets.values() if target.kind is SlotKind.SVDQ]
    _require_own_factors(packed)
    _require_the_transformer(packed)
    if not packed:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Nunchaku SVDQuant layer"
            "\nhint: load a Nunchaku Qwen-Image transformer; other models take LoRAs natively"
        )
    return targets


def transformer_of(model: object) -> nn.Module:
    """The transformer itself: what `torch.compile` wrapped, or the module given.

    Raises:
        UnsupportedModelError: It is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(
            f"expected a transformer module, got {type(model).__name__}"
            "\nhint: with a diffusers pipeline, pass `pipeline.transformer`"
        )
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, torch.nn.Module) else model


def _require_own_factors(packed: list[Target]) -> None:
    """Two layers over one parameter could not differ: each would carry the other's deltas."""
    owners: dict[int, str] = {}
    for target in packed:
        for name in ("proj_down", "proj_up"):
            other = owners.setdefault(id(getattr(target.module, name)), target.path)
            if other != target.path:
                raise UnsupportedModelError(f"`{target.path}` and `{other}` share one {name}")


def _require_the_transformer(packed: list[Target]) -> None:
    """State belongs to the transformer: a module around it would have none."""
    for target in packed:
        outer, found, _ = target.path.partition("transformer_blocks.")
        if found and outer:
            raise UnsupportedModelError(
                f"the transformer is inside this module, at `{outer.rstrip('.')}`: pass that"
            )


def _target(path: str, module: nn.Module, base_rank: int | None) -> Target | None:
    if _has_tensors(module, "proj_down", "proj_up", "qweight"):
        return _svdq(path, module, base_rank)
    if _has_tensors(module, "qweight", "wscales", "wzeros"):
        return _awq(path, module)
    if isinstance(module, torch.nn.Linear):
        weight = module.weight
        # A weight stored below 16 bits is cast by its owner; the branch then runs in bfloat16.
        dtype = weight.dtype if weight.dtype in PACKED_DTYPES else torch.bfloat16
        sizes = (module.in_features, module.out_features)
        return _make(path, module, SlotKind.LINEAR, dtype, sizes, 0)
    return _table(path, module)


def _table(path: str, module: nn.Module) -> Target | None:
    """A layer of which only stored values change: a norm with a weight, or an embedding."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in PACKED_DTYPES:
        return None
    if isinstance(module, torch.nn.Embedding):
        sizes = (weight.shape[0], weight.shape[1])
        return _make(path, module, SlotKind.EMBEDDING, weight.dtype, sizes, 0)
    if weight.ndim == 1:
        return _make(path, module, SlotKind.NORM, weight.dtype, (1, weight.shape[0]), 0)
    return None


def _has_tensors(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in names)


def _svdq(path: str, module: Any, base_rank: int | None) -> Target:
    down: Tensor = module.proj_down
    up: Tensor = module.proj_up
    for name, tensor in (("proj_down", down), ("proj_up", up)):
        _require_packed(f"{path}.{name}", tensor)
    if down.shape[1] != up.shape[1] or down.dtype != up.dtype or down.device != up.device:
        raise ModelStateError(
            f"`{path}`: proj_down is {_show(down)} and proj_up {_show(up)}\nhint: reload the model"
        )
    rank = down.shape[1] if base_rank is None else base_rank
    if not 0 < rank <= down.shape[1]:
        raise ModelStateError(
            f"`{path}` has rank {down.shape[1]}, less than the {rank} of its base: something else"
            " changed it\nhint: reload the model"
        )
    return _make(path, module, SlotKind.SVDQ, down.dtype, (down.shape[0], up.shape[0]), rank)


def _require_packed(name: str, tensor: Tensor) -> None:
    """Check what the kernels assume and do not check: they would abort or return garbage."""
    fits = (
        tensor.ndim == 2
        and tensor.shape[0] % TILE == 0
        and tensor.shape[1] % RANK_MULTIPLE == 0
        and tensor.shape[1] > 0
        and tensor.dtype in PACKED_DTYPES
        and tensor.is_contiguous()
        and not tensor.is_meta
    )
    if not fits:
        raise ModelStateError(
            f"`{name}` is {_show(tensor)}: expected a contiguous (channels, rank) of multiples of"
            f" {TILE} in float16 or bfloat16"
        )


def _awq(path: str, module: Any) -> Target:
    scales: Tensor = module.wscales
    dtype = scales.dtype if scales.dtype in PACKED_DTYPES else torch.bfloat16
    sizes = (int(module.in_features), int(module.out_features))
    return _make(path, module, SlotKind.AWQ, dtype, sizes, 0)


def _make(
    path: str,
    module: nn.Module,
    kind: SlotKind,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    base_rank: int,
) -> Target:
    row = SlotRow(
        path=path,
        kind=kind.value,
        in_features=sizes[0],
        out_features=sizes[1],
        base_rank=base_rank,
        element_bytes=dtype.itemsize,
        offloaded=False,
        pattern=pattern(path),
        has_bias=isinstance(getattr(module, "bias", None), torch.Tensor),
    )
    target = Target(module=module, kind=kind, dtype=dtype, device=device_of(module), row=row)
    if target.device.type == "meta":
        raise ModelStateError(f"`{path}` is on the meta device: load its weights first")
    return target


def _show(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
