"""Saved workflows of the nodes that ours stand in for.

A frontend restores widgets by position. Versions of those nodes inserted widgets, and some saved
one more than the server knows, so that values arrive under their neighbours' names. Which order a
file was saved in shows in the kinds of its values.

The browser restores by the same tables. Each stack's `model` input tells them in two options:

- `qwenlora_layouts`: lists of widget names, today's first, then those of past versions. Of those
  that fit the saved values, the one holds that names most of them; the first of equals.
- `qwenlora_kinds`: field to kind (`Kind`); a field is a widget's name without its number.

A list begins with the widgets before the rows, one name per saved value. All of them must be of
their kinds. Then come rows, `lora_name_1` and so on, as many as were saved: the first row that
lacks a value, or holds one of another kind, ends them. What follows it is of no use. A list without
any row does not fit. A saved value that is a dict with `lora_name` or `lora` is a row by itself,
wherever it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
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
    "Kind",
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


class Kind(str, Enum):
    """The kind of value that a widget holds."""

    NAME = "name"
    """A file's name."""

    STRENGTH = "strength"
    """A number."""

    COUNT = "count"
    """A whole number, or its digits as text."""

    OFFLOAD = "offload"
    """One of `OFFLOAD_MODES`."""

    FLAG = "flag"
    """True or false."""

    @classmethod
    def of(cls, name: str) -> Kind:
        """The kind of a widget's values, by its name."""
        return _KINDS[_field(name)]

    def holds(self, value: object) -> bool:
        """Tell if a value is of this kind."""
        is_flag = isinstance(value, bool)
        if self is Kind.NAME:
            return isinstance(value, str)
        if self is Kind.STRENGTH:
            return isinstance(value, (int, float)) and not is_flag
        if self is Kind.COUNT:
            return not is_flag and str(value).isdecimal()
        if self is Kind.OFFLOAD:
            return value in OFFLOAD_MODES
        return is_flag


_KINDS = {
    "lora_name": Kind.NAME,
    "lora_strength": Kind.STRENGTH,
    "lora_count": Kind.COUNT,
    _COUNT_SHOWN: Kind.COUNT,
    "cpu_offload": Kind.OFFLOAD,
    "enabled": Kind.FLAG,
    "toggle_all": Kind.FLAG,
    "stack_enabled": Kind.FLAG,
    "apply_awq_mod": Kind.FLAG,
    _SAVE: Kind.FLAG,
}


def _field(name: str) -> str:
    """A widget's name without its number."""
    return name.rstrip("0123456789").rstrip("_")


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

    @property
    def published(self) -> dict[str, Any]:
        """The layouts and the kinds of their values, as the browser is told of them."""
        every = dict.fromkeys(layout.names for layout in (self.today, *self.earlier))
        layouts = [list(names) for names in every]
        fields = dict.fromkeys(_field(name) for names in layouts for name in names)
        return {
            "qwenlora_layouts": layouts,
            "qwenlora_kinds": {field: _KINDS[field].value for field in fields},
        }

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
    """Tell if a value is of the kind that a widget of this name holds."""
    return Kind.of(name).holds(value)


STACK = Saved(
    Layout(("lora_count", "cpu_offload"), _PAIR, (_SAVE,)),
    (Layout(("lora_count",), _PAIR),),
)
_STACK_V1_HEAD = ("cpu_offload", "apply_awq_mod", "stack_enabled", _SAVE)
STACK_V1 = Saved(Layout(_STACK_V1_HEAD, _SWITCHED), (Layout(_STACK_V1_HEAD, _PAIR),))
STACK_V2 = Saved(
    Layout(("lora_count", "cpu_offload", "apply_awq_mod", _SAVE), _PAIR),
    tuple(
        Layout((*shown, "lora_count", "cpu_offload", *switches), _PAIR)
        for shown, switches in product(
            ((_COUNT_SHOWN,), ()), (("apply_awq_mod", _SAVE), ("apply_awq_mod",), ())
        )
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
Z_IMAGE_STACK_V1 = Saved(
    Layout(("stack_enabled",), _SWITCHED), (Layout(("stack_enabled",), _PAIR),)
)
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
