"""What is found of a LoRA, or of a sum of several: how strongly each module is changed.

A module's *strength* is the rms of what the delta adds to its output where the inputs are
independent and have rms 1:

- a linear of N rows: sqrt((|delta|^2 + |delta of the bias|^2) / N), |.| the Frobenius norm;
- a norm's weight, and an embedding's table: the rms of the values that are added.

A linear whose weights have rms 1 / sqrt(inputs) puts out what it takes in at its own size: such a
weight is called *typical*, and has strength 1. So strength is also the rms of the delta in shares
of a typical weight. It needs no base weight, it means the same for layers of every width, and the
same in every file: files, sums and kinds of layer can be compared. It says nothing about how much a
module matters to the picture.
"""

from __future__ import annotations

import enum
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["DeltaMap", "ModuleChange", "State"]


class State(enum.Enum):
    """What can be said of a module that is trained."""

    CHANGED = "changed"
    """It is changed, and how strongly is known."""
    ZERO = "zero"
    """It is trained, but its delta is zero."""
    NEEDS_BASE = "needs base"
    """Its delta is made of the base weight: the file alone does not tell its size."""
    LEFT_OUT = "left out"
    """Its delta is not applied."""
    DAMAGED = "damaged"
    """A tensor holds NaN or infinity."""


@dataclass(frozen=True)
class ModuleChange:
    """How a module is changed.

    Attributes:
        state: What can be said of it.
        strength: See the module's docstring; 0 unless it is changed.
        norm: Frobenius norm of the delta of its weight; 0 unless it is changed.
        reason: Why its size is not known; empty where it is.
    """

    state: State
    strength: float = 0.0
    norm: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class DeltaMap:
    """The strengths of all modules that a LoRA, or a sum, trains.

    Attributes:
        title: What it is of.
        model: The model's name.
        paths: All modules of the model, in its order.
        modules: Those that are trained, by path.
        left_out: How many tensors or modules of it have no place in the model, or are not applied.
    """

    title: str
    model: str
    paths: tuple[str, ...]
    modules: Mapping[str, ModuleChange]
    left_out: int = 0

    @property
    def strengths(self) -> dict[str, float]:
        """Strengths by path, of the modules that are changed."""
        changes = self.modules.items()
        return {path: own.strength for path, own in changes if own.state is State.CHANGED}

    @property
    def complete(self) -> bool:
        """True where the size of all that is trained is known."""
        states = {change.state for change in self.modules.values()}
        return not self.left_out and states <= {State.CHANGED, State.ZERO}

    def count(self, state: State) -> int:
        """How many modules are in a state."""
        return sum(change.state is state for change in self.modules.values())

    @property
    def median(self) -> float:
        """The median strength; 0 where nothing is changed."""
        return statistics.median(self.strengths.values()) if self.strengths else 0.0

    @property
    def strongest(self) -> tuple[str, float] | None:
        """The module that is changed most, and its strength."""
        return max(self.strengths.items(), key=lambda item: item[1], default=None)

    def to_document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "title": self.title,
            "model": self.model,
            "complete": self.complete,
            "left_out": self.left_out,
            "modules": [
                {
                    "target": path,
                    "state": change.state.value,
                    "strength": change.strength,
                    "norm": change.norm,
                    "reason": change.reason or None,
                }
                for path, change in self.modules.items()
            ],
        }
