"""Saved workflows of the nodes that ours stand in for.

A frontend restores widgets by position. Versions of those nodes inserted widgets, and some saved
one more than the server knows, so that values arrive under their neighbours' names. Which order a
file was saved in shows in the kinds of its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "OFFLOAD_MODES",
    "ROWS",
    "STACK",
    "STACK_V1",
    "STACK_V2",
    "STACK_V3",
    "Z_IMAGE_STACK_V1",
    "Z_IMAGE_STACK_V2",
    "Z_IMAGE_STACK_V3",
    "Z_IMAGE_STACK_V4",
    "Saved",
]

ROWS = 10
"""Rows that each of the stacks has."""

OFFLOAD_MODES = ("auto", "enable", "disable")

_COUNT_SHOWN = "count shown"
"""The widget that drew the count; only in files, never an input."""

_PAIR = ("lora_name", "lora_strength")
_SWITCHED = ("enabled", *_PAIR)
_SAVE = "save_precompiled_lora"


@dataclass(frozen=True)
class Layout:
    """Widgets in the order in which some version wrote them.

    Attributes:
        head: Those before the rows.
        row: Those of each row.
        tail: Those after the rows.
    """

    head: tuple[str, ...]
    row: tuple[str, ...]
    tail: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all widgets, rows numbered from 1."""
        rows = (f"{field}_{i}" for i in range(1, ROWS + 1) for field in self.row)
        return (*self.head, *rows, *self.tail)

    def read(self, values: Sequence[object]) -> dict[str, Any]:
        """Give values their names; empty where their kinds are not this layout's."""
        head, rest = values[: len(self.head)], values[len(self.head) :]
        if not all(map(_is_kind, self.head, head)):
            return {}
        named = dict(zip(self.head, head, strict=True))
        rows = {f"{field}_{i}": value for i, field, value in self._rows(rest)}
        return {**named, **rows} if rows else {}

    def _rows(self, values: Sequence[object]) -> Iterator[tuple[int, str, object]]:
        width = len(self.row)
        for number, begin in enumerate(range(0, len(values) - width + 1, width), start=1):
            row = values[begin : begin + width]
            # What follows the saved rows is what new widgets begin with, in another order.
            if not all(map(_is_kind, self.row, row)):
                return
            for field, value in zip(self.row, row, strict=True):
                yield number, field, value


@dataclass(frozen=True)
class Saved:
    """One node's layout today, and those of its past versions."""

    today: Layout
    earlier: tuple[Layout, ...] = ()

    def restore(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Put values that were restored one place off under their own names."""
        today = self.today.names
        values = [inputs.get(name) for name in today]
        fitting = (v is None or _is_kind(n, v) for n, v in zip(today, values, strict=True))
        if all(fitting):
            return dict(inputs)
        found = max((layout.read(values) for layout in self.earlier), key=len, default={})
        if not found:
            return dict(inputs)
        others = {name: value for name, value in inputs.items() if name not in today}
        return {**others, **found}


def _is_kind(name: str, value: object) -> bool:
    """Tell if a value is of the kind that a widget of this name holds; names may carry numbers."""
    field = name.rstrip("0123456789").rstrip("_")
    if field == "lora_name":
        return isinstance(value, str)
    if field == "lora_strength":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if field in ("lora_count", _COUNT_SHOWN):
        return not isinstance(value, bool) and str(value).isdecimal()
    if field == "cpu_offload":
        return value in OFFLOAD_MODES
    return isinstance(value, bool)


STACK = Saved(
    Layout(("lora_count", "cpu_offload"), _PAIR, (_SAVE,)),
    (Layout(("lora_count",), _PAIR),),
)
STACK_V1 = Saved(Layout(("cpu_offload", "apply_awq_mod", "stack_enabled", _SAVE), _PAIR))
STACK_V2 = Saved(
    Layout(("lora_count", "cpu_offload", "apply_awq_mod", _SAVE), _PAIR),
    tuple(
        Layout((*shown, "lora_count", "cpu_offload", "apply_awq_mod", *save), _PAIR)
        for shown, save in product(((_COUNT_SHOWN,), ()), ((_SAVE,), ()))
    ),
)
STACK_V3 = Saved(
    Layout(("lora_count", "cpu_offload", "toggle_all", _SAVE), _SWITCHED),
    tuple(
        Layout((*shown, "lora_count", *switches, *save), _SWITCHED)
        for shown, switches, save in product(
            ((_COUNT_SHOWN,), ()),
            (("cpu_offload", "toggle_all"), ("toggle_all", "cpu_offload")),
            ((_SAVE,), ()),
        )
    ),
)
Z_IMAGE_STACK_V1 = Saved(Layout(("stack_enabled",), _PAIR))
Z_IMAGE_STACK_V2 = Saved(
    Layout(("lora_count", "cpu_offload"), _PAIR),
    (Layout((_COUNT_SHOWN, "lora_count", "cpu_offload"), _PAIR),),
)
Z_IMAGE_STACK_V3 = Saved(
    Layout(("lora_count", "cpu_offload", "toggle_all"), _SWITCHED),
    tuple(
        Layout((*shown, "lora_count", *switches), _SWITCHED)
        for shown, switches in product(
            ((_COUNT_SHOWN,), ()),
            (("cpu_offload", "toggle_all"), ("toggle_all", "cpu_offload")),
        )
    ),
)
Z_IMAGE_STACK_V4 = Saved(
    Layout(("lora_count", "toggle_all"), _SWITCHED),
    (Layout((_COUNT_SHOWN, "lora_count", "toggle_all"), _SWITCHED),),
)
