"""What a stack asks of each slot of a model, by the files' float64 deltas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .oracle import is_modulation, kinds_of, number_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from .loras import Lora, Piece


@dataclass(frozen=True)
class Factors:
    """A LoRA's strength, and its factors by block and by kind of layer.

    Attributes:
        strength: The strength.
        blocks: By the number of the block.
        kinds: By kind.
    """

    strength: float
    blocks: Mapping[int, float] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """As a caller writes the factors."""
        return ", ".join(f"{name}:{own}" for name, own in {**self.blocks, **self.kinds}.items())

    def at(self, path: str) -> float:
        """The strength of a layer."""
        found = self.strength * self.blocks.get(number_of(path), 1.0)
        for kind in kinds_of(path):
            found *= self.kinds.get(kind, 1.0)
        return found

    def is_off(self, path: str) -> bool:
        """Whether a layer gets nothing."""
        return self.at(path) == 0


@dataclass
class Slot:
    """One slot.

    Attributes:
        delta: (out, in) float64.
        size: A norm that rounding is a share of.
        value: What is added to its bias, or to a norm's weight; None where nothing is.
        loras: How many LoRAs of the stack have deltas of its weight.
        fulls: How many full deltas lie in it.
    """

    delta: torch.Tensor | None = None
    size: float = 0.0
    value: torch.Tensor | None = None
    loras: int = 0
    fulls: int = 0


class Wanted:
    """A stack on a model.

    Attributes:
        slots: By path, those that some LoRA has pieces for, zero ones included.
        zero: Of each LoRA, the slots in which all that it brings is zero.
        single: Of each LoRA, the slots in which it has one piece.
        held: Of each LoRA, in how many slots it has a piece.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stack: Sequence[tuple[Lora, Factors]],
        *,
        modulation: bool,
        refused: Sequence[Collection[str]],
    ) -> None:
        """Sum up.

        Args:
            model: The model.
            stack: LoRAs with strengths, which are not 0, and factors.
            modulation: Whether the modulations' deltas are taken.
            refused: Of each LoRA, names of the full deltas that only their data may refuse.
        """
        self.slots: dict[str, Slot] = {}
        self.zero: list[set[str]] = []
        self.single: list[set[str]] = []
        self.held: list[int] = []
        for (lora, factors), left_out in zip(stack, refused, strict=True):
            own: dict[str, list[Piece]] = {}
            for piece in lora.pieces:
                if not modulation and is_modulation(piece.layer.slot):
                    continue
                if factors.is_off(piece.layer.slot):
                    continue
                own.setdefault(piece.layer.slot, []).append(piece)
            self.held.append(len(own))
            self.zero.append(set())
            self.single.append({path for path, pieces in own.items() if len(pieces) == 1})
            for path, pieces in own.items():
                taken = [p for p in pieces if not (p.full and p.layer.name in left_out)]
                if all(piece.is_zero for piece in taken) and len(taken) == len(pieces):
                    self.zero[-1].add(path)
                self._add(model, path, taken, factors.at(path))

    def _add(
        self, model: torch.nn.Module, path: str, pieces: Sequence[Piece], strength: float
    ) -> None:
        slot = self.slots.setdefault(path, Slot())
        module = model.get_submodule(path)
        weights = [piece for piece in pieces if piece.delta is not None]
        slot.loras += bool(weights)
        for piece in weights:
            if slot.delta is None:
                shape = (module.out_features, module.in_features)
                slot.delta = torch.zeros(shape, dtype=torch.float64)
            rows = slice(piece.layer.first, piece.layer.first + piece.layer.rows)
            slot.delta[rows] += strength * piece.delta
            slot.size += abs(strength) * piece.size
            slot.fulls += piece.full
        for piece in pieces:
            if piece.value is None:
                continue
            if slot.value is None:
                count = piece.layer.columns if piece.layer.is_norm else module.out_features
                slot.value = torch.zeros(count, dtype=torch.float64)
            first = 0 if piece.layer.is_norm else piece.layer.first
            slot.value[first : first + len(piece.value)] += strength * piece.value
