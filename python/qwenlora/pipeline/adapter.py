"""One LoRA under the name that a pipeline knows it by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qwenlora.blocks import ALL_ONES
from qwenlora.pipeline.by_name import parts_of
from qwenlora.pipeline.weight import ONE

if TYPE_CHECKING:
    from qwenlora.pipeline.by_name import Part
    from qwenlora.pipeline.weight import Weight
    from qwenlora.report import LoraReport
    from qwenlora.source.source import LoraSource
    from qwenlora.spec import LoraSpec

__all__ = ["Adapter"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded LoRA. Its file is planned, and read when it is composed.

    Attributes:
        name: Its name, which reports use, too.
        spec: Its source, at strength 1.
        source: Its plan and tensors.
        report: What of it fits the transformer, and what is left out, by its plan.
        targets: The modules that it changes.
        weight: The strength that it gets while it is active; it keeps that while it is not.
        weighted: What is composed while it is active. Several specs share the layers among them,
            where a weight by layers' names is no product of factors by block and kind.

    Raises:
        AdapterWeightError: Layers that no factors tell apart would get different weights.
    """

    name: str
    spec: LoraSpec
    source: LoraSource
    report: LoraReport
    targets: frozenset[str]
    weight: Weight = ONE
    weighted: tuple[LoraSpec, ...] = field(init=False)

    def __post_init__(self) -> None:
        weight = self.weight
        parts: list[Part] = [(weight.strength, ALL_ONES)]
        if weight.by_name:
            parts = parts_of(self.name, weight.by_name, sorted(self.targets))
        weighted = (replace(self.spec, strength=own, blocks=blocks) for own, blocks in parts)
        present = tuple(spec for spec in weighted if spec.strength != 0)
        object.__setattr__(self, "weighted", present)
