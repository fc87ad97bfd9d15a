"""Rust core of qwenlora."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from qwenlora.plan.documents import SlotRow

__all__ = [
    "MAX_RANK",
    "MODULATION_PLANES",
    "RANK_MULTIPLE",
    "TILE",
    "TRUNCATED_RANK",
    "FilePlan",
    "Fillers",
    "Filling",
    "PlannedStack",
    "Readers",
    "Reading",
    "SlotMap",
    "TensorReader",
    "Watch",
    "__version__",
    "awq_rows",
    "column_norms",
    "file_identity",
    "fill_packed",
    "known_slots",
    "layer_kinds",
    "look_at",
    "plan_stack",
    "row_norms",
    "run_keys",
    "svdq_rows",
    "touch",
    "unpack_factor",
]

_Identity: TypeAlias = tuple[int, int, int, int]
_SourceIdentity: TypeAlias = tuple[_Identity, _Identity | None]

# (bytes of each, where each begins, which tensor each is)
_AlikeTensor: TypeAlias = tuple[int, memoryview, memoryview]
# (rank, scale, row_begin, row_count, dtype, down, up)
_AlikeMember: TypeAlias = tuple[int, float, int, int, str, _AlikeTensor, _AlikeTensor]
# (slots, row order, [(lora, members), ...])
_AlikeSlots: TypeAlias = tuple[
    tuple[int, ...], str, tuple[tuple[int, tuple[_AlikeMember, ...]], ...]
]

_Bytes: TypeAlias = npt.NDArray[np.uint8]
# ("fragments", [(source, source_tiles) of every slot], first, count)
_Fragments: TypeAlias = tuple[Literal["fragments"], Sequence[tuple[_Bytes, int]], int, int]
# ("down", tiles, [(source, rank, rank_begin), ...])
_Down: TypeAlias = tuple[Literal["down"], int, Sequence[tuple[_Bytes, int, int]]]
# ("up" or "up over", tiles, [(source, table, row_begin, row_count, rank, rank_begin), ...])
_UpMember: TypeAlias = tuple[_Bytes, _Bytes | None, int, int, int, int]
_Up: TypeAlias = tuple[Literal["up", "up over"], int, Sequence[_UpMember]]
# ("zero", tiles)
_Zero: TypeAlias = tuple[Literal["zero"], int]
# ("keep", tiles)
_Keep: TypeAlias = tuple[Literal["keep"], int]
# (dest, slots, channels, element_bytes, columns)
_PackedColumn: TypeAlias = _Fragments | _Down | _Up | _Zero | _Keep
_PackedRecipe: TypeAlias = tuple[_Bytes, int, int, int, Sequence[_PackedColumn]]

__version__: str

MAX_RANK: int
MODULATION_PLANES: int
RANK_MULTIPLE: int
TILE: int
TRUNCATED_RANK: int

@final
class FilePlan:
    @staticmethod
    def read(path: str | os.PathLike[str]) -> FilePlan: ...
    @staticmethod
    def from_tensors(
        origin: str,
        tensors: Sequence[tuple[str, str, Sequence[int], int]],
        *,
        scalars: Sequence[float | None],
        metadata: Sequence[tuple[str, str]],
        same: Callable[[int, int], bool],
    ) -> FilePlan: ...
    def to_json(self) -> str: ...
    @property
    def identity(self) -> _SourceIdentity | None: ...
    @property
    def verdict(self) -> str: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def producer(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...

@final
class PlannedStack:
    def to_json(self) -> str: ...
    def grouped(self) -> tuple[list[_AlikeSlots], str | None]: ...
    def slots_json(self, paths: set[str]) -> str: ...
    def skipped_json(self) -> str: ...
    @property
    def applied_modules(self) -> list[int]: ...
    @property
    def added_bytes(self) -> int: ...

@final
class SlotMap:
    def __new__(cls, rows: Sequence[SlotRow]) -> SlotMap: ...
    def __len__(self) -> int: ...

@final
class TensorReader:
    def __new__(cls, path: str | os.PathLike[str]) -> TensorReader: ...
    @property
    def identity(self) -> _SourceIdentity: ...
    def header(
        self,
    ) -> tuple[list[tuple[str, str, list[int], int, int]], list[tuple[str, str]]]: ...
    def read_into(
        self, ranges: Sequence[tuple[int, int, int]], dest: npt.NDArray[np.uint8], *, threads: int
    ) -> None: ...
    def verify_unchanged(self) -> None: ...
    def close(self) -> None: ...

@final
class Readers:
    def __new__(cls, *, threads: int) -> Readers: ...
    def read(
        self,
        file: TensorReader,
        runs: Sequence[tuple[Sequence[int], int, int]],
        dest: npt.NDArray[np.uint8],
        *,
        measure: str | None = None,
    ) -> Reading: ...
    def close(self) -> None: ...

@final
class Reading:
    def wait(self) -> float | None: ...

@final
class Fillers:
    def __new__(cls, *, threads: int) -> Fillers: ...
    def fill(self, recipes: Sequence[_PackedRecipe]) -> Filling: ...
    def close(self) -> None: ...

@final
class Filling:
    def wait(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...

@final
class Watch:
    def __new__(
        cls,
        children: Sequence[Mapping[str, nn.Module | None]],
        parameters: Sequence[tuple[dict[str, nn.Parameter | None] | dict[str, Tensor | None], str]],
        buffers: Sequence[dict[str, Tensor | None]],
    ) -> Watch: ...
    def look(self) -> None: ...
    def is_unchanged(self) -> bool: ...
    def rewritten(self) -> list[int]: ...

def awq_rows(
    values: _Bytes,
    scales: _Bytes,
    zeros: _Bytes,
    dest: _Bytes,
    *,
    rows: int,
    columns: int,
    planes: int,
    begin: int,
    count: int,
    threads: int,
) -> None: ...
def column_norms(matrix: _Bytes, norms: _Bytes, *, columns: int, threads: int) -> None: ...
def fill_packed(recipes: Sequence[_PackedRecipe], *, threads: int) -> None: ...
def file_identity(path: str | os.PathLike[str]) -> _SourceIdentity: ...
def known_slots() -> str: ...
def look_at(
    buffer: _Bytes, blocks: Sequence[tuple[int, int, str]], slots: int, *, measure: bool
) -> tuple[list[tuple[int, ...]], list[int], float | None]: ...
def layer_kinds(path: str) -> tuple[int | None, list[str]] | None: ...
def plan_stack(
    items: Sequence[tuple[str, FilePlan, float, bool, Sequence[int]]],
    slots: SlotMap,
    options: str,
) -> PlannedStack: ...
def row_norms(matrix: _Bytes, norms: _Bytes, *, columns: int, threads: int) -> None: ...
def run_keys(args: Sequence[str]) -> int: ...
def svdq_rows(
    form: str,
    values: _Bytes,
    scales: _Bytes,
    row_factors: _Bytes | None,
    column_factors: _Bytes,
    dest: _Bytes,
    *,
    threads: int,
) -> None: ...
def touch(parameters: dict[str, nn.Parameter | None]) -> None: ...
def unpack_factor(
    source: _Bytes,
    dest: _Bytes,
    *,
    side: str,
    channels: int,
    element_bytes: int,
    threads: int,
) -> None: ...
