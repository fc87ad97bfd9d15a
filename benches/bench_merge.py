"""Merging two LoRA files, beside plain torch doing the same, each in a process of its own.

    python benches/bench_merge.py [--blocks 60] [--rank 64] [--truncated 64] [--repeat 3]

The files have the real sizes of Qwen-Image: every linear of a block but the modulation, bfloat16,
random values (850 MB each at 60 blocks and rank 64). Exact: ranks join. Truncated: to `--truncated`
ranks. The baseline loads both files, goes through the modules and saves: the exact sum as one
concatenation, the truncated one as the SVD of the dense sum, which is what scripts do, on
`--dense-modules` modules (its time is scaled to all). Time is the best of the repeats, with the
files in the page cache; memory is the highest resident set of the work above that of the imports
(Linux: /proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from composition.files import LoraFile
from composition.shapes import LINEARS

STRENGTHS = (0.8, -0.5)
MIB = 1024**2


def modules(blocks: int) -> list[str]:
    return [f"transformer_blocks.{b}.{name}" for b in range(blocks) for name in LINEARS]


def ours(folder: Path, rank: int | None) -> None:
    from qwenlora import LoraSpec
    from qwenlora.merge.cut import Cut
    from qwenlora.merge.job import merge_loras
    from qwenlora.merge.plan import MergeOptions

    specs = [LoraSpec(folder / f"{n}.safetensors", s) for n, s in enumerate(STRENGTHS)]
    cut = None if rank is None else Cut(rank=rank)
    merge_loras(specs, folder / "ours.safetensors", MergeOptions(cut=cut, force=True))


def plain(folder: Path, rank: int | None, names: list[str]) -> None:
    """What a script does: everything in memory."""
    from safetensors.torch import load_file, save_file

    files = [load_file(folder / f"{n}.safetensors") for n in range(2)]
    result = {}
    for name in names:
        key = f"diffusion_model.{name}"
        downs = [file[f"{key}.lora_A.weight"] for file in files]
        ups = [
            (file[f"{key}.lora_B.weight"].float() * (strength * scale(file, key))).bfloat16()
            for file, strength in zip(files, STRENGTHS, strict=True)
        ]
        if rank is None:
            down, up = torch.cat(downs), torch.cat(ups, dim=1)
        else:
            pairs = zip(ups, downs, strict=True)
            total = sum(up.float() @ down.float() for up, down in pairs)
            left, values, right = torch.linalg.svd(total, full_matrices=False)
            root = values[:rank].sqrt()
            down = (root.unsqueeze(1) * right[:rank]).bfloat16()
            up = (left[:, :rank] * root).bfloat16()
        result[f"{key}.lora_down.weight"] = down.contiguous()
        result[f"{key}.lora_up.weight"] = up.contiguous()
        result[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    save_file(result, folder / "plain.safetensors")


def scale(file: dict[str, torch.Tensor], key: str) -> float:
    return file[f"{key}.alpha"].item() / file[f"{key}.lora_A.weight"].shape[0]


def measured(*args: object) -> dict[str, float]:
    """Run this file's worker in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps([str(arg) for arg in args])]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def high_water_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / 1024


def worker(kind: str, folder: str, rank: str, count: str, blocks: str) -> None:
    from safetensors.torch import load_file  # noqa: F401

    import qwenlora.merge.job  # noqa: F401

    names = modules(int(blocks))[: int(count)]
    limit = None if rank == "None" else int(rank)
    # From here on the high-water mark is the work's own.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_mib()
    started = time.perf_counter()
    if kind == "ours":
        ours(Path(folder), limit)
    elif kind == "plain":
        plain(Path(folder), limit, names)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "mib": high_water_mib() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--truncated", type=int, default=64)
    parser.add_argument("--dense-modules", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--worker")
    args = parser.parse_args()
    if args.worker:
        worker(*json.loads(args.worker))
        return
    everything = len(modules(args.blocks))
    with tempfile.TemporaryDirectory(prefix="qwenlora-bench-") as name:
        folder = Path(name)
        size = 0
        for seed in range(2):
            file = LoraFile(blocks=args.blocks, rank=args.rank, seed=seed).write(folder)
            size += file.rename(folder / f"{seed}.safetensors").stat().st_size
        print(f"{everything} modules, two files of rank {args.rank}: {size / MIB:.0f} MiB in all")

        def best(kind: str, rank: int | None, count: int, repeat: int) -> dict[str, float]:
            runs = [measured(kind, folder, rank, count, args.blocks) for _ in range(repeat)]
            return {key: min(run[key] for run in runs) for key in runs[0]}

        for title, rank, count, repeat in (
            ("exact", None, everything, args.repeat),
            (f"to rank {args.truncated}", args.truncated, args.dense_modules, 1),
        ):
            mine, other = best("ours", rank, everything, repeat), best("plain", rank, count, repeat)
            share = everything / count
            seconds = other["seconds"] * share
            note = f" (from {count} modules)" if share > 1 else ""
            print(f"{title}:")
            print(f"  qwenlora    {mine['seconds']:8.2f} s  {mine['mib']:7.0f} MiB")
            print(f"  plain torch {seconds:8.2f} s  {other['mib']:7.0f} MiB{note}")
            time_ratio, memory_ratio = mine["seconds"] / seconds, mine["mib"] / other["mib"]
            print(f"  ratio       {time_ratio:8.3f}    {memory_ratio:7.3f}")


if __name__ == "__main__":
    main()
