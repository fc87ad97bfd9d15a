"""Random LoRA files of all kinds and spellings, and in float64 what they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from .models import FUSED, Layer

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

PREFIXES = ["transformer.", "diffusion_model.", "base_model.model.", "", "lora_unet_", "lycoris_"]
FLAT = {"lora_unet_", "lycoris_"}
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@dataclass(frozen=True)
class Piece:
    """What one module of a file does to a layer.

    Attributes:
        layer: The layer.
        delta: (rows, columns) float64, scale included; None where only values change.
        size: A norm that rounding is a share of: that of the terms that the delta is a sum of.
        value: What is added to the bias, or to a norm's weight.
        full: Whether the file stores the delta itself.
    """

    layer: Layer
    delta: torch.Tensor | None = None
    size: float = 0.0
    value: torch.Tensor | None = None
    full: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        parts = [part for part in (self.delta, self.value) if part is not None]
        return not any(bool(part.any()) for part in parts)


@dataclass
class Lora:
    """A file: its tensors, what they stand for, and what must be left out by name."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)
    path: Path = Path()

    def save(self, path: Path) -> None:
        """Write the file."""
        save_file({key: t.contiguous().clone() for key, t in self.tensors.items()}, str(path))
        self.path = path


class Writer:
    """Writes random modules into a file, in one spelling and dtype."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._prefix = draw.choice(PREFIXES)
        self._dtype = draw.choice(DTYPES)
        self._generator = torch.Generator().manual_seed(draw.randrange(2**31))
        self._peft = draw.random() < 0.5
        self._adapter = draw.choice(["", "", ".default"])
        self._rank = draw.choice([1, 4, 7, 16, 24, 40])
        self._shared: dict[tuple[str, int], torch.Tensor] = {}
        self.lora = Lora()

    def write(self, layer: Layer) -> None:
        """Add a module of a random kind."""
        if layer.is_norm:
            self._norm(layer)
            return
        kinds: list[tuple[Callable[[Layer], None], int]] = [
            (self._pair, 10),
            (self._mid, 1),
            (self._lokr, 3),
            (self._loha, 2),
            (self._full, 2),
            (self._bias, 1),
            (self._reshaped, 1),
            (self._broken, 1),
        ]
        functions, weights = zip(*kinds, strict=True)
        self._draw.choices(functions, weights)[0](layer)

    def _key(self, layer: Layer, suffix: str) -> str:
        name = layer.name.replace(".", "_") if self._prefix in FLAT else layer.name
        return f"{self._prefix}{name}.{suffix}"

    def _put(self, layer: Layer, suffix: str, values: torch.Tensor) -> torch.Tensor:
        """Store a tensor; what it holds then, float64."""
        stored = values.to(self._dtype)
        self.lora.tensors[self._key(layer, suffix)] = stored
        return stored.to(torch.float64)

    def _random(self, *shape: int, size: float = 0.1) -> torch.Tensor:
        values = size * torch.randn(shape, generator=self._generator)
        if self._draw.random() < 0.04:
            values.zero_()
        return values

    def _alpha(self, layer: Layer, rank: int) -> float:
        """Perhaps an alpha; the scale."""
        alpha = self._draw.choice([None, None, 0.0, rank / 2, float(rank), 3.3])
        if alpha is None:
            return 1.0
        stored = torch.tensor(alpha, dtype=torch.float32)
        self.lora.tensors[self._key(layer, "alpha")] = stored
        return float(stored) / rank if alpha else 1.0

    def _names(self) -> tuple[str, str]:
        if self._peft:
            name = self._adapter
            return f"lora_A{name}.weight", f"lora_B{name}.weight"
        return "lora_down.weight", "lora_up.weight"

    def _halves(self, layer: Layer, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = self._names()
        values = self._random(rank, layer.columns)
        if self._draw.random() < 0.3:
            # Projections of one layer may share their `down`.
            values = self._shared.setdefault((layer.slot, rank), values)
        return self._put(layer, down, values), self._put(layer, up, self._up(layer, rank))

    def _up(self, layer: Layer, rank: int) -> torch.Tensor:
        up = self._random(layer.rows, rank)
        is_fused = layer.slot.endswith(tuple(FUSED)) and layer.name == layer.slot
        if is_fused and rank % 3 == 0 and self._draw.random() < 0.7:
            part, rows = rank // 3, layer.rows // 3
            keep = torch.zeros_like(up)
            for at in range(3):
                keep[at * rows : (at + 1) * rows, at * part : (at + 1) * part] = 1
            up *= keep
        return up

    def _pair(self, layer: Layer) -> None:
        rank = self._rank * self._draw.choice([1, 1, 3])
        down, up = self._halves(layer, rank)
        scale = self._alpha(layer, rank)
        value = None
        if self._peft and layer.has_bias and self._draw.random() < 0.1:
            value = scale * self._put(
                layer, f"lora_B{self._adapter}.bias", self._random(layer.rows)
            )
        self._add(layer, scale * (up @ down), scale * _size(up, down), value)

    def _mid(self, layer: Layer) -> None:
        rank = min(self._rank, 16)
        down = self._put(layer, "lora_down.weight", self._random(rank, layer.columns))
        up = self._put(layer, "lora_up.weight", self._random(layer.rows, rank))
        mid = self._put(layer, "lora_mid.weight", self._random(rank, rank, size=1.0))
        size = float(up.norm() * mid.norm() * down.norm())
        self._add(layer, up @ mid @ down, size)

    def _lokr(self, layer: Layer) -> None:
        split = self._draw.choice([2, 4, 8, 16])
        shapes = [(split, split), (layer.rows // split, layer.columns // split)]
        factors, rank = [], None
        for number, shape in enumerate(shapes, 1):
            if self._draw.random() < 0.75:
                factors.append(self._put(layer, f"lokr_w{number}", self._random(*shape, size=0.3)))
                continue
            # Both halves have one rank: alpha is shared by it.
            rank = rank or self._draw.randint(1, 4)
            left = self._put(layer, f"lokr_w{number}_a", self._random(shape[0], rank, size=0.5))
            right = self._put(layer, f"lokr_w{number}_b", self._random(rank, shape[1], size=0.5))
            factors.append(left @ right)
        scale = self._alpha(layer, rank) if rank is not None else 1.0
        size = float(factors[0].norm() * factors[1].norm())
        self._add(layer, scale * torch.kron(*factors), scale * size * 4)

    def _loha(self, layer: Layer) -> None:
        rank = self._draw.choice([2, 4, 8, 24])
        shapes = [(layer.rows, rank), (rank, layer.columns)] * 2
        names = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
        a, b, c, d = (
            self._put(layer, name, self._random(*shape, size=0.3))
            for name, shape in zip(names, shapes, strict=True)
        )
        scale = self._alpha(layer, rank)
        size = float(((a.abs() @ b.abs()) * (c.abs() @ d.abs())).norm())
        self._add(layer, scale * (a @ b) * (c @ d), scale * size)

    def _full(self, layer: Layer) -> None:
        shape = (layer.rows, layer.columns)
        rank = self._draw.choice([4, 12, 64])
        low = self._random(layer.rows, rank, size=0.3) @ self._random(rank, layer.columns, size=0.3)
        delta = self._put(
            layer, "diff", low + self._random(*shape, size=self._draw.choice([0.01, 0.1]))
        )
        self._add(layer, delta, float(delta.norm()), full=True)

    def _bias(self, layer: Layer) -> None:
        if layer.has_bias:
            value = self._put(layer, "diff_b", self._random(layer.rows))
            self.lora.pieces.append(Piece(layer, value=value))

    def _norm(self, layer: Layer) -> None:
        value = self._put(layer, "diff", self._random(layer.columns))
        self.lora.pieces.append(Piece(layer, value=value))

    def _reshaped(self, layer: Layer) -> None:
        self._halves(layer, self._rank)
        sizes = torch.tensor([layer.rows, layer.columns], dtype=torch.int64)
        self.lora.tensors[self._key(layer, "reshape_weight")] = sizes
        self.lora.left_out.add(layer.name)

    def _broken(self, layer: Layer) -> None:
        down, up = self._names()
        if self._draw.random() < 0.5:
            self._put(layer, down, self._random(self._rank, layer.columns))
            self._put(layer, up, self._random(layer.rows, self._rank + 1))
        else:
            self._put(layer, up, self._random(layer.rows, self._rank))
        self.lora.left_out.add(layer.name)

    def _add(
        self,
        layer: Layer,
        delta: torch.Tensor,
        size: float,
        value: torch.Tensor | None = None,
        *,
        full: bool = False,
    ) -> None:
        self.lora.pieces.append(Piece(layer, delta, abs(size), value, full))


def _size(up: torch.Tensor, down: torch.Tensor) -> float:
    return float((up.norm(dim=0) * down.norm(dim=1)).sum())


def random_lora(draw: random.Random, layers: list[Layer], path: Path) -> Lora:
    """A file that trains some of the layers; of a fused one either all or its projections."""
    writer = Writer(draw)
    share = draw.choice([0.08, 0.3, 0.9])
    whole = {layer.slot: draw.random() < 0.25 for layer in layers}
    for layer in layers:
        is_fused = layer.slot.endswith(tuple(FUSED))
        if is_fused and (layer.name == layer.slot) != whole[layer.slot]:
            continue
        if draw.random() < (share * 0.3 if layer.is_norm else share):
            writer.write(layer)
    if not writer.lora.pieces:
        writer.lora = Lora()
        writer._pair(next(layer for layer in layers if layer.name == "proj_out"))
    writer.lora.save(path)
    return writer.lora
