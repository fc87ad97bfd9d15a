"""The requests of a caller: LoRAs with strengths, and options."""

from __future__ import annotations

import enum
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

from qwenlora.blocks import BlockFactors
from qwenlora.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, TypeAlias

    from torch import Tensor

    from qwenlora.schedule import Keyframes

__all__ = [
    "ComposeOptions",
    "Item",
    "LokrScale",
    "LoraSpec",
    "MaxRank",
    "Placement",
    "Progress",
    "Source",
    "as_specs",
]


MaxRank: TypeAlias = "int | Literal['auto'] | None"
"""Most ranks added to a slot; None is exact up to the kernels' limit, "auto" weighs."""
StateDict: TypeAlias = "Mapping[str, Tensor]"
PathLike: TypeAlias = Union[str, "os.PathLike[str]"]
Source: TypeAlias = "PathLike | StateDict"
Item: TypeAlias = "Source | tuple[Source, float] | LoraSpec"
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as `progress(phase, done, total)`: before each slot with the phases "stage" and "write",
before each batch of sums that must be compressed with "compress".

An exception that it raises cancels the composition as any other error does.
"""


class Placement(enum.Enum):
    """The way in which a new stack takes the place of the old one.

    A change of strengths alone takes no memory and is made in place where that can be, whatever the
    placement: any error then leaves the old stack in place.
    """

    AUTO = "auto"
    """WHOLE where free memory allows, BY_PATH otherwise."""

    WHOLE = "whole"
    """All new slots are built before the old ones go: any error leaves the old stack in place."""

    BY_PATH = "by-path"
    """One path over all blocks at a time: least memory; an error leaves the bare base model."""


class LokrScale(enum.Enum):
    """The factor of a LoKr whose factors are both stored whole."""

    STANDARD = "standard"
    """1, whatever its alpha says: what its trainers and the other readers do."""

    NETWORK = "network"
    """`ss_network_alpha / ss_network_dim` of the metadata, for trainers that need it."""


@dataclass(frozen=True, eq=False)
class LoraSpec:
    """One LoRA with its strength. Immutable and hashable.

    Attributes:
        source: Path of a safetensors file or PEFT folder, or a state dict in memory.
        strength: Factor on the whole delta; may be negative; 0 means absent.
        name: Name in reports; by default the file's stem, with folders before it where another file
            of the stack has the same.
        modulation: Whether its deltas of the modulation layers are applied.
        blocks: More factors, by the number of the block and by the kind of layer. Takes text, as
            `"0-19:1, 20-39:0.5; mod:0"` (`BlockFactors.parse`), or `BlockFactors`; holds the
            latter, or None where all are 1. A layer of factor 0 gets nothing of the LoRA.
        schedule: One more factor, by the share of the course of sampling. Takes text, as
            `"0:1, 0.5:0.3"` (`Schedule.parse`), pairs of a share and a factor, or `Schedule`; holds
            the latter, or None where it is 1 throughout. While it is 0 the LoRA is absent.

    Raises:
        ValueError: The strength is not finite.
        BlockFactorsError: `blocks` is a text of another form.
        ScheduleError: `schedule` is of another form.
    """

    source: Source
    strength: float = 1.0
    name: str | None = None
    modulation: bool = field(default=True, kw_only=True)
    blocks: str | BlockFactors | None = field(default=None, kw_only=True)
    schedule: Keyframes | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"strength is {self.strength}: it must be finite")
        # All ones are the same LoRA as none.
        object.__setattr__(self, "blocks", BlockFactors.of(self.blocks) or None)
        object.__setattr__(self, "schedule", Schedule.of(self.schedule) or None)

    @property
    def factors(self) -> BlockFactors:
        """The factors of `blocks`."""
        return BlockFactors.of(self.blocks)

    @property
    def course(self) -> Schedule:
        """The factors of `schedule`."""
        return Schedule.of(self.schedule)

    @property
    def is_absent(self) -> bool:
        """True where its strength is 0 throughout."""
        return self.strength == 0 or self.course.is_zero

    def at(self, share: float) -> LoraSpec:
        """The LoRA at a share of the course of sampling, its schedule carried out."""
        if self.schedule is None:
            return self
        return replace(self, strength=self.strength * self.course.factor(share), schedule=None)

    def strength_at(self, path: str) -> float:
        """The strength times the factors of the layer at a path of the model, in float64."""
        return self.strength * self.factors.factor(path)

    @property
    def title(self) -> str:
        """The name in reports, unless another LoRA of the stack has it, too (`LoraSet.names`)."""
        if self.name is not None:
            return self.name
        if isinstance(self.source, Mapping):
            return "state dict"
        # A file name need not be text; a report is.
        return Path(self.source).stem.encode("utf-8", "backslashreplace").decode()

    def _key(self) -> tuple[object, ...]:
        # A state dict is itself only: its contents are compared when a stack is made.
        source = id(self.source) if isinstance(self.source, Mapping) else os.fspath(self.source)
        return (source, self.strength, self.name, self.modulation, self.blocks, self.schedule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoraSpec) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, kw_only=True)
class ComposeOptions:
    """The options of a composition; every field has a default.

    Attributes:
        modulation: Whether deltas of the modulation layers (`img_mod.1`, `txt_mod.1`) are applied;
            `LoraSpec.modulation` turns off one LoRA's.
        truncated_rank: Ranks that a delta is cut to, optimally, where its layer can carry nothing
            but rank and the delta has more than fits: a LoKr of whole factors inside a kernel, a
            full delta on a quantized layer past `dense_budget`.
        norms: File that `qwenlora norms` wrote of the 16-bit checkpoint behind the model: DoRA then
            divides by exact norms. None estimates them from the quantized weights.
        max_energy_lost: Largest share of its energy that a full delta on a quantized layer may lose
            by that; beyond it the module is left out and named. 1 allows everything.
        lokr_scale: The factor of a LoKr whose factors are both stored whole.
        mlp: How Nunchaku's fused MLPs are computed where a delta is more than rank. "exact" runs
            them as their two layers, which takes longer. "rank" keeps the kernel, which takes ranks
            alone: a LoKr is cut to `truncated_rank`, and what stretches or turns is left out. The
            same holds for the kernel that norms and rotates Z-Image's query, key and value.
        dense_budget: Bytes that full deltas may take beside quantized layers, all together, where
            they are exact. Beyond them they are cut to `truncated_rank`.
        placement: How the new stack takes the old one's place.
        cache_bytes: Most bytes of deltas kept in host memory between compositions, so that a change
            of strength reads no file, and of base branches of composed slots in host memory, so
            that a reset copies none; 0 keeps none. The default holds a LoRA of rank 64 and base
            branches of rank 128.
        device_cache_bytes: Most bytes kept on a GPU between compositions: deltas, so that a change
            of strength copies nothing to it, and slots' tensors of sets that were left, so that a
            return to them, or to the base, moves pointers; 0 keeps none. None keeps what leaves 8
            GiB free: some drivers spill to host memory instead of failing.
        staging_bytes: Device memory that deltas go through on their way into slots; less of it
            takes longer.
        margin_bytes: Device memory that composing must leave free with the old stack, or AUTO
            takes BY_PATH: a forward needs room for its activations, and some drivers spill to host
            memory instead of failing.
        offload: Turn the model's block offload on before composing, where it is off. False leaves
            the choice of whoever loaded the model alone.
        unknown_model: What becomes of a model with quantized layers that no known model has.
            "refuse" composes nothing on it, "partial" composes what fits and lists the rest.
        threads: Threads that read files and fill host memory; by default up to 16, and as many as
            leave a quarter of the cores to the interpreter where they read.
        progress: Called before each slot and before each batch that is compressed.
    """

    modulation: bool = True
    truncated_rank: int = 256
    max_energy_lost: float = 0.1
    lokr_scale: LokrScale = LokrScale.STANDARD
    mlp: Literal["exact", "rank"] = "exact"
    norms: PathLike | None = None
    dense_budget: int = 1 << 30
    placement: Placement = Placement.AUTO
    cache_bytes: int = 5 << 29
    device_cache_bytes: int | None = None
    staging_bytes: int = 128 << 20
    margin_bytes: int = 512 << 20
    offload: bool = False
    unknown_model: Literal["refuse", "partial"] = "refuse"
    threads: int | None = None
    progress: Progress | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.unknown_model not in ("refuse", "partial"):
            raise ValueError(
                f"unknown_model is {self.unknown_model!r}: it is 'refuse' or 'partial'"
            )
        if self.mlp not in ("exact", "rank"):
            raise ValueError(f"mlp is {self.mlp!r}: it is 'exact' or 'rank'")
        if self.dense_budget < 0:
            raise ValueError(f"dense_budget is {self.dense_budget}: it must be at least 0")


def as_specs(loras: Item | Sequence[Item]) -> tuple[LoraSpec, ...]:
    """Bring every accepted form of a stack to specs; strength 0 throughout is absent.

    Raises:
        TypeError: An item is of no accepted form.
        ValueError: A strength is not finite.
    """
    one = _as_spec(loras)
    if one is not None:
        specs = [one]
    elif isinstance(loras, Iterable):
        specs = [_required(item) for item in loras]
    else:
        raise _not_a_lora(loras)
    return tuple(spec for spec in specs if not spec.is_absent)


def _as_spec(value: object) -> LoraSpec | None:
    if isinstance(value, LoraSpec):
        return value
    if isinstance(value, (str, os.PathLike, Mapping)):
        return LoraSpec(value)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], numbers.Real):
        try:
            strength = float(value[1])
        except OverflowError:
            # More than any number holds: refused as infinity is.
            strength = math.inf
        return LoraSpec(value[0], strength)
    return None


def _required(item: object) -> LoraSpec:
    spec = _as_spec(item)
    if spec is None:
        raise _not_a_lora(item)
    return spec


def _not_a_lora(value: object) -> TypeError:
    return TypeError(
        "a LoRA is a path, a state dict, (either, strength) or a LoraSpec, not "
        f"{type(value).__name__}"
    )
