"""A kind of layer that can carry deltas: how it is found, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn

    from qwenlora.model.target import LowRankPlace, Target
    from qwenlora.packing.layout import RowOrder
    from qwenlora.plan.documents import SlotKind
    from qwenlora.slots.slot import Slot

__all__ = ["Found", "LayerFacts", "LayerKind"]


class Found(NamedTuple):
    """A module that may be a layer.

    Attributes:
        path: Its path in the transformer.
        module: The module.
        tensors: Its own parameters and buffers by name.
        base_rank: The rank of its base where it is composed; None where its whole rank is that.
        in_flight: Whether slots were being written: two factors of one may differ in rank.
        prefix: What the names of the layer's tensors begin with in the module: "" where the module
            is the layer. `tensors` has their names without it.
    """

    path: str
    module: nn.Module
    tensors: Mapping[str, object]
    base_rank: int | None
    in_flight: bool
    prefix: str = ""

    def has_tensors(self, *names: str) -> bool:
        """Tell if it has tensors of all these names."""
        return all(hasattr(self.tensors.get(name), "dtype") for name in names)


class LayerFacts(NamedTuple):
    """The sizes of a layer.

    Attributes:
        dtype: The dtype in which it takes deltas.
        in_features: Columns of a delta.
        out_features: Rows of a delta.
        base_rank: The rank of its own low-rank branch; 0 where it has none.
    """

    dtype: torch.dtype
    in_features: int
    out_features: int
    base_rank: int = 0


@dataclass(frozen=True)
class LayerKind:
    """One row of the table of kinds.

    Attributes:
        kind: Its name in plans and reports.
        telling: A tensor that every such layer has.
        facts: The sizes of a module that is such a layer; None where it is none. Raises
            `ModelStateError` where its tensors contradict each other.
        parts: The parts of such a layer that deltas may change, each a separate slot.
        row_order: The order of its output rows in a block of Nunchaku's; in others it is planar.
        place: Where such a module has its packed low-rank branch; None where none has any.
    """

    kind: SlotKind
    telling: str
    facts: Callable[[Found], LayerFacts | None]
    parts: Callable[[Target], Sequence[Slot]]
    row_order: RowOrder
    place: Callable[[Found], LowRankPlace] | None = None
