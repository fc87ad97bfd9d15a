"""What LoRA hooks on two prompts add to a sampling step: two changes of stack at each step.

    python benches/bench_hooks.py [--device cuda] [--blocks N] [--base-ranks R ...] [--rank R]
                                  [--steps N] [--json FILE]

ComfyUI runs prompts with different hooks one after the other, so each step brings the transformer
to one's stack and then to the other's. Measured is that, and the same check where nothing changes,
which a run without hooks has as well; the transformer itself is not run. LoRAs are tensors in
memory, as ComfyUI's loaders hand them over. Base branches and LoRAs have the sizes of Qwen-Image;
on the CPU, by default, those of two blocks.

    kept on the device    what hooks of the nodes do where 8 GiB stay free
    host memory           the same with nothing kept on the device
    hook and base         one prompt has a hook and the other has none
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from composition.files import LoraFile
from composition.measure import Timing
from composition.model import Weights, build_model
from qwenlora import ComfyQwenImageWrapper, ComposeOptions, LoraSet, LoraSpec
from qwenlora.cache import clear_cache
from qwenlora.compose.structure import composed_bytes
from qwenlora.held import HeldTensors
from qwenlora.runtime import OPTIONS_KEY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

CPU_BLOCKS, GPU_BLOCKS = 2, 60
WARM_STEPS = 3
HOST_BYTES = 1 << 30
"""What the nodes keep of deltas in host memory."""


@dataclass(frozen=True)
class Case:
    """Stacks that a step asks for in turns.

    Attributes:
        name: What the row is called.
        loras: Which LoRA each prompt has; None where it has none.
        device_cache_bytes: As in `ComposeOptions`.
    """

    name: str
    loras: tuple[int | None, ...]
    device_cache_bytes: int | None


CASES = (
    Case("nothing changes", (0, 0), 0),
    Case("two hooks, kept on the device", (0, 1), None),
    Case("two hooks, host memory", (0, 1), 0),
    Case("hook and base, kept on the device", (0, None), None),
    Case("hook and base, host memory", (0, None), 0),
)


def measure(model: nn.Module, held: Sequence[HeldTensors], case: Case, steps: int) -> Timing:
    """Times of the steps of one run."""
    options = ComposeOptions(device_cache_bytes=case.device_cache_bytes, cache_bytes=HOST_BYTES)
    sets = [
        LoraSet.of(() if index is None else LoraSpec(held[index]), options=options)
        for index in case.loras
    ]
    runtime = ComfyQwenImageWrapper.of(model)
    clear_cache()
    seconds = []
    with torch.inference_mode():
        for step in range(WARM_STEPS + steps):
            _wait(model)
            began = time.perf_counter()
            for wanted in sets:
                runtime.reconcile({OPTIONS_KEY: wanted})
                # The forward of a prompt would come here, and ask for the device's work as well.
            _wait(model)
            if step >= WARM_STEPS:
                seconds.append(time.perf_counter() - began)
        runtime.reconcile({OPTIONS_KEY: LoraSet.of()})
    return Timing(tuple(seconds))


def _wait(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def rows_of(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure every case at every base rank, and print each as it comes."""
    cuda = options.device == "cuda"
    blocks = options.blocks or (GPU_BLOCKS if cuda else CPU_BLOCKS)
    files = [LoraFile(blocks=blocks, rank=options.rank, seed=seed) for seed in (1, 2)]
    held = [HeldTensors(load_file(file.write(folder))) for file in files]
    rows = []
    for base_rank in options.base_ranks:
        model = build_model(blocks, base_rank, options.device, Weights.LEAN)
        assert composed_bytes(model) == 0
        print(f"{blocks} blocks, base rank {base_rank}, LoRAs of rank {options.rank}")
        unchanged = None
        for case in CASES:
            timing = measure(model, held, case, options.steps)
            unchanged = timing.median if unchanged is None else unchanged
            more = timing.median - unchanged
            print(f"  {case.name:36} {1e3 * more:9.2f} ms more a step", flush=True)
            row = {"case": case.name, "blocks": blocks, "base_rank": base_rank}
            rows.append(row | {"rank": options.rank, "more_s": more, **timing.document()})
    return rows


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--base-ranks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(options, Path(folder))
    if options.json is not None:
        name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        options.json.write_text(json.dumps({"device": name, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
