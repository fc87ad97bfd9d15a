"""Parts of what runs beside a layer, ready to be written: strength and scale are in them.

Notation: the layer computes y = W x + b on its raw input x (..., K). Rows are in files' order,
and t is the strength. Every part is neutral where its tensors are zero, so a room that a block of
an offloaded model does not use holds zeros.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["PartKind", "PartShape", "ScaledPart"]


class PartKind(enum.IntEnum):
    """The form in which a part acts, and with it the meaning of `PartShape.sizes`."""

    KRON = 0
    """Adds rows * kron(w1, w2) (x * columns). Sizes: ol, im, ok, il, whether it has `rows`, whether
    it has `columns` (0 or 1). Tensors: `w1` (ol, im), `w2` (ok, il), `rows` (ol ok), `columns`
    (K)."""
    DENSE = 1
    """Adds unscale * values x. Sizes: K. Tensors: `values` (rows, K), `unscale` () float32."""
    FACTOR = 2
    """Adds factor * (y - bias). No sizes. Tensors: `factor` (rows), `bias` (rows)."""
    INPUT_FACTOR = 3
    """Adds W (x * factor). Sizes: K. Tensors: `factor` (K)."""
    ROTATION = 4
    """Adds blocks[k] (y - bias)_k to each block k of b rows. Sizes: n, b. Tensors: `blocks`
    (n, b, b), `bias` (rows)."""
    INPUT_ROTATION = 5
    """Adds W x', where x'_k = x_k blocks[k] for each block k of b inputs. Sizes: n, b. Tensors:
    `blocks` (n, b, b)."""
    BUTTERFLY = 6
    """Adds strength * (z_m * (1 + rescale) - z_0), where z_0 = y - bias, and stage i adds
    stages[i] z_i in blocks of permuted rows. Sizes: m, n, b. Tensors: `stages` (m, n, b, b),
    `rescale` (rows), `strength` () float32, `bias` (rows)."""
    PASS = 7
    """Adds factor * W (x + x'), x' as of an input rotation. Sizes: n, b. Tensors: `blocks`
    (n, b, b), `factor` (rows), `bias` (rows)."""

    @property
    def is_input(self) -> bool:
        """True where it changes what the layer itself computes with."""
        return self in (PartKind.INPUT_FACTOR, PartKind.INPUT_ROTATION)

    @property
    def reads_output(self) -> bool:
        """True where it takes the layer's own output on the raw input."""
        return self in (PartKind.FACTOR, PartKind.ROTATION, PartKind.BUTTERFLY)


class PartShape(NamedTuple):
    """A part's form, place and sizes; ordered.

    Attributes:
        kind: Its form.
        row_begin: First of the layer's logical rows that it changes.
        row_count: How many.
        sizes: Numbers whose meaning is the kind's.
    """

    kind: PartKind
    row_begin: int
    row_count: int
    sizes: tuple[int, ...]

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its tensors by name, in the order in which they are kept."""
        return _TENSORS[self.kind](self)

    def nbytes(self, element_bytes: int) -> int:
        """Bytes of its tensors in a dtype of so many bytes; scalars are float32."""
        shapes = self.tensors.values()
        return sum(element_bytes * math.prod(shape) if shape else 4 for shape in shapes)


def _kron(shape: PartShape) -> Mapping[str, tuple[int, ...]]:
    ol, im, ok, il, has_rows, has_columns = shape.sizes
    tensors: dict[str, tuple[int, ...]] = {"w1": (ol, im), "w2": (ok, il)}
    if has_rows:
        tensors["rows"] = (ol * ok,)
    if has_columns:
        tensors["columns"] = (im * il,)
    return tensors


def _dense(shape: PartShape) -> Mapping[str, tuple[int, ...]]:
    (columns,) = shape.sizes
    return {"values": (shape.row_count, columns), "unscale": ()}


def _factor(shape: PartShape) -> Mapping[str, tuple[int, ...]]:
    rows = (shape.row_count,)
    return {"factor": rows, "bias": rows}


def _input_factor(shape: PartShape) -> Mapping[str, tuple[int, ...]]:
    return {"factor": shape.sizes}


def _rotation(shape: PartShape) -> Mapping[str, tuple[int, ...]]:
    count, size = shape.sizes
    return {"blocks": (count, size, size), "bias": (shape.row_count,)}


def _input_rotation(shape: PartShape) -> Mapping[str, tuple[int, ...]]:
    count, size = shape.sizes
    return {"blocks": (count, size, size)}


def _butterfly(shape: PartShape) -> Mapping[str, tuple[int, ...]]:
    stages, count, size = shape.sizes
    rows = (shape.row_count,)
    return {"stages": (stages, count, size, size), "rescale": rows, "strength": (), "bias": rows}


def _pass(shape: PartShape) -> Mapping[str, tuple[int, ...]]:
    count, size = shape.sizes
    rows = (shape.row_count,)
    return {"blocks": (count, size, size), "factor": rows, "bias": rows}


_TENSORS: Mapping[PartKind, Callable[[PartShape], Mapping[str, tuple[int, ...]]]] = {
    PartKind.KRON: _kron,
    PartKind.DENSE: _dense,
    PartKind.FACTOR: _factor,
    PartKind.INPUT_FACTOR: _input_factor,
    PartKind.ROTATION: _rotation,
    PartKind.INPUT_ROTATION: _input_rotation,
    PartKind.BUTTERFLY: _butterfly,
    PartKind.PASS: _pass,
}


@dataclass(frozen=True)
class ScaledPart:
    """One part ready to be written.

    Attributes:
        shape: Its form, place and sizes.
        tensors: By the names that its shape gives them, in the slot's dtype and on its device;
            scalars are float32.
    """

    shape: PartShape
    tensors: Mapping[str, Tensor]
