"""The report of a merge: plain data, for people, for programs, and for the file itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qwenlora import _core
from qwenlora.merge.metadata import METADATA, PEFT_METADATA
from qwenlora.report import TURNED_OFF

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.merge.cut import Cut
    from qwenlora.merge.metadata import Inherited
    from qwenlora.plan.documents import Skip
    from qwenlora.report import LoraReport

__all__ = ["BaseReport", "MergeReport", "ModuleReport", "lost_of", "metadata_of"]

SCHEMA = 1
"""Version of the documents; fields may be added within it."""
_NO_SHARE = 1e-30
"""Far below what float64 can tell from nothing."""


@dataclass(frozen=True)
class ModuleReport:
    """One module of the result.

    Attributes:
        path: Its path.
        rank: Its rank.
        energy: Squared Frobenius norm of the whole sum; None where nothing was to be cut.
        energy_lost: That of what was cut off.
    """

    path: str
    rank: int
    energy: float | None
    energy_lost: float

    @property
    def share_lost(self) -> float:
        """Share of the energy that was cut off."""
        return self.energy_lost / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class BaseReport:
    """The base of a merge.

    Attributes:
        name: The name of its file or folder.
        form: How its weights are stored: `16-bit` or `quantized`.
        modules: How many modules of the sources are made of its weights.
        estimated: How many of them divide by norms that are estimated from a quantized weight.
    """

    name: str
    form: str
    modules: int
    estimated: int


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Attributes:
        path: The file.
        size_bytes: Its size.
        dtype: Dtype of the factors, by safetensors' name.
        loras: The sources, in order, with what they lack.
        modules: The modules written as pairs, in model order.
        values: Biases, norms and tables written, by key.
        zero: Modules whose sum is zero, left out exactly.
        vanished: Modules whose sum is too small for the dtype, left out.
        seconds: Time that it took.
        metadata_kept: Entries of the sources' metadata that are the file's, too.
        metadata_listed: By source, entries that are listed in `qwenlora.merge`.
        metadata_dropped: By source, entries that are too long for the file.
        base: Where base weights were read; None where none were.
    """

    path: str
    size_bytes: int
    dtype: str
    loras: tuple[LoraReport, ...]
    modules: tuple[ModuleReport, ...]
    values: tuple[str, ...]
    zero: tuple[str, ...]
    vanished: tuple[str, ...]
    seconds: float
    metadata_kept: tuple[str, ...] = ()
    metadata_listed: tuple[tuple[str, ...], ...] = ()
    metadata_dropped: tuple[tuple[str, ...], ...] = ()
    base: BaseReport | None = None

    @property
    def complete(self) -> bool:
        """True where the file has all that the sources train, except what was turned off.

        Other components' deltas are part of what they train.
        """
        return not self.vanished and not any(map(lost_of, self.loras))

    @property
    def share_lost(self) -> float:
        """Share of the energy of all modules that truncation cut off."""
        return _share_lost(self.modules)

    @property
    def worst(self) -> ModuleReport | None:
        """The module that lost the largest share; None where none lost any."""
        cut = [module for module in self.modules if module.energy_lost]
        return max(cut, key=lambda module: module.share_lost, default=None)

    def to_json(self) -> str:
        """The report as one line of JSON."""
        document = {
            "schema": SCHEMA,
            **asdict(self),
            "complete": self.complete,
            "energy_lost": self.share_lost,
        }
        return json.dumps(document)


def lost_of(lora: LoraReport) -> list[Skip]:
    """What a source trains that is in no file, and that nobody turned off."""
    return [skip for skip in lora.skipped if not skip.harmless and skip.kind != TURNED_OFF]


def metadata_of(
    loras: Sequence[LoraReport],
    modules: Sequence[ModuleReport],
    cut: Cut | None,
    inherited: Inherited,
    *,
    has_ranks: bool,
    base: BaseReport | None = None,
) -> dict[str, str]:
    """The metadata of the merged file.

    Nothing of the machine or the time is added: the same sources give the same bytes.

    Args:
        loras: The sources.
        modules: The modules written.
        cut: How they were truncated.
        inherited: What it says in the sources' own words.
        has_ranks: Whether each module's rank is said, as diffusers needs it where they differ.
        base: Where base weights were read; None where none were.
    """
    worst = max((module.share_lost for module in modules), default=0.0)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "version": _core.__version__,
        "sources": [
            {
                "name": lora.name,
                "strength": lora.strength,
                "modules": lora.modules_applied,
                **({"blocks": lora.blocks} if lora.blocks else {}),
                "left_out": len(lost_of(lora)),
                **({"metadata": dict(listed)} if listed else {}),
            }
            for lora, listed in zip(loras, inherited.listed, strict=True)
        ],
        **({"base": asdict(base)} if base is not None else {}),
        "modules": len(modules),
        "cut": None if cut is None else {k: v for k, v in asdict(cut).items() if v is not None},
        "energy_lost": _share(_share_lost(modules)),
        "energy_lost_worst": _share(worst),
    }
    metadata = {"format": "pt", **inherited.kept, METADATA: json.dumps(document)}
    if has_ranks:
        metadata[PEFT_METADATA] = json.dumps(_peft_config(modules))
    return metadata


def _peft_config(modules: Sequence[ModuleReport]) -> dict[str, Any]:
    """The entries from which diffusers makes a `LoraConfig`.

    Without it, before its PR 14409 of August 2026, it gives every module the first one's alpha,
    which is wrong where ranks differ.
    """
    rank = max((module.rank for module in modules), default=1)
    ranks = {module.path: module.rank for module in modules}
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(ranks),
    }
    return {f"transformer.{name}": value for name, value in config.items()}


def _share_lost(modules: Sequence[ModuleReport]) -> float:
    energy = sum(module.energy or 0.0 for module in modules)
    lost = sum(module.energy_lost for module in modules)
    return lost / energy if energy else 0.0


def _share(value: float) -> str:
    """A share in one width whatever its value: the header's room is measured before."""
    return f"{value if value > _NO_SHARE else 0.0:.3e}"
