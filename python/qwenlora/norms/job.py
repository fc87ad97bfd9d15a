"""Norms of a checkpoint's weights: tensor by tensor read, summed up and written."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.errors import NonFiniteError, ShapeMismatchError
from qwenlora.merge.output import atomic_file, check_output
from qwenlora.merge.writer import SafetensorsWriter
from qwenlora.norms.modules import Modules, Sides, Stored, modules_of
from qwenlora.source.checkpoint import Checkpoint, files_of
from qwenlora.source.norms_file import COLUMN_NORMS, METADATA, ROW_NORMS, SCHEMA
from qwenlora.weight.norms import add_column_norms, row_norms

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from qwenlora.merge.writer import TensorShape

__all__ = ["NormsReport", "write_norms"]

Progress = Callable[[int, int], None]
"""Called as `progress(done, all)` before each tensor."""
_PANEL_BYTES = 32 << 20
"""Bytes of a weight's rows that are read at a time."""


@dataclass(frozen=True)
class NormsReport:
    """The result.

    Attributes:
        path: The file.
        size_bytes: Its size.
        model: The model that the checkpoint is of.
        modules: How many modules have norms.
        missing: Modules of the model that the checkpoint lacks.
        seconds: Time it took.
    """

    path: str
    size_bytes: int
    model: str
    modules: int
    missing: tuple[str, ...]
    seconds: float

    @property
    def complete(self) -> bool:
        """True where no module is missing."""
        return not self.missing

    def to_json(self) -> str:
        """One object (schema 1)."""
        return json.dumps({"schema": SCHEMA, "complete": self.complete, **asdict(self)})


def write_norms(
    checkpoint: Path,
    output: Path,
    *,
    force: bool = False,
    progress: Progress = lambda _done, _all: None,
    known: Mapping[str, Mapping[str, tuple[tuple[str, ...], Sides]]] | None = None,
) -> NormsReport:
    """Write the norms of the rows and columns of a checkpoint's weights.

    Some rows of one weight are in memory at a time.

    Args:
        checkpoint: A file, an index of several, or a folder of diffusers'.
        output: The file to write.
        force: Whether a file that is there is replaced.
        progress: Called before each tensor.
        known: By model what its files may store; by default that of the released models.

    Returns:
        What was written.

    Raises:
        LoraReadError: The checkpoint cannot be read, or changed meanwhile.
        LoraFileError: It is malformed.
        OtherModelError: It is of no model that is known.
        ShapeMismatchError: A weight has another shape than the model's.
        UnknownWeightError: A weight is stored quantized.
        NonFiniteError: A weight holds NaN or infinity.
        OutputError: The file must not, or cannot, be written.
    """
    started = time.perf_counter()
    check_output(output, files_of(checkpoint).files, force=force)
    source = Checkpoint(checkpoint)
    with contextlib.closing(source), torch.no_grad():
        modules = modules_of(source.tensors, str(checkpoint), known)
        for stored in modules.stored:
            _check_shape(source, stored)
        metadata = {METADATA: json.dumps(_entry(source, modules), sort_keys=True)}
        with atomic_file(output) as file:
            writer = SafetensorsWriter(file, output, _bounds(modules), metadata)
            for done, stored in enumerate(modules.stored):
                progress(done, len(modules.stored))
                for name, norms in _norms(source, stored).items():
                    writer.add(name, norms)
            source.finish()
            writer.finish(metadata)
    return NormsReport(
        str(output),
        writer.size,
        modules.model,
        sum(len(stored.parts) for stored in modules.stored),
        modules.missing,
        time.perf_counter() - started,
    )


def _check_shape(source: Checkpoint, stored: Stored) -> None:
    rows, columns = stored.sides
    wanted, found = (rows * len(stored.parts), columns), source.tensors[stored.key].shape
    if found != wanted:
        raise ShapeMismatchError(
            f"`{stored.key}` is {found}, the model's weight {wanted}: this is another model"
        )


def _entry(source: Checkpoint, modules: Modules) -> dict[str, object]:
    """What the file says of itself."""
    return {
        "schema": SCHEMA,
        "model": modules.model,
        "source": {"name": source.path.resolve().name, "size_bytes": source.size_bytes},
        "qwenlora": _core.__version__,
    }


def _bounds(modules: Modules) -> list[TensorShape]:
    bounds: list[TensorShape] = []
    for stored in modules.stored:
        rows, columns = stored.sides
        for part in stored.parts:
            bounds.append((part + ROW_NORMS, torch.float32, (rows,)))
            bounds.append((part + COLUMN_NORMS, torch.float32, (columns,)))
    return bounds


def _norms(source: Checkpoint, stored: Stored) -> dict[str, Tensor]:
    """Norms of the modules of one tensor by name, float32."""
    rows, columns = stored.sides
    squares = torch.zeros(len(stored.parts), columns, dtype=torch.float64)
    by_row, begin = [], 0
    for piece in source.pieces(stored.key, _PANEL_BYTES):
        by_row.append(row_norms(piece))
        end = begin + len(piece)
        for at, own in enumerate(squares):
            first, last = max(begin, at * rows), min(end, (at + 1) * rows)
            if first < last:
                add_column_norms(own, piece[first - begin : last - begin])
        begin = end
    found = {}
    for part, of_rows, of_columns in zip(
        stored.parts, torch.cat(by_row).view(-1, rows), squares, strict=True
    ):
        if not bool(of_rows.isfinite().all() and of_columns.isfinite().all()):
            raise NonFiniteError(f"`{stored.key}` of the checkpoint holds NaN or infinity")
        found[part + ROW_NORMS] = of_rows.sqrt().float()
        found[part + COLUMN_NORMS] = of_columns.sqrt().float()
    return found
