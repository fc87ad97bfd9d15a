"""A layer of the model at hand that can carry a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora.packing.layout import RowOrder
from qwenlora.plan.documents import SlotKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from qwenlora.plan.documents import SlotRow

__all__ = ["FACTORS", "PACKED_DTYPES", "Target", "device_of", "factors_of", "row_order_of"]


FACTORS = ("proj_down", "proj_up")
"""The factors of a packed slot's low-rank branch."""
PACKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of a low-rank branch: the kernels' two, and the exact emulation's."""
HOST = torch.device("cpu")


class Target(NamedTuple):
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
        row = self.row._replace(path=path)
        return self._replace(module=module, device=device_of(module), row=row)

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
    return [
        getattr(module, name) if (own := module._parameters.get(name)) is None else own
        for module in modules
    ]


def device_of(module: nn.Module) -> torch.device:
    """The device that a layer's own tensors are on."""
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                return tensor.device
    return HOST


def row_order_of(kind: SlotKind) -> RowOrder:
    """The order of a layer's output rows: AWQ layers that can be planned are modulations."""
    return RowOrder.INTERLEAVED if kind is SlotKind.AWQ else RowOrder.PLANAR
