"""The key corpus through real bytes and a real composition.

Each plain LoRA of the corpus becomes a miniature: the same keys, dtypes, alphas and metadata, every
axis at the size that a tiny model has in its place, blocks 0 and 59 as 0 and 1. What a composition
leaves in each slot is compared with the reference formula in float64.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qwenlora
from qwenlora import _reference
from qwenlora.emulation import EmulatedConfig, Precision, random_transformer
from qwenlora.packing.layout import LowRankSide
from qwenlora.packing.pack import deinterleave_modulation, unpack_lowrank

CORPUS = Path(__file__).parent / "data" / "keys"
DOCUMENTS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(CORPUS.glob("*.json"))
}
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}
TINY = {
    "num_layers": 2,
    "heads": 4,
    "head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "joint_attention_dim": 48,
    "in_channels": 16,
    "out_channels": 4,
    "rank": 32,
    "precision": Precision.EXACT,
    "dtype": torch.float32,
}
TINY_SIZES = {64: 16, 3072: 128, 3584: 48, 6144: 256, 9216: 384, 12288: 512, 18432: 768}
"""Sizes of the real model and of `TINY`; ranks and the time embedding's 256 stay as they are."""
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
REFUSED_ROLES = ("reshape", "set_weight")
"""Roles that no kind of delta is made of."""

DELTA_BOUND = 1e-6
"""Relative error of a slot's dense delta in float32, whatever the file's dtype: its values are
exact in float32, so one rounding of the factor and one of each product remain; measured: 3.7e-8."""


def names(adapter):
    return [
        name
        for name, document in DOCUMENTS.items()
        if document["adapter"] == adapter and document["model"] == "qwen-image"
    ]


# Nunchaku's own packed pairs are another layout, see the end.
PLAIN = [name for name in names("lora") if name != "nunchaku_packed_lowrank"]
MIXED = names("mixed")
METADATA_ONLY = ["diffusers_peft_attn4", "diffusers_peft_lora_bias", "diffusers_peft_patterns"]
METADATA_ONLY += ["diffusers_peft_rslora", "simpletuner_peft"]
"""Files whose scale is in the metadata alone, which a state dict does not have."""
STRENGTH = 0.7


@dataclass(frozen=True)
class Miniature:
    """A corpus file at tiny sizes, with what a reader should make of it."""

    tensors: dict
    metadata: dict
    deltas: dict
    ignored: list
    refused: list

    def save(self, path):
        save_file(self.tensors, path, metadata=self.metadata or None)
        return path


def first_two_blocks(text):
    """Rename block 59 of a key, a target or a pattern to 1."""
    return re.sub(r"(blocks[._])59(?=[._])", r"\g<1>1", text)


def is_listed(tensor):
    """The files of all 60 blocks are cut down to the blocks that the others list."""
    block = re.search(r"transformer[._]blocks[._](\d+)", tensor["key"])
    return block is None or tensor["target"] is None or int(block[1]) in (0, 59)


def axis_size(size, axis, row):
    """The rank's axis keeps its size: 64 is a rank, too."""
    if ".attn.norm_" in (row["target"] or ""):
        return TINY["head_dim"]
    rank_axis = {"down": 0, "up": 1}.get(row["role"])
    return size if axis == rank_axis else TINY_SIZES.get(size, size)


def tensor_of(row, generator):
    dtype = DTYPES[row["dtype"]]
    shape = [axis_size(size, axis, row) for axis, size in enumerate(row["shape"])]
    if "value" in row:
        return torch.tensor(row["value"]).expand(shape).to(dtype)
    # Through float32: float8 has no random numbers of its own.
    return (0.1 * torch.randn(shape, generator=generator)).to(dtype)


def members_of(path):
    parent, _, last = path.rpartition(".")
    return [f"{parent}.{member}" for member in FUSED.get(last, ())]


def expected_deltas(model, modules):
    """Each slot's dense (out, in) float64 delta from `{target: (down, up, scale)}`."""
    deltas = {}
    for path, (out_features, _) in slot_sizes(model).items():
        members = members_of(path)
        rows = out_features // max(1, len(members))
        parts = [
            _reference.LowRankPart(modules[name][0], modules[name][1], begin, modules[name][2])
            for name, begin in [(path, 0), *((m, i * rows) for i, m in enumerate(members))]
            if name in modules
        ]
        if parts:
            deltas[path] = _reference.fused_delta(parts, out_features)
    return deltas


def slot_sizes(model):
    """(out, in) of every layer that can carry a delta, by path."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if hasattr(module, "out_features")
    }


def miniature(name, model, *, seed=0):
    document = DOCUMENTS[name]
    generator = torch.Generator().manual_seed(seed)
    rows = [row for row in document["tensors"] if is_listed(row)]
    tensors = {first_two_blocks(row["key"]): tensor_of(row, generator) for row in rows}
    scales = {
        first_two_blocks(module["target"]): module["scale"]
        for module in document["expected_modules"]
        # A module of other sizes than the model's (`in_features`: a control LoRA) does not fit.
        if module["adapter"] == "lora" and "in_features" not in module
    }
    halves = {}
    for row in rows:
        if row["role"] in ("down", "up"):
            half = tensors[first_two_blocks(row["key"])].double().flatten(1)
            halves[first_two_blocks(row["target"]), row["role"]] = half
    modules = {
        target: (halves[target, "down"], halves[target, "up"], scale)
        for target, scale in scales.items()
        if (target, "down") in halves
    }
    return Miniature(
        tensors=tensors,
        metadata={key: first_two_blocks(value) for key, value in document["metadata"].items()},
        deltas=expected_deltas(model, modules),
        ignored=[first_two_blocks(row["key"]) for row in rows if row["role"] == "ignored"],
        refused=[
            {first_two_blocks(row["key"]), first_two_blocks(row["target"])}
            for row in rows
            if row["role"] in REFUSED_ROLES
        ],
    )


def delta_of(module, base_rank):
    """The dense (out, in) float64 delta that a layer carries, rows in plane order; None if none."""
    if hasattr(module, "proj_down"):
        down = unpack_lowrank(module.proj_down.detach(), LowRankSide.DOWN)[base_rank:]
        up = unpack_lowrank(module.proj_up.detach(), LowRankSide.UP)[:, base_rank:]
    elif hasattr(module, "qwenlora_down"):
        down, up = module.qwenlora_down, module.qwenlora_up
        if hasattr(module, "wzeros"):
            up = deinterleave_modulation(up)
    else:
        return None
    return up.double() @ down.double() if down.shape[0] else None


def deltas_of(model):
    found = {path: delta_of(model.get_submodule(path), TINY["rank"]) for path in slot_sizes(model)}
    return {path: delta for path, delta in found.items() if delta is not None}


def tensors_of(model):
    """All parameters and buffers, those that are not saved included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def pristine():
    return random_transformer(EmulatedConfig(**TINY), seed=0)


@pytest.fixture
def model(pristine):
    qwenlora.reset_loras(pristine)
    return pristine


def names_ignored(report):
    return {skip.name for lora in report.loras for skip in lora.skipped if not skip.matters}


# ---- every plain LoRA of the corpus ----


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_corpus_file_composes_to_the_reference(model, tmp_path, name):
    small = miniature(name, model)
    path = small.save(tmp_path / "lora.safetensors")
    report = qwenlora.compose_loras(model, (path, STRENGTH), strict=not small.refused)
    actual = deltas_of(model)
    assert small.deltas
    assert actual.keys() == small.deltas.keys()
    for slot, expected in small.deltas.items():
        assert relative_error(actual[slot], STRENGTH * expected) < DELTA_BOUND, slot
    assert report.complete is not bool(small.refused)
    assert names_ignored(report) == set(small.ignored)


@pytest.mark.parametrize("name", MIXED)
def test_lora_beside_other_kinds_is_exact_and_nothing_is_silent(model, tmp_path, name):
    small = miniature(name, model)
    path = small.save(tmp_path / "lora.safetensors")
    report = qwenlora.compose_loras(model, (path, STRENGTH))
    actual = deltas_of(model)
    assert small.deltas
    for slot, expected in small.deltas.items():
        assert relative_error(actual[slot], STRENGTH * expected) < DELTA_BOUND, slot
    # A random matrix is no low-rank one: on a quantized layer it is refused for what it would lose.
    reasons = {skip.kind for lora in report.loras for skip in lora.skipped if skip.matters}
    allowed = qwenlora.ComposeOptions(max_energy_lost=1.0)
    left_out = qwenlora.compose_loras(model, (path, STRENGTH), options=allowed).loras[0].skipped
    kinds = {(skip.name, skip.kind) for skip in left_out if skip.matters}
    assert reasons <= {"energy", *(kind for _, kind in kinds)}
    assert kinds <= {
        ("img_in", "unsupported"),
        ("time_text_embed.addition_t_embedding", "missing"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_state_dict_in_memory_gives_the_file_s_bits(model, tmp_path, name):
    small = miniature(name, model)
    qwenlora.compose_loras(model, (small.save(tmp_path / "lora.safetensors"), STRENGTH))
    by_file = {path: tensor.clone() for path, tensor in tensors_of(model).items()}
    qwenlora.reset_loras(model)
    qwenlora.compose_loras(model, (small.tensors, STRENGTH))
    by_memory = tensors_of(model)
    assert by_memory.keys() == by_file.keys()
    same = all(torch.equal(tensor, by_file[path]) for path, tensor in by_memory.items())
    # Without its metadata such a LoRA is another one: scale 1.
    assert same is (name not in METADATA_ONLY)


def test_packed_pairs_are_appended_as_they_are(model, tmp_path):
    small = miniature("nunchaku_packed_lowrank", model)
    path = small.save(tmp_path / "lora.safetensors")
    assert qwenlora.compose_loras(model, path, strict=True).complete
    modules = {key.rpartition(".lora_")[0] for key in small.tensors}
    found = deltas_of(model)
    assert found.keys() == modules
    for slot, delta in found.items():
        packed = [small.tensors[f"{slot}.lora_{half}"] for half in ("down", "up")]
        down = unpack_lowrank(packed[0].float(), LowRankSide.DOWN)
        up = unpack_lowrank(packed[1].float(), LowRankSide.UP)
        assert relative_error(delta, up.double() @ down.double()) < DELTA_BOUND, slot


# ---- reading keys ----


@pytest.fixture
def real_size_file(tmp_path):
    """A file at the real model's sizes: the programs know no other."""
    document = DOCUMENTS["diffusers_peft_attn4"]
    tensors = {
        row["key"]: torch.zeros(row["shape"], dtype=DTYPES[row["dtype"]])
        for row in document["tensors"]
    }
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata=document["metadata"])
    return path


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_read_keys_says_what_would_be_applied(real_size_file):
    document = qwenlora.read_keys(real_size_file)
    expected = DOCUMENTS["diffusers_peft_attn4"]["expected_modules"]
    assert document["verdict"] == "apply"
    assert {(row["target"], row["rank"], row["scale"]) for row in document["modules"]} == {
        (row["target"], row["rank"], row["scale"]) for row in expected
    }


def test_read_keys_imports_no_torch(real_size_file):
    code = (
        "import json, sys, qwenlora\n"
        "document = qwenlora.read_keys(sys.argv[1])\n"
        "json.dump([document, [m for m in ('torch', 'numpy') if m in sys.modules]], sys.stdout)"
    )
    process = run_python("-c", code, str(real_size_file))
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [qwenlora.read_keys(real_size_file), []]


def test_the_program_prints_what_read_keys_returns(real_size_file):
    if run_python("-m", "qwenlora", "keys", "--help").stdout == "":
        pytest.skip("the program `qwenlora-keys` is not built into this extension")
    process = run_python("-m", "qwenlora", "keys", "--json", str(real_size_file))
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == qwenlora.read_keys(real_size_file)
