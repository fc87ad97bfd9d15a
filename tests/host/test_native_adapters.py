"""What ComfyUI itself makes of every kind of adapter, against what ours does in the model."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import LoraSpec
from qwenlora.merge import known
from qwenlora.merge.job import merge_loras
from qwenlora.merge.plan import MergeOptions
from qwenlora.slots.find import find_targets

from ..test_adapters import BLOCK, CLOSE, SIZES, error, measured

STRENGTH = -0.7
TARGETS = [f"{BLOCK}.attn.to_q", f"{BLOCK}.img_mod.1", f"{BLOCK}.txt_mlp.net.2", "proj_out"]


def _factors(out: int, columns: int, split: int, ranks) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    sides = {"lokr_w1": (split, split), "lokr_w2": (out // split, columns // split)}
    for (name, shape), rank in zip(sides.items(), ranks, strict=True):
        if rank is None:
            shapes[name] = shape
        else:
            shapes |= {f"{name}_a": (shape[0], rank), f"{name}_b": (rank, shape[1])}
    return shapes


def _shapes(kind: str, out: int, columns: int) -> dict[str, tuple[int, ...]]:
    kinds = {
        "lora": {"lora_down.weight": (4, columns), "lora_up.weight": (out, 4)},
        "lora with mid": {
            "lora_down.weight": (4, columns, 1, 1),
            "lora_mid.weight": (4, 4, 1, 1),
            "lora_up.weight": (out, 4, 1, 1),
        },
        "loha": {
            **{f"hada_w{n}_a": (out, 3) for n in "12"},
            **{f"hada_w{n}_b": (3, columns) for n in "12"},
        },
        "lokr, whole": _factors(out, columns, 4, (None, None)),
        "lokr, w2 in halves": _factors(out, columns, 4, (None, 3)),
        "lokr, both in halves": _factors(out, columns, 4, (2, 3)),
        "lokr, w1 in halves": _factors(out, columns, 4, (2, None)),
    }
    return kinds[kind]


KINDS = [
    *("lora", "lora with mid", "loha", "lokr, whole"),
    *("lokr, w2 in halves", "lokr, both in halves", "lokr, w1 in halves"),
]


def native_delta(tensors, target: str) -> torch.Tensor:
    """The dense (out, in) delta that ComfyUI adds to a weight of zeros."""
    lora = importlib.import_module("comfy.lora")
    columns, out = SIZES[target]
    key = f"diffusion_model.{target}.weight"
    loaded = lora.load_lora(dict(tensors), {f"diffusion_model.{target}": key}, log_missing=False)
    patches = [(STRENGTH, loaded[key], 1.0, None, None)]
    return lora.calculate_weight(patches, torch.zeros(out, columns), key).double()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_the_host_s_own_merge_gives_the_same_delta(kind, target, alpha, make_model, probe):
    generator = torch.Generator().manual_seed(3)
    columns, out = SIZES[target]
    stem = f"diffusion_model.{target}"
    tensors = {
        f"{stem}.{role}": 0.3 * torch.randn(shape, generator=generator)
        for role, shape in _shapes(kind, out, columns).items()
    }
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    base = make_model()
    model = copy.deepcopy(base)
    qwenlora.compose_loras(model, (tensors, STRENGTH), strict=True)
    assert error(measured(model, base, target, probe), native_delta(tensors, target)) < CLOSE


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_reads_a_merged_file_as_its_sources(kind, target, make_model, tmp_path):
    """What ComfyUI makes of the sum is the sum of what it makes of the parts."""
    real = known.known_slots("qwen-image")
    targets = find_targets(make_model(), {})
    slots = {p: known.KnownSlot(t.row, real[p].parts) for p, t in targets.items()}
    generator = torch.Generator().manual_seed(4)
    columns, out = SIZES[target]
    stem = f"diffusion_model.{target}"
    sources = []
    for shapes in (_shapes(kind, out, columns), _shapes("lora", out, columns)):
        path = tmp_path / f"{len(sources)}.safetensors"
        tensors = {
            f"{stem}.{role}": 0.3 * torch.randn(shape, generator=generator)
            for role, shape in shapes.items()
        }
        save_file(tensors | {f"{stem}.alpha": torch.tensor(2.0)}, path)
        sources.append(LoraSpec(path, 0.5 - len(sources)))
    merge_loras(sources, tmp_path / "merged.safetensors", MergeOptions(), known=slots)
    expected = sum(
        spec.strength / STRENGTH * native_delta(load_file(spec.source), target) for spec in sources
    )
    found = native_delta(load_file(tmp_path / "merged.safetensors"), target) / STRENGTH
    assert error(found, expected) < 1e-5


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("strength", [0.5, 1e-4])
def test_the_host_reads_small_values_of_a_merged_file(strength, tmp_path):
    """In float16 the power of two that keeps them is in alpha."""
    generator = torch.Generator().manual_seed(5)
    stem = "diffusion_model.proj_out"
    halves = {"lora_down": 0.02 * torch.randn(8, 3072, generator=generator)}
    halves["lora_up"] = 1e-4 * torch.randn(64, 8, generator=generator)
    source = {f"{stem}.{name}.weight": half.half() for name, half in halves.items()}
    save_file(source | {f"{stem}.alpha": torch.tensor(1.0)}, tmp_path / "source.safetensors")
    spec = LoraSpec(tmp_path / "source.safetensors", strength)
    merge_loras([spec], tmp_path / "merged.safetensors", MergeOptions())
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged[f"{stem}.lora_up.weight"].dtype == torch.float16
    up, down = (source[f"{stem}.{name}.weight"].double() for name in ("lora_up", "lora_down"))
    comfy_lora = importlib.import_module("comfy.lora")
    key = f"{stem}.weight"
    loaded = comfy_lora.load_lora(merged, {stem: key}, log_missing=False)
    patches = [(1.0, loaded[key], 1.0, None, None)]
    found = comfy_lora.calculate_weight(patches, torch.zeros(64, 3072), key).double()
    assert error(found, strength / 8 * up @ down) < 4e-4


@pytest.mark.usefixtures("host")
def test_the_host_reads_the_values_of_a_merged_file(tmp_path):
    comfy_lora = importlib.import_module("comfy.lora")
    norm, linear = f"{BLOCK}.attn.norm_q", "proj_out"
    source = {
        f"lycoris_{norm.replace('.', '_')}.w_norm": torch.randn(128),
        f"lycoris_{linear}.diff_b": torch.randn(64),
        f"lycoris_{linear}.lora_down.weight": torch.randn(4, 3072),
        f"lycoris_{linear}.lora_up.weight": torch.randn(64, 4),
    }
    save_file(source, tmp_path / "source.safetensors")
    spec = LoraSpec(tmp_path / "source.safetensors", 0.5)
    merge_loras([spec], tmp_path / "merged.safetensors", MergeOptions(diffs=True))
    keys = {f"diffusion_model.{path}": f"diffusion_model.{path}.weight" for path in (norm, linear)}
    merged = load_file(tmp_path / "merged.safetensors")
    loaded = comfy_lora.load_lora(dict(merged), keys, log_missing=False)
    for path, values in (
        (f"diffusion_model.{norm}.weight", source[f"lycoris_{norm.replace('.', '_')}.w_norm"]),
        (f"diffusion_model.{linear}.bias", source[f"lycoris_{linear}.diff_b"]),
    ):
        patches = [(1.0, loaded[path], 1.0, None, None)]
        found = comfy_lora.calculate_weight(patches, torch.zeros_like(values), path)
        assert torch.equal(found, 0.5 * values)
