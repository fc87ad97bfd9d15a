"""Patches of ComfyUI's as the tensors of a LoRA file, and what cannot be one.

Each kind of adapter goes back under the names that its trainers write, so the engine reads what a
file with these tensors says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from qwenlora.errors import UnsupportedAdapterError, UnsupportedModelError

from .view import PREFIX

__all__ = ["MERGED", "Patches", "check", "tensors_of", "weight_name"]

Patches = Mapping[Any, Any]
"""Patches as the host hands them over, by a weight's name, or a tuple of it and a part of it."""

_FACTORS = {
    "lora": (
        *("lora_up.weight", "lora_down.weight", "alpha"),
        *("lora_mid.weight", "dora_scale", "reshape_weight"),
    ),
    "loha": (
        *("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b"),
        *("hada_t1", "hada_t2", "dora_scale"),
    ),
    "lokr": (
        *("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b"),
        *("lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale"),
    ),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha", "dora_scale"),
    "oft": ("oft_blocks", "rescale", "alpha", "dora_scale"),
    "boft": ("oft_blocks", "rescale", "alpha", "dora_scale"),
}
"""Endings in a file of what an adapter of the host's holds, in its order."""

_DIFF = "diff"
MERGED = (
    "a Nunchaku model's weights are quantized: models cannot be merged, subtracted or extracted"
    " with it; merge LoRAs instead"
)
"""What is said where nodes want the weights of a model."""


_PARTS = ("to_q", "to_k", "to_v")
_FUSED_LEAF = "qkv"


def weight_name(key: Any) -> str:
    """The name of the weight that a key of the host's patches is for."""
    return key if isinstance(key, str) else str(key[0])


def check(patches: Patches, strength_model: float) -> None:
    """See that patches can be applied.

    Raises:
        UnsupportedModelError: Models are being merged.
        UnsupportedAdapterError: A patch is of a kind that cannot be applied.
    """
    if strength_model != 1:
        raise UnsupportedModelError(MERGED)
    for key, value in patches.items():
        for _ in _tensors(key, value):
            pass


def tensors_of(patches: Patches) -> dict[str, torch.Tensor | float]:
    """The tensors of patches under the keys that a file has; alphas as numbers."""
    return {name: tensor for key in patches for name, tensor in _tensors(key, patches[key])}


def _tensors(key: Any, value: Any) -> Iterator[tuple[str, torch.Tensor | float]]:
    module, leaf = _module_of(key)
    endings = _FACTORS.get(getattr(value, "name", ""))
    if endings is not None:
        if leaf != "weight":
            raise _unsupported(key, "an adapter of a bias")
        yield from _factors(key, module, endings, value.weights)
        return
    if isinstance(value, list):
        raise UnsupportedModelError(MERGED)
    yield f"{module}.{'diff_b' if leaf == 'bias' else 'diff'}", _diff(key, value)


def _factors(
    key: Any, module: str, endings: Sequence[str], weights: Sequence[Any]
) -> Iterator[tuple[str, torch.Tensor | float]]:
    """What an adapter holds; later versions of the host may hold more, or less at the end."""
    if any(part is not None for part in weights[len(endings) :]):
        raise _unsupported(key, "an adapter of a form that is not known")
    for ending, part in zip(endings, weights, strict=False):
        if part is None:
            continue
        if ending == "reshape_weight":
            yield f"{module}.{ending}", torch.tensor([float(size) for size in part])
        else:
            yield f"{module}.{ending}", float(part) if ending == "alpha" else part


def _diff(key: Any, value: Any) -> torch.Tensor:
    """The tensor of a patch that is added as it is."""
    if not isinstance(value, tuple) or not value:
        raise _unsupported(key, f"a patch of type {type(value).__name__}")
    kind, parts = (_DIFF, value) if len(value) == 1 else value[:2]
    if kind == "model_as_lora":
        raise UnsupportedModelError(MERGED)
    if kind != _DIFF:
        raise _unsupported(key, f"a patch of kind {kind!r}")
    if len(parts) > 1 and parts[1].get("pad_weight"):
        raise _unsupported(key, "a weight of another size")
    if not isinstance(parts[0], torch.Tensor):
        raise _unsupported(key, "a patch without a tensor")
    return parts[0]


def _module_of(key: Any) -> tuple[str, str]:
    """The module that a key is for, and which of its parameters.

    Raises:
        UnsupportedAdapterError: It is for a part of a weight that is no module of the dense model.
    """
    name = weight_name(key)
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias") or not name.startswith(PREFIX):
        raise _unsupported(key, "a patch of a parameter that is neither weight nor bias")
    if isinstance(key, str):
        return module, leaf
    offset, function = (*key[1:], None, None)[:2]
    if function is not None:
        raise _unsupported(key, "a patch with a function of its own")
    if offset is None:
        return module, leaf
    parent, _, own = module.rpartition(".")
    axis, begin, length = offset
    third = begin // length if length else -1
    if own != _FUSED_LEAF or axis != 0 or begin % length or third not in range(len(_PARTS)):
        raise _unsupported(key, "a patch of a part of a weight")
    return f"{parent}.{_PARTS[third]}", leaf


def _unsupported(key: Any, what: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"`{weight_name(key)}`: {what} cannot be applied to a Nunchaku model"
    )
