"""The meaning of the buffers of a side branch, and their names."""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from qwenlora.delta.parts import PartKind
from qwenlora.packing.layout import RowOrder
from qwenlora.slots.parts.table import OF_INPUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qwenlora.delta.parts import PartShape

__all__ = [
    "BRANCH_DOWN",
    "BRANCH_UP",
    "CENTRE_BIAS",
    "CENTRE_SUMS",
    "LAYOUT",
    "PREFIX",
    "BranchLayout",
    "Joined",
    "Rows",
    "Run",
    "part_name",
]


PREFIX = "qwenlora_"
"""What the names of all buffers of a branch begin with."""
BRANCH_DOWN = f"{PREFIX}down"
"""Name of the low-rank part's (R, in) buffer."""
BRANCH_UP = f"{PREFIX}up"
"""Name of the low-rank part's (out, R) buffer."""
CENTRE_SUMS = f"{PREFIX}centre_sums"
"""Name of a layer's (N, K/64) buffer: the sums of its weight over groups of columns."""
CENTRE_BIAS = f"{PREFIX}centre_bias"
"""Name of a layer's (N,) buffer: what its stored bias lacks."""
LAYOUT = "_qwenlora_branch"
"""Attribute of a layer: its branch's layout."""


def part_name(index: int, name: str) -> str:
    """The buffer of one tensor of a part, by the part's place in the layout."""
    return f"{PREFIX}{index}_{name}"


Rows: TypeAlias = "tuple[tuple[int, int], ...]"
"""Ranges of logical rows, each from the first to before the last."""


class Joined(enum.Enum):
    """Who adds a branch to what its layer computes."""

    BY_HOOK = "hook"
    """A forward hook: what the module puts out is the layer's own output."""
    BY_FORWARD = "forward"
    """The module's forward, which is ours then, and goes on from the sum."""


class Run(NamedTuple):
    """A run of the layer on an input of its own.

    Attributes:
        inputs: Places of the parts that change its input; none for the raw input.
        rows: What is taken of its output.
    """

    inputs: tuple[int, ...]
    rows: Rows


@dataclass(frozen=True)
class BranchLayout:
    """The meaning of a branch's buffers.

    Attributes:
        parts: Shapes of the parts, in the order of their buffers.
        row_order: The order of the layer's output rows.
        out_features: How many rows the layer has.
        centre: Names of the buffers that a layer takes to run on inputs of any sign.
        joined: Who adds the branch.
        runs: The runs that make the layer's own output, where parts change its input; else none.
        passes: Places of the parts for which the layer runs once more.
        readers: Places of the parts that read the layer's output on the raw input.
        adders: Places of the parts that add a product of the raw input.
        names: Names of each part's tensors: PyTorch 2.5 traces no property of a tuple.
    """

    parts: tuple[PartShape, ...] = ()
    row_order: RowOrder = RowOrder.PLANAR
    out_features: int = 0
    centre: tuple[str, ...] = ()
    joined: Joined = Joined.BY_HOOK
    runs: tuple[Run, ...] = field(init=False)
    passes: tuple[int, ...] = field(init=False)
    readers: tuple[int, ...] = field(init=False)
    adders: tuple[int, ...] = field(init=False)
    names: tuple[tuple[str, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        passes = self._places(lambda kind: kind is PartKind.PASS)
        readers = self._places(lambda kind: kind.reads_output)
        adders = self._places(OF_INPUT.__contains__)
        object.__setattr__(self, "runs", tuple(_runs(self.parts, self.out_features)))
        object.__setattr__(self, "passes", passes)
        object.__setattr__(self, "readers", readers)
        object.__setattr__(self, "adders", adders)
        object.__setattr__(self, "names", tuple(tuple(shape.tensors) for shape in self.parts))

    def _places(self, holds: Callable[[PartKind], bool]) -> tuple[int, ...]:
        return tuple(place for place, shape in enumerate(self.parts) if holds(shape.kind))

    @property
    def runs_layer(self) -> bool:
        """True where the layer runs on other inputs than the raw one."""
        return bool(self.runs or self.passes)

    def buffers(self) -> Iterator[str]:
        """Names of all buffers but a low-rank pair's, in order."""
        for index, shape in enumerate(self.parts):
            yield from (part_name(index, name) for name in shape.tensors)
        yield from self.centre


def _runs(parts: Sequence[PartShape], out_features: int) -> Iterator[Run]:
    """The distinct inputs of the layer, with the rows that take each."""
    inputs = [(place, shape) for place, shape in enumerate(parts) if shape.kind.is_input]
    if not inputs:
        return
    rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for begin, end in _segments([shape for _, shape in inputs], out_features):
        own = tuple(place for place, shape in inputs if _covers(shape, begin))
        found = rows.setdefault(own, [])
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    for own, taken in rows.items():
        yield Run(own, tuple(taken))


def _segments(shapes: Iterable[PartShape], out_features: int) -> Iterator[tuple[int, int]]:
    """The rows between any two neighbouring ends of parts: from the first to before the last."""
    ends = {0, out_features}
    for shape in shapes:
        ends |= {shape.row_begin, shape.row_begin + shape.row_count}
    ordered = sorted(ends)
    return itertools.pairwise(ordered)


def _covers(shape: PartShape, row: int) -> bool:
    return shape.row_begin <= row < shape.row_begin + shape.row_count
