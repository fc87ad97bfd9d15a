"""The stored values of a layer's base, also while its parameters point elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["BASE_VALUES", "base_value"]

BASE_VALUES = "_qwenlora_base"
"""Attribute of a layer that keeps the base's tensors whose parameters point elsewhere, by name."""


def base_value(module: nn.Module, name: str) -> Tensor | None:
    """The base's tensor of this name: what is kept, else what the layer has; None for none."""
    kept: Mapping[str, Tensor] = module.__dict__.get(BASE_VALUES, {})
    return kept[name] if name in kept else cast("Tensor | None", getattr(module, name, None))
