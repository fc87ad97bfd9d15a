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
    does not touch either. So it does with 8-bit scales. Moves between devices move both, too.
    """

    _weight_name: ClassVar[str] = "qweight"
    """Attribute that holds the packed integers."""

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> QuantizedLeaf:
        before = {
            name: own.detach()
            for name, own in self.named_parameters(recurse=False)
            if name == self._weight_name or own.itemsize == 1
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, own in before.items():
            after: nn.Parameter = getattr(self, name)
            if after.dtype != own.dtype:
                after.data = own.to(after.device)
        return self


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """Wrap a tensor as a parameter that takes no gradient."""
    return nn.Parameter(tensor, requires_grad=False)
