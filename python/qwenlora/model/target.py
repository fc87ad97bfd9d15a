"""A layer of the model at hand that can carry a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora.packing.layout import RANK_MULTIPLE, LowRankSide
from qwenlora.plan.documents import SlotKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from qwenlora.model.opened import Opened
    from qwenlora.packing.layout import RowOrder
    from qwenlora.plan.documents import SlotRow

__all__ = ["PACKED_DTYPES", "LowRankPlace", "Target", "device_of", "factors_of"]


PACKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of a low-rank branch: the kernels' two, and the exact emulation's."""
HOST = torch.device("cpu")


class LowRankPlace(NamedTuple):
    """The place where a quantized layer keeps its low-rank branch.

    Attributes:
        down: Name of the packed `down`, (in, R).
        up: Name of the packed `up`, (out, R).
        owner: Path of the module that holds both, seen from the layer; "" is the layer itself.
        rank: Name of the owner's attribute by which its forward sizes buffers; None where the
            forward takes the rank from the tensors.
    """

    down: str
    up: str
    owner: str = ""
    rank: str | None = None

    def name(self, side: LowRankSide) -> str:
        """The name of one factor."""
        return self.down if side is LowRankSide.DOWN else self.up

    def owner_of(self, layer: nn.Module) -> nn.Module:
        """The module that holds both factors."""
        return layer.get_submodule(self.owner) if self.owner else layer


class Target(NamedTuple):
    """A slot of the model at hand.

    Attributes:
        module: The layer.
        kind: Its kind.
        dtype: The dtype in which it takes deltas.
        device: Its device when it was found.
        row: Its facts for planning.
        row_order: The order of its output rows.
        place: Where its packed low-rank branch lies; None where it has none.
        owner: The module that holds the packed branch; the layer itself where there is none.
        prefix: What the names of its stored values begin with in the module: "" for a layer that is
            a module of its own.
        opened: What runs it inside a kernel, and can run it by itself; None where it is called as
            a module, or nothing can.
    """

    module: nn.Module
    kind: SlotKind
    dtype: torch.dtype
    device: torch.device
    row: SlotRow
    row_order: RowOrder
    place: LowRankPlace | None
    owner: nn.Module
    prefix: str = ""
    opened: Opened | None = None

    @property
    def path(self) -> str:
        """The slot's path in the transformer."""
        return self.row.path

    def twin(self, module: nn.Module, path: str, *, opened: Opened | None = None) -> Target:
        """The same slot of another block; `opened` is what runs it inside a kernel there."""
        row = self.row._replace(path=path)
        owner = module if self.place is None else self.place.owner_of(module)
        return self._replace(
            module=module, device=device_of(owner), row=row, owner=owner, opened=opened
        )

    @property
    def module_path(self) -> str:
        """The path of its module, which a fused one's layer has a name behind."""
        return self.path.removesuffix(f".{self.prefix[:-1]}") if self.prefix else self.path

    @property
    def rank_multiple(self) -> int:
        """The step in which it takes ranks: whole fragments where packed, single ones beside it."""
        return 1 if self.place is None else RANK_MULTIPLE

    @property
    def only_values(self) -> bool:
        """True where stored values are all that it has: a norm's weight, an embedding's table."""
        return self.kind in (SlotKind.NORM, SlotKind.EMBEDDING)

    @property
    def rank_bytes(self) -> int:
        """Bytes that one rank takes in this slot."""
        return (self.row.in_features + self.row.out_features) * self.row.element_bytes

    @property
    def base_bytes(self) -> int:
        """Bytes of the base branch."""
        return self.row.base_rank * self.rank_bytes


def factors_of(targets: Iterable[Target], side: LowRankSide) -> list[Tensor]:
    """One factor of packed slots, past `__getattr__`, which is slow a thousand times."""
    found = []
    place, name = None, ""
    for target in targets:
        if target.place is not place:
            place = target.place
            name = "" if place is None else place.name(side)
        own = target.owner._parameters.get(name)
        found.append(getattr(target.owner, name) if own is None else own)
    return found


def device_of(module: nn.Module) -> torch.device:
    """The device that a layer's own tensors are on."""
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                return tensor.device
    return HOST
