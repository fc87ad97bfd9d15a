"""Composition on the CPU, beside the unpack-join-repack algorithm in the same run.

    python benches/bench_compose.py [--blocks N] [--rank R] [--repeat K] [--json FILE]

Layers have the real sizes of Qwen-Image and random values. The baseline is what a loader does that
knows the packed layout only as a whole: unpack the base, join the logical factors, pack the result,
for each layer, reading the file each time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qwenlora
from qwenlora import emulation, pack
from qwenlora.layout import LowRankSide

WIDTH = 3072
LINEARS = {
    "attn.to_q": (WIDTH, WIDTH),
    "attn.to_k": (WIDTH, WIDTH),
    "attn.to_v": (WIDTH, WIDTH),
    "attn.add_q_proj": (WIDTH, WIDTH),
    "attn.add_k_proj": (WIDTH, WIDTH),
    "attn.add_v_proj": (WIDTH, WIDTH),
    "attn.to_out.0": (WIDTH, WIDTH),
    "attn.to_add_out": (WIDTH, WIDTH),
    "img_mlp.net.0.proj": (4 * WIDTH, WIDTH),
    "img_mlp.net.2": (WIDTH, 4 * WIDTH),
    "txt_mlp.net.0.proj": (4 * WIDTH, WIDTH),
    "txt_mlp.net.2": (WIDTH, 4 * WIDTH),
}
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def slots(blocks: int) -> dict[str, tuple[str, ...]]:
    parts = {name: (name,) for name in LINEARS if not any(name in f for f in FUSED.values())}
    return {
        f"transformer_blocks.{b}.{slot}": tuple(f"transformer_blocks.{b}.{n}" for n in names)
        for b in range(blocks)
        for slot, names in (parts | FUSED).items()
    }


def write_lora(path: Path, blocks: int, rank: int, seed: int) -> int:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for block in range(blocks):
        for name, (out, inp) in LINEARS.items():
            key = f"diffusion_model.transformer_blocks.{block}.{name}"
            down = torch.randn(rank, inp, generator=generator)
            up = torch.randn(out, rank, generator=generator)
            tensors[f"{key}.lora_A.weight"] = down.bfloat16()
            tensors[f"{key}.lora_B.weight"] = up.bfloat16()
    save_file(tensors, path)
    return path.stat().st_size


def baseline(model: torch.nn.Module, path: Path, strength: float, blocks: int) -> None:
    """Unpack, join, repack: nothing is written to the model."""
    tensors = load_file(path)
    for slot, names in slots(blocks).items():
        layer: Any = model.get_submodule(slot)
        downs = [tensors[f"diffusion_model.{name}.lora_A.weight"] for name in names]
        ups = [tensors[f"diffusion_model.{name}.lora_B.weight"] * strength for name in names]
        down = torch.cat([pack.unpack_lowrank(layer.proj_down, LowRankSide.DOWN), *downs])
        base = pack.unpack_lowrank(layer.proj_up, LowRankSide.UP)
        up = torch.cat([base, torch.block_diag(*ups)], dim=1)
        pack.pack_lowrank(down, LowRankSide.DOWN)
        pack.pack_lowrank(up, LowRankSide.UP)


def median(action: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Median and spread in seconds."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times), max(times) - min(times)


def build(blocks: int, base_rank: int) -> torch.nn.Module:
    config = emulation.EmulatedConfig(
        num_layers=blocks, rank=base_rank, precision=emulation.Precision.W4A4, dtype=torch.bfloat16
    )
    with torch.device("meta"):
        model = emulation.EmulatedQwenImageTransformer(config)
    return model.to_empty(device="cpu")


def measure(blocks: int, rank: int, repeat: int) -> dict[str, Any]:
    model = build(blocks, base_rank=128)
    for parameter in model.parameters():
        parameter.data.zero_()
    strengths = iter(range(1, 10_000))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "lora.safetensors"
        size = write_lora(path, blocks, rank, seed=0)

        def compose() -> None:
            qwenlora.compose_loras(model, (path, 0.001 * next(strengths)))

        def first() -> None:
            qwenlora.clear_cache()
            compose()

        rows = {
            "baseline: unpack, join, repack": median(
                lambda: baseline(model, path, 0.5, blocks), repeat
            ),
            "first composition": median(first, repeat),
            "change of strength": median(compose, repeat),
        }

        def reset() -> float:
            compose()
            started = time.perf_counter()
            qwenlora.reset_loras(model)
            return time.perf_counter() - started

        resets = [reset() for _ in range(repeat)]
        rows["reset"] = (statistics.median(resets), max(resets) - min(resets))
    return {"blocks": blocks, "rank": rank, "file_mb": size / 1e6, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args.blocks, args.rank, args.repeat)
    reference = next(iter(result["rows"].values()))[0]
    print(f"{args.blocks} blocks, rank {args.rank}, {result['file_mb']:.0f} MB, CPU")
    print(f"{'action':34}{'median':>10}{'spread':>10}{'ratio':>8}")
    for action, (seconds, spread) in result["rows"].items():
        print(f"{action:34}{seconds * 1e3:7.1f} ms{spread * 1e3:7.1f} ms{seconds / reference:8.3f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
