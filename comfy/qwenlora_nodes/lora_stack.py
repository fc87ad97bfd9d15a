"""Stacks of LoRAs as node packs hand them to each other.

A `LORA_STACK` is a list or tuple of (name, model strength, clip strength). Names are those of the
host's list, with either system's separators, or whole paths into its folders.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from . import host
from .rows import InputError, Row, as_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["LORA_STACK", "LORA_STACK_INPUT", "Entry", "read_stack", "stack_of"]

LORA_STACK = "LORA_STACK"
"""The type of the sockets."""

LORA_STACK_INPUT = "lora_stack"
"""The name of the input."""

Entry = tuple[str, float, float]


def read_stack(stack: object) -> tuple[Row, ...]:
    """The rows of a stack out of another node; nothing where none is linked.

    Raises:
        InputError: It is no stack, or a value in it is of no use.
    """
    if stack is None:
        return ()
    if not isinstance(stack, (list, tuple)):
        raise InputError(
            f"`{LORA_STACK_INPUT}` is {stack!r:.80}: it must be a list of (name, model strength,"
            " clip strength)"
        )
    return tuple(_rows(stack))


def _rows(stack: Iterable[object]) -> Iterator[Row]:
    for number, entry in enumerate(stack, start=1):
        source = f"{LORA_STACK_INPUT}, entry {number}"
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise InputError(
                f"{source}, is {entry!r:.80}: it must be (name, model strength, clip strength)"
            )
        name, strength, clip_strength = entry
        row = as_row({"lora_name": name, "strength": strength}, source)
        other = as_row({"lora_name": name, "strength": clip_strength}, source)
        yield replace(row, clip_strength=other.strength)


def stack_of(rows: Iterable[Row]) -> list[Entry]:
    """The rows that are in use as a stack, names as the host lists them."""
    return list(_entries(rows))


def _entries(rows: Iterable[Row]) -> Iterator[Entry]:
    for row in rows:
        clip_strength = row.strength if row.clip_strength is None else row.clip_strength
        # One that is for a text encoder alone is somebody's who comes behind.
        if row.name and row.enabled and (row.active or clip_strength != 0):
            yield host.listed_name(row.name), row.strength, clip_strength
