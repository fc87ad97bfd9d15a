"""A part as it runs: its shape and the tensors of the layer that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.parts import PartShape

__all__ = ["Held", "at"]


class Held(NamedTuple):
    """One part of a branch.

    Attributes:
        shape: Its form, place and sizes.
        tensors: By the names that its shape gives them, where the layer's weights are.
    """

    shape: PartShape
    tensors: Mapping[str, Tensor]


def at(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor on the device of another: a host may keep weights in host memory."""
    return tensor if tensor.device == like.device else tensor.to(like.device, non_blocking=True)
