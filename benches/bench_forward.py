"""What side branches add to a forward, as shipped and batched; on the GPU where there is one.

    python benches/bench_forward.py [--blocks N] [--ranks R ...] [--rows N ...] [--repeat K]
                                    [--json FILE]

The layers that Nunchaku leaves unpacked, at the sizes of Qwen-Image: two modulations in each block,
3072 to 18432, and six plain linears beside the blocks; bfloat16 weights stand in for the packed
ones of the modulations. They are called one after the other, with nothing between them: a time is
what the branches cost where no other layer's kernels hide their launches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import qwenlora
from qwenlora.emulation import Precision, SVDQW4A4Linear

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, TEXT, LATENT, TIME = 3072, 3584, 64, 256
MODULATION = 6 * WIDTH
PLAIN = {
    "img_in": (LATENT, WIDTH),
    "txt_in": (TEXT, WIDTH),
    "time_text_embed.timestep_embedder.linear_1": (TIME, WIDTH),
    "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    "norm_out.linear": (WIDTH, 2 * WIDTH),
    "proj_out": (WIDTH, LATENT),
}
STREAMS = ("img_mod", "txt_mod")


class Layers(nn.Module):
    """The layers under their paths, and nothing between them."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(_block() for _ in range(blocks))
        # What tells a Nunchaku model from others; it is not called.
        attention = nn.ModuleDict({"to_add_out": SVDQW4A4Linear(64, 128, precision=Precision.W4A4)})
        self.transformer_blocks[0]["attn"] = attention
        for path, sizes in PLAIN.items():
            *parents, name = path.split(".")
            parent: nn.Module = self
            for step in parents:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent.get_submodule(step)
            parent.add_module(name, _linear(*sizes))

    @property
    def modulations(self) -> list[nn.Linear]:
        return [block[s][1] for block in self.transformer_blocks for s in STREAMS]

    @property
    def plain(self) -> list[nn.Linear]:
        return [self.get_submodule(path) for path in PLAIN]


def _block() -> nn.ModuleDict:
    return nn.ModuleDict(
        {stream: nn.Sequential(nn.SiLU(), _linear(WIDTH, MODULATION)) for stream in STREAMS}
    )


def _linear(inp: int, out: int) -> nn.Linear:
    return nn.Linear(inp, out, dtype=torch.bfloat16)


class Inputs:
    """One input for all modulations, as SiLU of the time embedding is, and one for each other."""

    def __init__(self, layers: Layers, rows: int) -> None:
        weight = layers.modulations[0].weight
        self.temb = torch.randn(rows, WIDTH, dtype=weight.dtype, device=weight.device)
        self.plain = [torch.randn_like(self.temb[:, :1].expand(-1, i)) for i, _ in PLAIN.values()]

    def run(self, layers: Layers) -> list[Tensor]:
        """A forward's calls."""
        modulated = [layer(self.temb) for layer in layers.modulations]
        pairs = zip(layers.plain, self.plain, strict=True)
        return [*modulated, *(layer(x) for layer, x in pairs)]


class Batched:
    """The same branches: one product for all `down`, one for all `up`, an addition for each layer.

    The six plain layers keep branches of their own: each has another input.
    """

    def __init__(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        pairs = list(factors.values())
        shared, self.plain = pairs[: -len(PLAIN)], pairs[-len(PLAIN) :]
        self.rank, self.count = shared[0][0].shape[0], len(shared)
        self.down = torch.cat([down for down, _ in shared])  # (count * R, WIDTH)
        self.up = torch.stack([up for _, up in shared])  # (count, MODULATION, R)
        self.indices = list(torch.arange(self.count, device=self.up.device).view(-1, 1))

    def deltas(self, x: Tensor) -> Tensor:
        """(count, rows, MODULATION)"""
        hidden = nn.functional.linear(x, self.down).view(-1, self.count, self.rank)
        return torch.bmm(hidden.transpose(0, 1), self.up.mT)

    def hooked(self, layers: Layers, inputs: Inputs) -> list[Tensor]:
        """As `run`, the additions made by hooks that find a view of the product on their layer."""
        deltas = self.deltas(inputs.temb)
        for layer, delta in zip(layers.modulations, deltas.unbind(), strict=True):
            layer._buffers["delta"] = delta
        outputs = [layer(inputs.temb) for layer in layers.modulations]
        rows = zip(layers.plain, inputs.plain, self.plain, strict=True)
        return [*outputs, *(_branch(layer(x), x, *pair) for layer, x, pair in rows)]

    def run(self, layers: Layers, inputs: Inputs, *, gather: bool = False) -> list[Tensor]:
        """As `Inputs.run`; with `gather` a layer finds its delta by an index on the device."""
        deltas = self.deltas(inputs.temb)
        outputs = [layer(inputs.temb) for layer in layers.modulations]
        if gather:
            found = [deltas.index_select(0, index)[0] for index in self.indices]
        else:
            found = list(deltas.unbind())
        outputs = [output + delta for output, delta in zip(outputs, found, strict=True)]
        rows = zip(layers.plain, inputs.plain, self.plain, strict=True)
        return [*outputs, *(_branch(layer(x), x, *pair) for layer, x, pair in rows)]


def _branch(output: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.addmm(output, nn.functional.linear(x, down), up.mT)


def _add_delta(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + module._buffers["delta"]  # type: ignore[operator]


def without_hooks(layers: Layers, inputs: Inputs, factors: dict[str, Any]) -> list[Tensor]:
    """The two kernels of a branch in line: what is left of its cost is the hook's."""
    called = [(layer, inputs.temb) for layer in layers.modulations]
    called += zip(layers.plain, inputs.plain, strict=True)
    pairs = zip(called, factors.values(), strict=True)
    return [_branch(layer(x), x, *pair) for (layer, x), pair in pairs]


def random_factors(layers: Layers, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(R, in) and (out, R) by path, the modulations first."""
    blocks = range(len(layers.transformer_blocks))
    names = [f"transformer_blocks.{block}.{stream}.1" for block in blocks for stream in STREAMS]
    found = {}
    for name, layer in zip((*names, *PLAIN), (*layers.modulations, *layers.plain), strict=True):
        like = {"dtype": torch.bfloat16, "device": layer.weight.device}
        down = torch.randn(rank, layer.in_features, **like) / layer.in_features**0.5
        found[name] = (down, torch.randn(layer.out_features, rank, **like) / rank**0.5)
    return found


def compose(layers: Layers, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down.cpu(), up.cpu()
    options = qwenlora.ComposeOptions(cache_bytes=0)
    report = qwenlora.compose_loras(layers, tensors, options=options)
    assert report.complete
    assert len(report.slots) == len(factors)


def milliseconds(action: Callable[[], object], repeat: int, device: str) -> dict[str, float]:
    """One forward's time; on a GPU also without the launches, which a real forward may hide."""
    found = _timed(action, repeat, device)
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        found["gpu"] = _timed(graph.replay, repeat, device)["median"]
    return found


def _timed(action: Callable[[], object], repeat: int, device: str) -> dict[str, float]:
    """Median and spread (10th to 90th percentile), the end awaited."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for index in range(repeat + 3):
        wait()
        started = time.perf_counter()
        action()
        wait()
        if index >= 3:
            times.append(1e3 * (time.perf_counter() - started))
    times.sort()
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    return {"median": statistics.median(times), "spread": high - low}


def measure(layers: Layers, rank: int, rows: int, repeat: int, device: str) -> dict[str, Any]:
    inputs, factors = Inputs(layers, rows), random_factors(layers, rank)
    batched = Batched(factors)
    qwenlora.reset_loras(layers)
    actions: dict[str, Callable[[], list[Tensor]]] = {
        "layers alone": lambda: inputs.run(layers),
        "batched": lambda: batched.run(layers, inputs),
        "batched, by index": lambda: batched.run(layers, inputs, gather=True),
        "shipped, without hooks": lambda: without_hooks(layers, inputs, factors),
    }
    found = {name: milliseconds(action, repeat, device) for name, action in actions.items()}
    expected = batched.run(layers, inputs)
    handles = [layer.register_forward_hook(_add_delta) for layer in layers.modulations]
    found["batched, by hooks"] = milliseconds(
        lambda: batched.hooked(layers, inputs), repeat, device
    )
    for handle in handles:
        handle.remove()
    for layer in layers.modulations:
        del layer._buffers["delta"]
    compose(layers, factors)
    found["shipped"] = milliseconds(lambda: inputs.run(layers), repeat, device)
    outputs = inputs.run(layers)
    errors = [
        float((a - b).float().norm() / b.float().norm())
        for a, b in zip(outputs, expected, strict=True)
    ]
    assert max(errors) < 0.02, f"the batched form computes something else: {max(errors)}"
    return {"rank": rank, "rows": rows, "milliseconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--blocks", type=int, default=60 if device == "cuda" else 2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode(), torch.device(device):
        layers = Layers(args.blocks)
        results = [
            measure(layers, rank, rows, args.repeat, device)
            for rank in args.ranks
            for rows in args.rows
        ]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{2 * args.blocks + len(PLAIN)} side branches per forward, {name}, bfloat16")
    for result in results:
        print(f"rank {result['rank']}, rows {result['rows']}")
        for action, time_ in result["milliseconds"].items():
            alone = f"  kernels alone {time_['gpu']:.2f} ms" if "gpu" in time_ else ""
            spread = f"spread {time_['spread']:.2f} ms"
            print(f"  {action:24}{time_['median']:8.2f} ms  {spread}{alone}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
