"""The transformer itself, whatever was put around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.errors import UnsupportedModelError
from qwenlora.model.modules import inner_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["transformer_of"]


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
