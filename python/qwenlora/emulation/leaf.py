"""The common base of the quantized stand-in layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


class QuantizedLeaf(nn.Module):
    """A layer whose `qweight` is packed integers, or a float32 matrix in `EXACT` precision.

    A cast of the module leaves that float32 matrix unchanged: it stands for integers, which a cast
    does not touch either. Moves between devices move it, too.
    """

    _weight_name: ClassVar[str] = "qweight"
    """Attribute that holds the packed integers."""

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> QuantizedLeaf:
        before: torch.Tensor = getattr(self, self._weight_name).detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after: nn.Parameter = getattr(self, self._weight_name)
        if before.is_floating_point() and after.dtype != before.dtype:
            after.data = before.to(after.device)
        return self


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """Wrap a tensor as a parameter that takes no gradient."""
    return nn.Parameter(tensor, requires_grad=False)
