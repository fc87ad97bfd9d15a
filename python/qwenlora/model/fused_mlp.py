"""MLPs that Nunchaku runs in one kernel: neither of their linears is called as a module.

What such an MLP computes is known, so it can be run as its two linears where something must run
beside one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.model.code import names_in_forward
from qwenlora.model.opened import Opened, OpenedForm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["LINEARS", "fused_mlp_of"]


LINEARS = ("net.0.proj", "net.2")
"""The first linear and the second, seen from the MLP."""
_ACTIVATION = "net.0"
"""The activation, which holds the first linear."""
_KERNEL = "fused_gelu_mlp"
"""The function of Nunchaku's that runs both, with GELU in its tanh approximation between them."""
_TANH = "tanh"


def fused_mlp_of(path: str, modules: Mapping[str, nn.Module]) -> Opened | None:
    """The fused MLP that a linear is in, or None.

    Its code must name the kernel, and the activation say that it is the one that the kernel has.

    Args:
        path: The linear's path.
        modules: All modules of the model by path.
    """
    for name in LINEARS:
        outer = path.removesuffix(f".{name}")
        module = None if outer == path else modules.get(outer)
        if module is None:
            continue
        held = [modules.get(f"{outer}.{own}") for own in (_ACTIVATION, *LINEARS)]
        is_tanh = getattr(held[0], "approximate", None) == _TANH
        if is_tanh and None not in held and _KERNEL in names_in_forward(module):
            return Opened(module, OpenedForm.MLP, LINEARS)
    return None
