"""What every kind of adapter costs in a forward, beside a LoRA, and how exactly it arrives.

    python benches/bench_adapters.py [--width 3072] [--image 4096] [--text 512] [--repeat 20]
                                     [--only NAME ...] [--mlp exact rank] [--json FILE]

All quantized layers of one Qwen-Image block are called one after the other. On a GPU with
Nunchaku's extension its own classes run, elsewhere the emulation's. For each kind: milliseconds
of a forward as a median, and over that without a LoRA; bytes held; time of the first composition,
and of a change of strength. Then, layer by layer against float64 with the same weights: the share
of the change wanted that arrives, and the error of the output over that without a LoRA. Shown are
the shares' range and the worst error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qwenlora
from adapters.block import Layers, Sizes
from adapters.expected import Expected
from adapters.files import FILES, Modules, modules_of, state_dict

STRENGTH = 0.7
CALLS = 5
"""Forwards between two events: their launches run ahead of the kernels."""


def main() -> None:
    """Measure and print."""
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes(options.width, options.image, options.text)
    with torch.no_grad():
        model = Layers(sizes, device, on_kernels=_has_kernels(device))
        modules = modules_of(model)
        expected = Expected(model, model.inputs)
        model()
        rows = [{"name": "base", **_time(model, options.repeat)}]
        _show(rows[0], rows[0])
        for name in options.only or FILES:
            for mlp in options.mlp:
                row = _measure(model, modules, expected, name, mlp, options.repeat)
                rows.append(row)
                _show(row, rows[0])
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--image", type=int, default=4096)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=list(FILES), metavar="NAME")
    parser.add_argument("--mlp", nargs="*", choices=("exact", "rank"), default=["exact"])
    parser.add_argument("--json")
    return parser.parse_args()


def _has_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        importlib.import_module("nunchaku._C")
    except ImportError:
        return False
    return True


def _measure(
    model: nn.Module, modules: Modules, expected: Expected, name: str, mlp: Any, repeat: int
) -> dict[str, Any]:
    qwenlora.clear_cache()
    tensors = state_dict(modules, name)
    options = qwenlora.ComposeOptions(mlp=mlp)
    base, before = model(), _state(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lora.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        first, report = _composed(model, file, STRENGTH, options)
        outputs = model()
        again, _ = _composed(model, file, -STRENGTH, options)
        _composed(model, file, STRENGTH, options)
    row = {
        "name": name,
        "mlp": mlp,
        **_time(model, repeat),
        "bytes": report.added_bytes,
        "first_s": first,
        "strength_s": again,
        "exactness": report.loras[0].exactness,
        "left_out": [skip.reason for skip in report.loras[0].skipped if skip.matters][:1],
        **_arrived(base, outputs, expected, expected.under(tensors, STRENGTH)),
    }
    qwenlora.reset_loras(model)
    row["reset_exact"] = _is_same(before, _state(model))
    return row


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def _is_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    names = before.keys() == after.keys()
    return names and all(torch.equal(own, after[name]) for name, own in before.items())


def _composed(model: nn.Module, file: Path, strength: float, options: Any) -> tuple[float, Any]:
    _wait()
    began = time.perf_counter()
    report = qwenlora.compose_loras(model, (file, strength), options=options)
    _wait()
    return time.perf_counter() - began, report


def _time(model: nn.Module, repeat: int) -> dict[str, float]:
    for _ in range(2):
        model()
    times = []
    for _ in range(repeat):
        _wait()
        began = time.perf_counter()
        for _ in range(CALLS):
            model()
        _wait()
        times.append((time.perf_counter() - began) / CALLS)
    return {"ms": 1e3 * statistics.median(times)}


def _arrived(
    base: dict[str, Tensor], found: dict[str, Tensor], expected: Expected, under: dict[str, Tensor]
) -> dict[str, Any]:
    """By layer: the share of the change that arrives, and the output's error over the base's."""
    shares, errors = {}, {}
    for path, own in found.items():
        wanted = under[path] - expected.base[path]
        got = own.double() - base[path].double()
        shares[path] = float((got * wanted).sum() / wanted.square().sum())
        before = (base[path].double() - expected.base[path]).norm() / expected.base[path].norm()
        after = (own.double() - under[path]).norm() / under[path].norm()
        errors[path] = float(after / before)
    return {"share": shares, "error": errors}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _show(row: dict[str, Any], base: dict[str, Any]) -> None:
    text = (
        f"{row['name']:34}{row.get('mlp', ''):6}{row['ms']:9.2f} ms {row['ms'] / base['ms']:6.2f}x"
    )
    if "bytes" in row:
        text += f"{row['bytes'] / 1e6:9.1f} MB  first {row['first_s']:6.2f} s"
        shares = row["share"].values()
        text += (
            f"  strength {row['strength_s']:6.2f} s  share {min(shares):.3f} to {max(shares):.3f}"
        )
        text += f"  error {max(row['error'].values()):.2f}x"
        text += f"  reset {'exact' if row['reset_exact'] else 'DIFFERS'}  {row['exactness']}"
        text += f"  left out: {row['left_out'][0]}" if row["left_out"] else ""
    print(text, flush=True)


if __name__ == "__main__":
    main()
