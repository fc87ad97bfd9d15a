"""What it costs to open Z-Image's query, key and value, which one kernel norms and rotates.

    python benches/bench_opened.py [--tokens N ...] [--repeat 20] [--json FILE]

One `attention.fused_module` is called. On a GPU with Nunchaku 1.2 it is Nunchaku's own, of the 3840
channels of Z-Image, elsewhere the emulation's of 384. A LoRA goes through the kernel. Every other
kind, here on the key, opens it: the layer runs by itself, and norms and rotation come behind. Shown
are milliseconds as a median, that over the base model's, and the most memory that a call holds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qwenlora
from qwenlora import emulation
from qwenlora.emulation import Precision, ZImageForm
from qwenlora.packing.rotation import pack_rotations

HEAD_DIM = 128
RANK = 16
ROTATED = 16
"""Rows of one rotation."""
BLOCK = "layers.0"
CALLS = 5
"""Calls between two looks at the clock: their launches run ahead of the kernels."""


def main() -> None:
    """Measure and print."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        model = _nunchaku(device) if device.type == "cuda" else _emulated()
        fused = model.get_submodule(f"{BLOCK}.attention.fused_module")
        rows = [
            row
            for tokens in options.tokens
            for row in _measure(model, fused, tokens, options.repeat)
        ]
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json")
    return parser.parse_args()


def _emulated() -> nn.Module:
    dense = emulation.tiny_z_image(layers=1)
    options = {"form": ZImageForm.FUSED, "precision": Precision.W4A4}
    return emulation.z_image_transformer(dense, rank=32, dtype=torch.bfloat16, **options)


def _nunchaku(device: torch.device) -> nn.Module:
    """Nunchaku's model of the released widths, of one layer and refiner each, with random bytes."""
    own = importlib.import_module("nunchaku.models.transformers.transformer_zimage")
    sizes = {"dim": 3840, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 30, "n_kv_heads": 30}
    with torch.device("meta"):
        model = own.NunchakuZImageTransformer2DModel(**sizes, axes_dims=[32, 48, 48])
    model = nn.Module.to(model, torch.bfloat16)
    model._patch_model(skip_refiners=False, precision="int4", rank=32)
    model = model.to_empty(device=device)
    # Loading folds the tensors of three layers into one module.
    model.load_state_dict(model.state_dict())
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.uniform_(0.01, 0.02, generator=generator)
        else:
            parameter.data.view(torch.uint8).random_(0, 256, generator=generator)
    return model.eval().requires_grad_(False)


def _files(width: int) -> dict[str, dict[str, Tensor]]:
    """State dicts by names: all three projections, or the key's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 0.1) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    def key(**tensors: Tensor) -> dict[str, Tensor]:
        return {f"lycoris_layers_0_attention_to_k.{name}": own for name, own in tensors.items()}

    lora = {}
    for name in ("to_q", "to_k", "to_v"):
        stem = f"diffusion_model.{BLOCK}.attention.{name}"
        lora[f"{stem}.lora_down.weight"] = normal(RANK, width, size=1 / math.sqrt(width))
        lora[f"{stem}.lora_up.weight"] = normal(width, RANK)
    lokr = key(lokr_w1=normal(16, 16), lokr_w2=normal(width // 16, width // 16, size=0.01))
    blocks = normal(width // ROTATED, ROTATED, ROTATED, size=0.03)
    return {
        "LoRA": lora,
        "LoKr": lokr,
        "IA3 of rows": key(weight=normal(width, 1), on_input=torch.tensor(data=False)),
        "OFT of rows": key(oft_blocks=blocks, alpha=torch.tensor(0.0)),
        "IA3 of columns": key(weight=normal(1, width), on_input=torch.tensor(data=True)),
    }


def _measure(model: nn.Module, fused: Any, tokens: int, repeat: int) -> list[dict[str, Any]]:
    device = fused.norm_q_weight.device
    width = fused.qkv_proj_down.shape[0]
    x = torch.randn(1, tokens, width, device=device, dtype=torch.bfloat16)
    angles = torch.rand(1, tokens, HEAD_DIM // 2, device=device)
    if device.type == "cuda":
        rotation = pack_rotations(torch.stack([angles.sin(), angles.cos()], dim=-1))
    else:
        rotation = torch.polar(torch.ones_like(angles), angles)
    rows = [_row("base", tokens, fused, x, rotation, repeat)]
    _show(rows[0], rows[0])
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, tensors in _files(width).items():
            files[name] = [Path(folder, f"{name}.safetensors")]
            save_file(tensors, *files[name])
        files["LoRA and LoKr"] = files["LoRA"] + files["LoKr"]
        for name, stack in files.items():
            assert qwenlora.compose_loras(model, stack).complete
            rows.append(_row(name, tokens, fused, x, rotation, repeat))
            _show(rows[-1], rows[0])
    qwenlora.reset_loras(model)
    return rows


def _row(
    name: str, tokens: int, fused: nn.Module, x: Tensor, rotation: Tensor, repeat: int
) -> dict[str, Any]:
    fused(x, rotation)
    memory = 0
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused(x, rotation)
        memory = torch.cuda.max_memory_allocated() - before
    times = []
    for _ in range(repeat):
        _wait()
        began = time.perf_counter()
        for _ in range(CALLS):
            fused(x, rotation)
        _wait()
        times.append((time.perf_counter() - began) / CALLS)
    return {"name": name, "tokens": tokens, "ms": 1e3 * statistics.median(times), "bytes": memory}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _show(row: dict[str, Any], base: dict[str, Any]) -> None:
    print(
        f"{row['tokens']:6} tokens  {row['name']:16}{row['ms']:9.3f} ms"
        f" {row['ms'] / base['ms']:6.2f}x {row['bytes'] / 2**20:7.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
