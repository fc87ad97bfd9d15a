"""What a model's slots hold, unpacked by the element formulas alone, in float64.

Nothing here is the engine's: packed positions are those of the formulas of one element in
`qwenlora._reference`, and branches are read from the buffers that their layers carry.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import torch

from qwenlora import _reference
from qwenlora.packing.layout import LowRankSide

KRON = re.compile(r"qwenlora_(\d+)_w1")
DENSE = re.compile(r"qwenlora_(\d+)_values")


@functools.cache
def positions(ranks: int, channels: int, side: LowRankSide) -> torch.Tensor:
    """(ranks, channels): where a packed matrix holds each element."""
    # The formula of one element, of all at once.
    rank, channel = torch.arange(ranks).unsqueeze(1), torch.arange(channels)
    return _reference.lowrank_position(rank, channel, ranks, side)


def unpacked(packed: torch.Tensor, side: LowRankSide) -> torch.Tensor:
    """A packed (C, R) as (R, C) float64."""
    channels, ranks = packed.shape
    return packed.detach().double().reshape(-1)[positions(ranks, channels, side)]


@functools.cache
def vector_positions(channels: int) -> torch.Tensor:
    """Where a packed bias holds each channel."""
    return torch.tensor([_reference.vector_position(channel) for channel in range(channels)])


@functools.cache
def modulation_positions(channels: int) -> torch.Tensor:
    """Where an interleaved layer holds each row of a file."""
    rows = torch.arange(channels, dtype=torch.float64).unsqueeze(1)
    return torch.argsort(_reference.interleave_modulation(rows).flatten())


def packed_pair(module: torch.nn.Module, base_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks (R, in), (R, out) that a packed layer holds beyond its base."""
    down = unpacked(module.proj_down, LowRankSide.DOWN)
    up = unpacked(module.proj_up, LowRankSide.UP)
    return down[base_rank:], up[base_rank:]


def kept(model: torch.nn.Module, path: str, base_rank: int) -> torch.Tensor:
    """The (out, in) delta that a slot holds, rows as in files."""
    module = model.get_submodule(path)
    delta = torch.zeros(sizes(module), dtype=torch.float64)
    if hasattr(module, "proj_down"):
        down, up = packed_pair(module, base_rank)
        delta += up.mT @ down
    buffers = {name: buffer.double() for name, buffer in module.named_buffers(recurse=False)}
    beside = torch.zeros_like(delta)
    if "qwenlora_down" in buffers:
        beside += buffers["qwenlora_up"] @ buffers["qwenlora_down"]
    if is_modulation(path):
        beside = beside[modulation_positions(len(beside))]
    for name in buffers:
        found = DENSE.fullmatch(name) or KRON.fullmatch(name)
        if found:
            part = f"qwenlora_{found[1]}_"
            first = module._qwenlora_branch.parts[int(found[1])].row_begin
            if name.endswith("w1"):
                product = torch.kron(buffers[name], buffers[f"{part}w2"])
            else:
                product = buffers[name] * buffers[f"{part}unscale"]
            beside[first : first + len(product)] += product
    return delta + beside


def part_counts(module: torch.nn.Module, *, with_zeros: bool) -> Counter[str]:
    """How many dense deltas and Kronecker products a layer holds, perhaps those that are zero."""
    counts: Counter[str] = Counter()
    for name, buffer in module.named_buffers(recurse=False):
        for what, pattern in (("dense", DENSE), ("krons", KRON)):
            found = pattern.fullmatch(name)
            if found and (with_zeros or bool(buffer.any())):
                counts[what] += 1
    return counts


def bias(model: torch.nn.Module, path: str) -> torch.Tensor:
    """A layer's bias (out,), rows as in files."""
    module = model.get_submodule(path)
    stored = module.bias.detach().double()
    if hasattr(module, "proj_down"):
        return stored[vector_positions(len(stored))]
    if is_modulation(path):
        return stored[modulation_positions(len(stored))]
    return stored


def is_modulation(path: str) -> bool:
    """Whether a layer's rows are interleaved."""
    return path.endswith(("img_mod.1", "txt_mod.1"))


def number_of(path: str) -> int | None:
    """The number of a layer's block."""
    found = re.match(r"transformer_blocks\.(\d+)\.", path)
    return None if found is None else int(found[1])


def kinds_of(path: str) -> set[str]:
    """The kinds of layer that one is of, by its name."""
    kinds = {kind for kind in ("attn", "mlp", "mod") if re.search(rf"[._]{kind}\.", path)}
    kinds |= {"rest"} if number_of(path) is None else set()
    if re.search(r"txt_|\.add_|to_add_out|norm_added", path):
        return kinds | {"txt"}
    return kinds if path.startswith("time_text_embed") else kinds | {"img"}


def sizes(module: torch.nn.Module) -> tuple[int, int]:
    """(out, in) of a layer."""
    return module.out_features, module.in_features
