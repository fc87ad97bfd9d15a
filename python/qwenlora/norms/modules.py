"""The modules of a checkpoint: keys as diffusers and ComfyUI have them, to diffusers' names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenlora.errors import NothingToApplyError, OtherModelError
from qwenlora.merge.known import known_slots
from qwenlora.source.module_names import names_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["MODELS", "Modules", "Stored", "modules_of"]

MODELS = ("qwen-image", "z-image")
"""Models whose norms can be computed, by their names in plans."""
_SUFFIX = ".weight"
Sides = tuple[int, int]
"""(rows, columns) of a module's weight."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint and the modules whose rows it holds, in order.

    Attributes:
        key: Its key.
        parts: Their names; several for a fused query, key and value.
        sides: (rows, columns) of each.
    """

    key: str
    parts: tuple[str, ...]
    sides: Sides


@dataclass(frozen=True)
class Modules:
    """The modules of a checkpoint.

    Attributes:
        model: The model that they are of.
        stored: Where they are stored, in the order of the keys.
        missing: Modules of the model that are not there.
    """

    model: str
    stored: tuple[Stored, ...]
    missing: tuple[str, ...]


def known_sides(model: str) -> dict[str, tuple[tuple[str, ...], Sides]]:
    """What a file may store in one tensor: by name the modules in it, and the sides of each."""
    known = {}
    for path, slot in known_slots(model).items():
        if slot.row.in_features == 0 or slot.row.kind in ("norm", "embedding"):
            continue
        known[path] = (slot.parts, slot.sides)
        known |= {part: ((part,), slot.sides) for part in slot.parts}
    return known


def modules_of(
    keys: Iterable[str],
    source: str,
    known: Mapping[str, Mapping[str, tuple[tuple[str, ...], Sides]]] | None = None,
) -> Modules:
    """Find the modules of a known model among a checkpoint's keys.

    Args:
        keys: All keys.
        source: What errors call the checkpoint.
        known: By model what its files may store; see `known_sides`.

    Raises:
        OtherModelError: It is of no model that is known.
        NothingToApplyError: A module is stored twice.
    """
    keys = list(keys)
    known = {model: known_sides(model) for model in MODELS} if known is None else known
    found = {model: _found(keys, own) for model, own in known.items()}
    model = max(found, key=lambda name: len(found[name]))
    if not found[model]:
        raise OtherModelError(
            f"`{source}` is of no model that is known: it has no linear of Qwen-Image or Z-Image"
            "\nhint: name the 16-bit transformer that the quantized one was made of"
        )
    counts = Counter(part for stored in found[model] for part in stored.parts)
    twice = next((part for part, count in counts.items() if count > 1), None)
    if twice is not None:
        raise NothingToApplyError(f"`{source}` has the weight of `{twice}` twice")
    every = dict.fromkeys(part for parts, _ in known[model].values() for part in parts)
    missing = tuple(part for part in every if part not in counts)
    return Modules(model, tuple(found[model]), missing)


def _found(keys: Iterable[str], known: Mapping[str, tuple[tuple[str, ...], Sides]]) -> list[Stored]:
    stored = []
    for key in keys:
        name = _module_of(key, known) if key.endswith(_SUFFIX) else None
        if name is not None:
            stored.append(Stored(key, *known[name]))
    return stored


def _module_of(key: str, known: Mapping[str, object]) -> str | None:
    """The name of what a key stores, as diffusers has it; None where it is not known."""
    names = names_of(key.removesuffix(_SUFFIX))
    return next((name for name in names if name in known), None)
