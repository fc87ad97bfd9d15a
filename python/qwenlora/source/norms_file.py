"""The file that `qwenlora norms` writes: exact norms of the rows and columns of a model's weights.

For each module two tensors, `MODULE.row_norms` (N,) and `MODULE.column_norms` (K,), float32: norms,
not squared. Modules have the names that diffusers gives them. The metadata's entry `qwenlora.norms`
is JSON: schema, model, and name and size of what the norms were computed from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwenlora import _core
from qwenlora.errors import LoraReadError, NormsFileError, OtherModelError
from qwenlora.packing.host_bytes import host_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Hashable, Mapping

    from torch import Tensor

__all__ = ["COLUMN_NORMS", "METADATA", "ROW_NORMS", "SCHEMA", "NormsFile"]

METADATA = "qwenlora.norms"
"""The metadata's entry that says what the file is."""
SCHEMA = 1
"""Version of that entry; fields may be added within it."""
ROW_NORMS = ".row_norms"
"""What follows a module's name in the name of its norms of rows."""
COLUMN_NORMS = ".column_norms"
"""The same of columns."""
_HINT = "\nhint: `qwenlora norms CHECKPOINT` writes such a file"


@dataclass(frozen=True)
class NormsFile:
    """Norms of one model's weights before they were quantized.

    Attributes:
        path: The file.
        identity: What tells its content from another one's.
        model: The model's name, as plans have it.
        source: The name of the checkpoint.
        tensors: (values, first byte, bytes) of each tensor by name.
    """

    path: Path
    identity: Hashable
    model: str
    source: str
    tensors: Mapping[str, tuple[int, int, int]]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> NormsFile:
        """Read what a file says of itself.

        Raises:
            NormsFileError: It is no file of norms.
            LoraReadError: It cannot be read.
            LoraFileError: It is no well-formed safetensors file.
        """
        path = Path(path)
        reader = _core.TensorReader(path)
        try:
            identity = reader.identity
            rows, metadata = reader.header()
        finally:
            reader.close()
        model, source = _described(path, dict(metadata))
        tensors = {}
        for name, dtype, shape, offset, nbytes in rows:
            if dtype != "F32" or len(shape) != 1:
                raise NormsFileError(f"`{path}`: `{name}` is {dtype} {tuple(shape)}, no norms")
            tensors[name] = (shape[0], offset, nbytes)
        return cls(path, identity, model, source, tensors)

    def require_model(self, model: str) -> None:
        """Check that the norms are of this model.

        Raises:
            OtherModelError: They are of another one.
        """
        if model != self.model:
            raise OtherModelError(f"the norms of `{self.path}` are of {self.model}, not {model}")

    def row_norms(self, module: str, *, length: int | None = None) -> Tensor | None:
        """(N,) float64: the squared norms of a module's rows; None where the file has none.

        Args:
            module: Its name, as `transformer_blocks.0.attn.to_q`.
            length: How many there must be, where that is known.

        Raises:
            NormsFileError: There are more or fewer, or one is no norm.
            LoraReadError: The file cannot be read, or changed since it was opened.
        """
        return self._squared(module + ROW_NORMS, length)

    def column_norms(self, module: str, *, length: int | None = None) -> Tensor | None:
        """(K,) float64: the same of its columns."""
        return self._squared(module + COLUMN_NORMS, length)

    def _squared(self, name: str, length: int | None) -> Tensor | None:
        if name not in self.tensors:
            return None
        count, offset, nbytes = self.tensors[name]
        if length is not None and count != length:
            raise NormsFileError(
                f"`{self.path}`: `{name}` has {count} norms, the model's weight {length}"
            )
        norms = torch.empty(count)
        reader = _core.TensorReader(self.path)
        try:
            if reader.identity != self.identity:
                raise LoraReadError(f"`{self.path}` changed after it was opened")
            reader.read_into([(offset, nbytes, 0)], host_bytes(norms), threads=1)
        finally:
            reader.close()
        if not bool((norms >= 0).all() and norms.isfinite().all()):
            raise NormsFileError(f"`{self.path}`: `{name}` holds what is no norm")
        return norms.double().square()


def _described(path: Path, metadata: Mapping[str, str]) -> tuple[str, str]:
    """The model and the source's name, by the metadata."""
    if METADATA not in metadata:
        raise NormsFileError(f"`{path}` is no file of norms{_HINT}")
    try:
        entry = json.loads(metadata[METADATA])
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("schema"), int):
        raise NormsFileError(f"`{path}`: the metadata's `{METADATA}` is damaged{_HINT}")
    if entry["schema"] != SCHEMA:
        raise NormsFileError(
            f"`{path}` is of another version of qwenlora (schema {entry['schema']}){_HINT}"
        )
    source = entry.get("source")
    name = source.get("name") if isinstance(source, dict) else None
    model = entry.get("model")
    if not isinstance(model, str) or not isinstance(name, str):
        raise NormsFileError(f"`{path}`: the metadata's `{METADATA}` lacks model or source{_HINT}")
    return model, name
