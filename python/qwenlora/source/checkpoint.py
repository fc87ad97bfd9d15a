"""A checkpoint that may lie in several files: what it holds, and its tensors piece by piece."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora import _core
from qwenlora.errors import (
    LoraFileError,
    LoraNotFoundError,
    LoraReadError,
    PickleFileError,
    UnknownWeightError,
)
from qwenlora.packing.host_bytes import host_bytes
from qwenlora.source.dtypes import DTYPES
from qwenlora.source.module_names import SAFETENSORS_ENDINGS
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from torch import Tensor

__all__ = ["Checkpoint", "Files", "StoredTensor", "files_of"]

_INDEX = ".safetensors.index.json"
"""How the name of an index of several files ends."""
_MAX_INDEX_BYTES = 32 << 20
_TRANSFORMER = "transformer"
"""The folder of a whole pipeline that has the model."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".bin.index.json")
_FLOATS = ("BF16", "F16", "F32")
"""Dtypes of weights that were not quantized, by safetensors' names."""


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        file: Which of its files.
        dtype: Its dtype, by safetensors' name.
        shape: Its shape.
        offset: Its first byte in the file.
    """

    file: int
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """The files of a checkpoint, open.

    Attributes:
        path: What was named.
        files: Its files.
        size_bytes: Bytes of all of them.
        tensors: Its tensors by key.
    """

    def __init__(self, path: Path) -> None:
        """Open all files.

        Raises:
            LoraReadError: One cannot be read.
            LoraFileError: One is malformed, or they contradict each other.
            PickleFileError: They are pickles.
        """
        self.path = path
        self.size_bytes = 0
        self.tensors: dict[str, StoredTensor] = {}
        self._readers: list[_core.TensorReader] = []
        found = files_of(path)
        self.files = found.files
        try:
            for file in self.files:
                self._open(file)
            if found.index is not None:
                self._check_index(found.index)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path) -> None:
        reader = _core.TensorReader(file)
        number = len(self._readers)
        self._readers.append(reader)
        self.size_bytes += _size(reader.identity)
        for name, dtype, shape, offset, _ in reader.header()[0]:
            other = self.tensors.get(name)
            if other is not None:
                raise LoraFileError(f"`{self.files[other.file]}` and `{file}` both have `{name}`")
            self.tensors[name] = StoredTensor(number, dtype, tuple(shape), offset)

    def _check_index(self, index: Path) -> None:
        """Check that the files hold what their index says: one may be another checkpoint's."""
        for key, name in _weight_map(index).items():
            own = self.tensors.get(key)
            if own is None or self.files[own.file].name != name:
                raise LoraFileError(f"`{index}` says that `{key}` is in `{name}`, which has it not")

    def read(self, key: str, *, begin: int = 0, count: int | None = None) -> Tensor:
        """Some rows of a tensor, or all of it, in the dtype and shape that is stored.

        Args:
            key: Its key.
            begin: First row.
            count: Rows; None for all that follow, and for a tensor without rows.

        Raises:
            LoraReadError: It cannot be read.
            UnknownWeightError: It is of a dtype that is not known here.
        """
        own = self.tensors[key]
        dtype = DTYPES.get(own.dtype)
        if dtype is None:
            raise UnknownWeightError(f"`{key}` is {own.dtype}, which is not read")
        if not own.shape:
            tensor = torch.empty((), dtype=dtype)
        else:
            rows = own.shape[0] - begin if count is None else count
            tensor = torch.empty((rows, *own.shape[1:]), dtype=dtype)
        if not tensor.numel():
            return tensor
        row_bytes = tensor.nbytes // (tensor.shape[0] if own.shape else 1)
        data = host_bytes(tensor.view(-1))
        offset = own.offset + begin * row_bytes
        self._readers[own.file].read_into([(offset, tensor.nbytes, 0)], data, threads=1)
        return tensor

    def pieces(self, key: str, panel_bytes: int) -> Iterator[Tensor]:
        """A matrix's rows in order, as float32, so many bytes of them at a time.

        Raises:
            UnknownWeightError: It is stored quantized.
            LoraReadError: It cannot be read.
        """
        own = self.tensors[key]
        if own.dtype not in _FLOATS:
            raise UnknownWeightError(
                f"`{key}` is {own.dtype}: norms of weights that were quantized are not exact"
                "\nhint: name the file in bfloat16, float16 or float32"
            )
        rows, columns = own.shape
        dtype = DTYPES[own.dtype]
        row_bytes = columns * dtype.itemsize
        step = max(panel_bytes // max(row_bytes, 1), 1)
        buffer = torch.empty((min(step, rows), columns), dtype=dtype)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            piece = buffer[:count]
            begin = own.offset + first * row_bytes
            self._readers[own.file].read_into(
                [(begin, count * row_bytes, 0)], host_bytes(piece), threads=1
            )
            yield piece.float()

    def finish(self) -> None:
        """Check that no file changed meanwhile.

        Raises:
            LoraReadError: One did.
        """
        for reader in self._readers:
            reader.verify_unchanged()

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers:
            reader.close()


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint.

    Attributes:
        files: All of them.
        index: The file that says which tensor is in which of them; None where there is none.
    """

    files: list[Path]
    index: Path | None = None


def files_of(path: Path) -> Files:
    """The files of what is named: a file, an index, or a folder of diffusers'.

    Raises:
        LoraReadError: There is none.
        LoraFileError: It does not tell which.
        PickleFileError: They are pickles.
    """
    if path.name.endswith(_INDEX):
        return _of_index(path)
    if not path.is_dir():
        return Files([path])
    inner = path / _TRANSFORMER
    folder = inner if inner.is_dir() else path
    names = _names(folder)
    indices = [name for name in names if name.endswith(_INDEX)]
    if len(indices) == 1:
        return _of_index(folder / indices[0])
    files = [name for name in names if name.lower().endswith(SAFETENSORS_ENDINGS)]
    if len(files) == 1 and not indices:
        return Files([folder / files[0]])
    if not files and any(name.endswith(_PICKLES) for name in names):
        raise PickleFileError(
            f"`{folder}` holds pickles only: a pickle can run any code while it loads, and is not"
            " read\nhint: name a checkpoint in safetensors"
        )
    found = f"{counted(len(files), 'file')} in safetensors" if files else "no file in safetensors"
    raise LoraFileError(
        f"`{folder}` holds {found} and {counted(len(indices), 'index', 'indices')}"
        "\nhint: name the file, or its index"
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise LoraReadError(f"cannot list `{folder}`: {error.strerror or error}") from error


def _of_index(path: Path) -> Files:
    """The files that an index names, each once; all lie beside it."""
    names = dict.fromkeys(_weight_map(path).values())
    for name in names:
        # An index is data: it names no file elsewhere.
        is_beside = Path(name).name == name and "\\" not in name
        if not is_beside or not name.lower().endswith(SAFETENSORS_ENDINGS):
            raise LoraFileError(f"`{path}` names `{name}`, which is no file of a checkpoint")
    return Files([path.with_name(name) for name in names], path)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_INDEX_BYTES + 1)
    except FileNotFoundError as error:
        raise LoraNotFoundError(f"there is no file `{path}`") from error
    except OSError as error:
        raise LoraReadError(f"cannot read `{path}`: {error.strerror or error}") from error
    if len(content) > _MAX_INDEX_BYTES:
        raise LoraFileError(f"`{path}` has more than {_MAX_INDEX_BYTES} bytes, and is no index")
    try:
        index = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"`{path}` is no JSON: {error}") from error
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise LoraFileError(f"`{path}` has no `weight_map`")
    if not all(isinstance(name, str) for name in weights.values()):
        raise LoraFileError(f"`{path}`: the `weight_map` names files that are no text")
    return weights


def _size(identity: Hashable) -> int:
    """Bytes of a file, by its reader's identity."""
    assert isinstance(identity, tuple)
    return int(identity[0][0])
