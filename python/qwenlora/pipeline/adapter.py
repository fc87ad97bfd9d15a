"""One LoRA under the name that a pipeline knows it by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenlora.pipeline.weight import ONE

if TYPE_CHECKING:
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
        weight: The strength that it gets while it is active; it keeps that while it is not.
    """

    name: str
    spec: LoraSpec
    source: LoraSource
    report: LoraReport
    weight: Weight = ONE

    def weighted(self) -> LoraSpec:
        """The spec with the weight."""
        return replace(self.spec, strength=self.weight.strength)
