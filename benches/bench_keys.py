"""`qwenlora-keys` on a large LoRA, beside Python's safetensors reading the same of it.

    python benches/bench_keys.py [--repeats 9] [--json]

The file is Lightning's layout: 720 modules of rank 64 in bfloat16 with an alpha each, 2160
tensors, 850 MB, in the page cache as far as anything reads it. What safetensors does: open, and of
each tensor name, shape and dtype, of each alpha the value; `json by hand` does the same without any
package or check. What ours does besides: every key's module and role, ranks, scales, slots, the
verdict. Each run is a process of its own, so that its peak memory is its own; `inside` is the time
without starting Python and importing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

BLOCKS = 60
RANK = 64
WIDTH, HIDDEN = 3072, 12288
ATTENTION = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
SHAPES = {
    **{f"attn.{name}": (WIDTH, WIDTH) for name in (*ATTENTION, "to_out.0", "to_add_out")},
    **{f"{side}_mlp.net.0.proj": (HIDDEN, WIDTH) for side in ("img", "txt")},
    **{f"{side}_mlp.net.2": (WIDTH, HIDDEN) for side in ("img", "txt")},
}
ALPHA = 8.0
MEGABYTE = 1e6

# Run with `-c`, so that the process holds nothing of this one.
SAFETENSORS = """
import sys, time
from safetensors import safe_open
start = time.perf_counter()
alphas, shapes = {}, {}
with safe_open(sys.argv[1], framework="numpy") as file:
    for key in file.keys():
        tensor = file.get_slice(key)
        shapes[key] = (tensor.get_dtype(), tensor.get_shape())
        if key.endswith(".alpha"):
            alphas[key] = float(file.get_tensor(key))
seconds = time.perf_counter() - start
print(seconds, len(shapes), len(alphas))
"""
BY_HAND = """
import json, struct, sys, time
start = time.perf_counter()
alphas, shapes = {}, {}
with open(sys.argv[1], "rb") as file:
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    for key, tensor in header.items():
        shapes[key] = (tensor["dtype"], tensor["shape"])
        if key.endswith(".alpha"):
            file.seek(8 + length + tensor["data_offsets"][0])
            (alphas[key],) = struct.unpack("<f", file.read(4))
seconds = time.perf_counter() - start
print(seconds, len(shapes), len(alphas))
"""
OURS = """
import sys, time
from qwenlora import read_keys
start = time.perf_counter()
plan = read_keys(sys.argv[1])
seconds = time.perf_counter() - start
print(seconds, len(plan["tensors"]), len(plan["modules"]))
"""


def main() -> None:
    """Write the file, measure all, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lightning.safetensors"
        tensors = write(path)
        rows = measured(path, args.repeats)
        size = path.stat().st_size
    floor = peak_mb(resource.getrusage(resource.RUSAGE_SELF))
    base = rows["safetensors"]
    for row in rows.values():
        row["wall_ratio"] = base["wall_ms"] / row["wall_ms"]
        if "inside_ms" in row:
            row["inside_ratio"] = base["inside_ms"] / row["inside_ms"]
    if args.json:
        print(json.dumps({"size_bytes": size, "tensors": tensors, "rows": rows}))
        return
    print(f"{size / MEGABYTE:.0f} MB, {tensors} tensors, medians of {args.repeats}")
    print(f"{'':26}{'process':>10}{'inside':>10}{'peak memory':>14}{'faster (inside)':>18}")
    for name, row in rows.items():
        inside = f"{row['inside_ms']:.1f} ms" if "inside_ms" in row else ""
        ratio = f"{row['wall_ratio']:.1f}x"
        ratio += f" ({row['inside_ratio']:.1f}x)" if "inside_ms" in row else ""
        print(f"{name:26}{row['wall_ms']:7.1f} ms{inside:>10}{row['peak_mb']:11.1f} MB{ratio:>18}")
    print(f"a process is not seen below {floor:.1f} MB, the peak of the one that starts it")


def write(path: Path) -> int:
    """Write the file, its factors a hole that reads as zeros; the number of its tensors."""
    header: dict[str, object] = {}
    alphas, end = [], 0
    for block in range(BLOCKS):
        for module, (rows, columns) in SHAPES.items():
            stem = f"transformer_blocks.{block}.{module}"
            for suffix, dtype, shape in (
                ("lora_down.weight", "BF16", [RANK, columns]),
                ("lora_up.weight", "BF16", [rows, RANK]),
                ("alpha", "F32", []),
            ):
                length = 4 if dtype == "F32" else 2 * shape[0] * shape[1]
                alphas += [end] if suffix == "alpha" else []
                header[f"{stem}.{suffix}"] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [end, end + length],
                }
                end += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for offset in alphas:
            file.seek(start + offset)
            file.write(struct.pack("<f", ALPHA))
    return len(header)


def measured(path: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each way to read the file, by its name."""
    python = [sys.executable, "-c"]
    command = Path(sysconfig.get_path("scripts")) / "qwenlora-keys"
    ways = {
        "safetensors": ([*python, SAFETENSORS, str(path)], True),
        "json by hand": ([*python, BY_HAND, str(path)], True),
        "qwenlora.read_keys": ([*python, OURS, str(path)], True),
        "qwenlora-keys": ([str(command), str(path)], False),
        "qwenlora-keys --json": ([str(command), "--json", str(path)], False),
    }
    binary = Path(__file__).resolve().parents[1] / "target/release/qwenlora-keys"
    if binary.exists():
        ways["the cargo binary"] = ([str(binary), str(path)], False)
    rows = {}
    for name, (arguments, times_itself) in ways.items():
        runs = [run(arguments) for _ in range(repeats + 1)][1:]
        row = {
            "wall_ms": statistics.median(wall for wall, _, _ in runs),
            "peak_mb": max(peak for _, peak, _ in runs),
        }
        if times_itself:
            outputs = [output.split() for _, _, output in runs]
            tensors, alphas = int(outputs[0][1]), int(outputs[0][2])
            if (tensors, alphas) != (3 * len(SHAPES) * BLOCKS, len(SHAPES) * BLOCKS):
                sys.exit(f"{name} read {tensors} tensors and {alphas} alphas or modules")
            row["inside_ms"] = statistics.median(1e3 * float(words[0]) for words in outputs)
        rows[name] = row
    return rows


def run(arguments: list[str]) -> tuple[float, float, str]:
    """Milliseconds, peak megabytes and the output of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    wall = 1e3 * (time.perf_counter() - start)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{arguments[0]} ended with status {process.returncode}")
    return wall, peak_mb(usage), output


def peak_mb(usage: resource.struct_rusage) -> float:
    """Peak resident memory; told in kilobytes on Linux, in bytes on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit / MEGABYTE


if __name__ == "__main__":
    main()
