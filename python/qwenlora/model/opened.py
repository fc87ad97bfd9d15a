"""Modules that run a layer inside a kernel, and can be run with the layer by itself."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from qwenlora.model.modules import submodule_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Opened", "OpenedForm"]


class OpenedForm(enum.Enum):
    """What such a module is, and so how it is run."""

    MLP = "mlp"
    """An MLP of two linears with GELU between them."""
    PROJECTION = "projection"
    """The layer itself, with norms and rotation behind it: Nunchaku's `fused_module`."""
    ATTENTION = "attention"
    """An attention of ComfyUI's, of a class whose base calls the layer."""
    PROCESSOR = "processor"
    """An attention of diffusers', of a processor whose class's base calls the layers."""


class Opened(NamedTuple):
    """A module that can be run with its layers by themselves.

    Attributes:
        module: The module.
        form: What it is.
        layers: Paths of the layers, seen from it; "" where it is the layer itself.
    """

    module: nn.Module
    form: OpenedForm
    layers: tuple[str, ...]

    def held(self) -> list[nn.Module]:
        """The layers."""
        return [submodule_of(self.module, name) if name else self.module for name in self.layers]

    def twin(self, block: nn.Module, path: str) -> Opened:
        """The same of another block, by the path of one of its layers in the block."""
        for name in self.layers:
            outer = path.removesuffix(f".{name}") if name else path
            if outer != path or not name:
                return self._replace(module=submodule_of(block, outer))
        raise ValueError(f"`{path}` ends in none of {', '.join(self.layers)}")
