"""Draws the picture of docs/map.md, from two files that are made here.

    python benches/plot_map.py [PICTURE]

The first trains all linears of the blocks but the modulation, those of the middle most. The second
trains the attention of the later blocks, a part of it as DoRA, and the MLPs as LoKr.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from qwenlora import LoraSpec
from qwenlora.map.job import map_loras
from qwenlora.map.png import to_image
from qwenlora.map.scene import scene_of
from qwenlora.merge.known import known_slots

PICTURE = Path(__file__).parents[1] / "docs" / "plots" / "map.png"
BLOCKS = 60
RANK = 4
COLORS = 255


class Maker:
    """Tensors of a file in the making."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        slots = known_slots("qwen-image").values()
        self.sides = {
            path: slot.sides for slot in slots for path in slot.parts if slot.row.kind != "norm"
        }

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def pair(self, path: str, strength: float) -> None:
        """A LoRA of this strength, more or less."""
        out, columns = self.sides[path]
        strength *= math.exp(0.2 * float(self.normal(1)))
        self.tensors[f"{path}.lora_A.weight"] = (self.normal(RANK, columns) / 10).bfloat16()
        size = strength * 10 / math.sqrt(RANK * columns)
        self.tensors[f"{path}.lora_B.weight"] = (size * self.normal(out, RANK)).bfloat16()

    def lokr(self, path: str, strength: float) -> None:
        out, columns = self.sides[path]
        size = strength / math.sqrt(columns)
        self.tensors[f"{path}.lokr_w1"] = self.normal(16, 16).bfloat16()
        self.tensors[f"{path}.lokr_w2"] = (size * self.normal(out // 16, columns // 16)).bfloat16()

    def save(self, path: Path) -> Path:
        save_file(self.tensors, path)
        return path


def style() -> Maker:
    maker = Maker(1)
    for block in range(BLOCKS):
        near = math.exp(-(((block - 34) / 16) ** 2))
        for path in maker.sides:
            if path.startswith(f"transformer_blocks.{block}.") and "_mod." not in path:
                share = 0.03 if ".attn." in path else 0.012
                maker.pair(path, share * (0.05 + near) * (0.4 if "txt" in path else 1))
    return maker


def character() -> Maker:
    maker = Maker(2)
    for block in range(20, BLOCKS):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            path = f"transformer_blocks.{block}.attn.{name}"
            maker.pair(path, 0.004 * (1 + block / 20))
            if block >= 50 and name != "to_out.0":
                maker.tensors[f"{path}.dora_scale"] = torch.ones(maker.sides[path][0], 1)
        for name in ("img_mlp.net.0.proj", "img_mlp.net.2"):
            maker.lokr(f"transformer_blocks.{block}.{name}", 0.002)
    return maker


def main() -> None:
    picture = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    with tempfile.TemporaryDirectory() as folder:
        files = [
            style().save(Path(folder, "style.safetensors")),
            character().save(Path(folder, "character.safetensors")),
        ]
        scene = scene_of([map_loras([LoraSpec(path)]) for path in files])
    # Few colours: a third of the size.
    few = to_image(scene).quantize(COLORS, method=Image.Quantize.MAXCOVERAGE)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    main()
