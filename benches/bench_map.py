"""How long maps of files of real size take.

    python benches/bench_map.py [--rank R] [--repeat K] [--json FILE]

The files train every linear of Qwen-Image, in bfloat16, and lie in the system's memory: a LoRA of
rank R, a sum of two of them, a LoKr of whole factors, and that beside the first. The CPU time is
that of all threads: where the cores are free, the wall time is about as long.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwenlora import LoraSpec
from qwenlora.map.job import map_loras
from qwenlora.map.png import to_png
from qwenlora.map.scene import scene_of
from qwenlora.merge.known import known_slots


def write(path: Path, *, rank: int = 0, blocks: int = 60, seed: int = 0) -> Path:
    """A LoRA of this rank on every linear; a LoKr of whole factors where it is 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for slot in known_slots("qwen-image").values():
        out, columns = slot.sides
        for module in slot.parts:
            number = module.split(".")[1] if module.startswith("transformer_blocks.") else "0"
            if slot.row.kind in ("norm", "embedding") or int(number) >= blocks:
                continue
            first, second = ("lora_A.weight", "lora_B.weight") if rank else ("lokr_w1", "lokr_w2")
            shapes = ((rank, columns), (out, rank)) if rank else ((8, 8), (out // 8, columns // 8))
            for end, shape in zip((first, second), shapes, strict=True):
                value = 0.01 * torch.randn(shape, generator=generator)
                tensors[f"{module}.{end}"] = value.bfloat16()
    save_file(tensors, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=60, help="blocks that the files train")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        first = write(Path(folder, "first.safetensors"), rank=args.rank, blocks=args.blocks)
        second = write(Path(folder, "second.safetensors"), rank=16, blocks=args.blocks, seed=1)
        lokr = write(Path(folder, "lokr.safetensors"), blocks=args.blocks, seed=2)
        rows = {
            f"LoRA of rank {args.rank}": [first],
            f"sum of ranks {args.rank} and 16": [first, second],
            "LoKr of whole factors": [lokr],
            f"sum of LoKr and rank {args.rank}": [lokr, first],
        }
        print(f"{'':32}{'seconds':>10}{'CPU':>10}{'PNG':>10}")
        for name, paths in rows.items():
            specs = [LoraSpec(path) for path in paths]
            times = []
            for _ in range(args.repeat):
                wall, cpu = time.perf_counter(), time.process_time()
                own = map_loras(specs)
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
            started = time.perf_counter()
            to_png(scene_of([own]))
            drawn = time.perf_counter() - started
            wall, cpu = min(times)
            found[name] = {"seconds": wall, "cpu_seconds": cpu, "png_seconds": drawn}
            print(f"{name:32}{wall:10.2f}{cpu:10.2f}{drawn:10.2f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
