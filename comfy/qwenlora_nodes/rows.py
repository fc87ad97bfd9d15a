"""Rows of a stack: which LoRA, how strongly, whether at all; from every shape that prompts have.

- `loras`: a list of dicts, in an envelope where the frontend sent it
- `loras.0.lora_name`, `loras.0.strength`, `loras.0.enabled`: ComfyUI's growing group, flat
- `lora_1`: a dict, as nodes that draw their own rows send it
- `lora_name_1`, `lora_strength_1`, `enabled_1`: plain widgets
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_STRENGTH", "InputError", "Row", "as_flag", "as_row", "read_rows"]

MAX_STRENGTH = 100.0
"""Largest strength, either sign."""

_TINY = 1e-5
"""Strengths below are what sliders leave of a zero."""

_FIELDS = {
    "lora_name": "name",
    "lora": "name",
    "lora_strength": "strength",
    "strength": "strength",
    "enabled": "enabled",
    "on": "enabled",
}
_FLAT_NAME = "loras.{}.lora_name"
_FLAT = re.compile(r"loras\.(\d+)\.(\w+)")
_NUMBERED = re.compile(r"(\w+)_(\d+)")
_FLAGS = {"true": True, "1": True, "false": False, "0": False}

Fields = Mapping[str, Any]


class InputError(ValueError):
    """A value that a node cannot take; the text is for the person who gave it."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        source: The input that it comes from.
        name: The file's name as the host lists it; empty where none is chosen.
        strength: Factor on the delta.
        enabled: Whether it is switched on.
        clip_strength: Factor for a text encoder, which only nodes behind use; None where it is the
            strength.
    """

    source: str
    name: str
    strength: float
    enabled: bool
    clip_strength: float | None = None

    @property
    def active(self) -> bool:
        """True where it changes the model."""
        return bool(self.name) and self.enabled and abs(self.strength) >= _TINY


def read_rows(inputs: Mapping[str, Any], *, limit: int | None = None) -> tuple[Row, ...]:
    """Find the rows among a node's inputs.

    Args:
        inputs: Values by input name, in the prompt's order; None for a value that is linked.
        limit: Rows of plain widgets with a higher number are hidden ones.

    Raises:
        InputError: A value is of no use.
    """
    found = [*_listed(inputs), *_flat(inputs), *_dicts(inputs), *_plain(inputs, limit)]
    return tuple(as_row(fields, source) for source, fields in found)


def as_row(fields: Fields, source: str = "lora_name") -> Row:
    """One row from its fields, under any of their names.

    Raises:
        InputError: A value is of no use.
    """
    values = {
        _FIELDS[key]: value for key, value in fields.items() if key in _FIELDS and value is not None
    }
    name = values.get("name", "")
    if not isinstance(name, str):
        raise InputError(f"a LoRA's name is {name!r}: it must be a file's name")
    strength = _strength(values.get("strength", 1.0), name)
    enabled = as_flag(values.get("enabled"), True)
    return Row(source, "" if name == "None" else name, strength, enabled)


def as_flag(value: object, default: bool) -> bool:
    """A switch; what is none gives the default."""
    if isinstance(value, bool):
        return value
    return _FLAGS.get(str(value).lower(), default)


def _strength(value: object, name: str) -> float:
    try:
        strength = float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        strength = math.nan
    if not abs(strength) <= MAX_STRENGTH:
        raise InputError(
            f"the strength of {name!r} is {value!r}: it must be a number from"
            f" {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
        )
    return strength


def _listed(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Fields]]:
    rows = inputs.get("loras")
    if isinstance(rows, Mapping):
        # The server unwraps a list's envelope for inputs that are declared only.
        rows = rows.get("__value__", list(rows.values()))
    if isinstance(rows, (list, tuple)):
        for index, row in enumerate(rows):
            if isinstance(row, Mapping):
                yield _FLAT_NAME.format(index), row


def _flat(inputs: Mapping[str, Any]) -> Iterable[tuple[str, Fields]]:
    return _gathered(
        _FLAT_NAME,
        (
            (int(match[1]), match[2], value)
            for key, value in inputs.items()
            if (match := _FLAT.fullmatch(key))
        ),
    )


def _dicts(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Fields]]:
    """Rows under any name: files of other versions hold them where newer ones have a switch."""
    for key, value in inputs.items():
        if key != "loras" and isinstance(value, Mapping) and _FIELDS.keys() & value.keys():
            yield key, value


def _plain(inputs: Mapping[str, Any], limit: int | None) -> Iterable[tuple[str, Fields]]:
    return _gathered(
        "lora_name_{}",
        (
            (int(match[2]), match[1], value)
            for key, value in inputs.items()
            if (match := _NUMBERED.fullmatch(key))
            and match[1] in _FIELDS
            and not isinstance(value, Mapping)
            and (limit is None or int(match[2]) <= limit)
        ),
    )


def _gathered(source: str, cells: Iterable[tuple[int, str, Any]]) -> Iterator[tuple[str, Fields]]:
    """Rows out of their cells, each with the input's name that `source` gives for its number."""
    rows: dict[int, dict[str, Any]] = {}
    for index, field, value in cells:
        rows.setdefault(index, {})[field] = value
    return ((source.format(index), rows[index]) for index in sorted(rows))
