"""Presets of strength by block: what the nodes offer by name, as factors of a model's blocks.

Layers outside of the numbered blocks stay as they are, except in "attention only".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qwenlora import BlockFactors

__all__ = ["ALL", "CUSTOM", "PRESETS", "Preset"]

ALL = "all"
CUSTOM = "custom"
"""The name of factors that are written out."""


@dataclass(frozen=True)
class Preset:
    """Factors by a block's place in the model, and by kind of layer.

    Attributes:
        parts: The blocks in parts of one size, first to last, each with its factor.
        kinds: Factors by kind, as in `qwenlora.blocks.KINDS`.
    """

    parts: tuple[float, ...] = (1.0,)
    kinds: Mapping[str, float] = field(default_factory=dict)

    def factors(self, block_count: int) -> BlockFactors:
        """The factors for a model of so many numbered blocks."""
        count = len(self.parts)
        blocks = {at: self.parts[at * count // block_count] for at in range(block_count)}
        return BlockFactors.build(blocks=blocks, kinds=self.kinds)


PRESETS: Mapping[str, Preset] = {
    ALL: Preset(),
    "attention only": Preset(kinds={"mlp": 0, "mod": 0, "rest": 0}),
    # Blocks near the input decide what is where, those near the output how it looks: a rule of
    # thumb, which other tools' presets of these names follow, too. The border is no sharp one.
    "style": Preset((0, 0.5, 1)),
    "composition": Preset((1, 0.5, 0)),
    "first half": Preset((1, 0)),
    "last half": Preset((0, 1)),
}
"""The presets by name, in the order of the menu."""
