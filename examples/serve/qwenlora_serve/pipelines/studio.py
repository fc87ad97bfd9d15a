"""A pipeline, and what it is called with."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffusers import QwenImagePipeline
    from torch import nn

    from ..order import Order

__all__ = ["Studio"]


@dataclass(frozen=True)
class Studio:
    """A pipeline that is ready to paint.

    Attributes:
        pipeline: diffusers' pipeline.
        inputs: Gives the arguments of its call that say what is painted.
        side: Width and height of its pictures.
    """

    pipeline: QwenImagePipeline
    inputs: Callable[[Order], Mapping[str, Any]]
    side: int

    @property
    def transformer(self) -> nn.Module:
        """The model that LoRAs are composed into."""
        transformer: nn.Module = self.pipeline.transformer
        return transformer

    def paint(self, order: Order) -> bytes:
        """Paint; gives the bytes of a PNG file. Not from two threads at a time."""
        # On the CPU, so that a seed gives the same noise on every device.
        generator = torch.Generator().manual_seed(order.seed)
        image = self.pipeline(
            **self.inputs(order),
            num_inference_steps=order.steps,
            width=self.side,
            height=self.side,
            generator=generator,
        ).images[0]
        file = io.BytesIO()
        image.save(file, format="png")
        return file.getvalue()
