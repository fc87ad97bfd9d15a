"""LoRA files of real size, written tensor by tensor so that none has to fit in memory."""

from __future__ import annotations

import enum
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from composition.model import Values
from composition.shapes import FUSED, LINEARS, MODULATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Layout(enum.Enum):
    """Where a file's tensors lie, and of what ranks they are."""

    REGULAR = "regular"
    """As the safetensors library writes: one rank, names in lexicographic order."""

    IRREGULAR = "irregular"
    """Ranks from a half to the whole by block and linear, tensors in no order."""


class Down(enum.Enum):
    """Whether q, k and v of a file have a `down` of their own."""

    OWN = "own"
    """As trained: their ranks add up in the fused layer."""

    SHARED = "shared"
    """One for the three, as split from a fused layer: their rank counts once."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A file to be written.

    Attributes:
        blocks: Blocks trained, from the first.
        rank: Rank of every linear, or the largest where they differ.
        seed: Chooses the values.
        layout: Where tensors lie.
        down: Whether q, k and v have their own `down`.
        modulation: Whether the modulations are trained, too.
    """

    blocks: int
    rank: int
    seed: int = 0
    layout: Layout = Layout.REGULAR
    down: Down = Down.OWN
    modulation: bool = False

    @property
    def name(self) -> str:
        """File name that tells it from others."""
        marks = [self.layout.value, self.down.value, "mod" if self.modulation else "plain"]
        return f"b{self.blocks}-r{self.rank}-s{self.seed}-{'-'.join(marks)}.safetensors"

    def write(self, folder: Path) -> Path:
        """Write it where it is not yet, and return its path."""
        path = folder / self.name
        if not path.exists():
            _write(path, list(self._tensors()), Values(self.seed, "cpu"))
        return path

    def _tensors(self) -> Iterator[_Tensor]:
        """Every tensor in the order of its bytes."""
        tensors = list(self._unordered())
        if self.layout is Layout.IRREGULAR:
            order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(self.seed))
            yield from (tensors[i] for i in order.tolist())
        else:
            # The safetensors library sorts by the dtypes' sizes, then by name.
            yield from sorted(tensors, key=lambda tensor: (-tensor.element, tensor.name))

    def _unordered(self) -> Iterator[_Tensor]:
        linears = LINEARS | (MODULATIONS if self.modulation else {})
        for block in range(self.blocks):
            for number, (linear, (out, inp)) in enumerate(linears.items()):
                name = f"diffusion_model.transformer_blocks.{block}.{linear}"
                rank = self.rank
                if self.layout is Layout.IRREGULAR:
                    rank -= (block + number) % 4 * self.rank // 8
                yield _Tensor(f"{name}.alpha", "F32", (), fill=rank / 2)
                yield _Tensor(
                    f"{name}.lora_A.weight", "BF16", (rank, inp), group=self._group(block, linear)
                )
                yield _Tensor(f"{name}.lora_B.weight", "BF16", (out, rank))

    def _group(self, block: int, linear: str) -> str | None:
        fused = next((slot for slot, names in FUSED.items() if linear in names), None)
        return f"{block}.{fused}" if fused and self.down is Down.SHARED else None


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file; those of one group hold the same values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: float | None = None
    group: str | None = None

    @property
    def element(self) -> int:
        return 4 if self.dtype == "F32" else 2

    @property
    def nbytes(self) -> int:
        return self.element * torch.Size(self.shape).numel()


def _write(path: Path, tensors: list[_Tensor], values: Values) -> None:
    header, end = {}, 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    groups: dict[str, bytes] = {}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(_bytes(tensor, values, groups))
    partial.rename(path)


def _bytes(tensor: _Tensor, values: Values, groups: dict[str, bytes]) -> bytes:
    if tensor.fill is not None:
        return torch.full(tensor.shape, tensor.fill, dtype=torch.float32).numpy().tobytes()
    if tensor.group is not None and tensor.group in groups:
        return groups[tensor.group]
    data = values.fill(torch.empty(tensor.shape, dtype=torch.bfloat16))
    content = data.view(torch.uint8).numpy().tobytes()
    if tensor.group is not None:
        groups[tensor.group] = content
    return content


def drop_from_page_cache(path: Path) -> None:
    """Ask the system to forget a file's pages; it may not listen."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Pages that are not on the disk yet cannot be forgotten.
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
