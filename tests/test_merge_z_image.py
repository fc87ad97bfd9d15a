"""`qwenlora merge` of Z-Image files, against dense float64 deltas and diffusers' own reader.

The known model is swapped for a tiny one of diffusers, so that dense math is quick.
"""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.loaders import ZImageLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import LoraSpec, _reference, errors
from qwenlora.merge.job import merge_loras
from qwenlora.merge.known import KnownSlot, known_slots
from qwenlora.merge.plan import MergeOptions

from . import test_formats as corpus
from .test_merge import FLOAT32, PREFIX, deltas_of, error
from .test_oracles import (
    _no_gradients,  # noqa: F401
    oracle_deltas,
    trained_by_diffusers,
)

WIDTH, HIDDEN = 96, 256
TINY = {
    "in_channels": 4,
    "dim": WIDTH,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 32,
    "axes_dims": [8, 12, 12],
    "axes_lens": [16, 16, 16],
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
TARGETS += [f"{block}.adaLN_modulation.0" for block in ("layers.0", "layers.1", "noise_refiner.0")]
TARGETS += [
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "t_embedder.mlp.0",
    "cap_embedder.1",
]
LORAS = [
    name
    for name, document in corpus.DOCUMENTS.items()
    if document["model"] == "z-image" and document["adapter"] in ("lora", "mixed")
]


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return ZImageTransformer2DModel(**TINY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def slots(dense):
    """The slots of the tiny model, by path."""
    shapes = {
        name: module.weight.shape for name, module in dense.named_modules() if _weighs(module)
    }
    found = {}
    for path, slot in known_slots("z-image").items():
        if all(part in shapes for part in slot.parts):
            rows = sum(shapes[part][0] for part in slot.parts)
            columns = shapes[slot.parts[0]][1] if len(shapes[slot.parts[0]]) > 1 else 1
            row = slot.row._replace(out_features=rows, in_features=columns)
            found[path] = KnownSlot(row, slot.parts)
    assert sum(len(slot.parts) for slot in found.values()) == len(shapes)
    return found


def _weighs(module):
    return getattr(module, "weight", None) is not None


@pytest.fixture
def merged(slots, tmp_path):
    """Merges tensors or paths at strengths, and factors by block; the report and the path."""
    made = iter(range(100))

    def merge(*stack, **options):
        specs = []
        for source, strength, *blocks in stack:
            if isinstance(source, dict):
                path = tmp_path / f"source-{next(made)}.safetensors"
                save_file({key: t.contiguous().clone() for key, t in source.items()}, path)
                source = path
            specs.append(LoraSpec(source, strength, blocks=next(iter(blocks), None)))
        path = tmp_path / f"merged-{next(made)}.safetensors"
        options = {"dtype": torch.float32, **options}
        return merge_loras(specs, path, MergeOptions(**options), known=slots), path

    return merge


def random(*shape, seed=0):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved_by_pipeline(dense, folder, **config):
    """A file as diffusers saves it, and the deltas that PEFT makes of it."""
    model = trained_by_diffusers(dense, targets=TARGETS, **config)
    ZImageLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        **_collate_lora_metadata({"transformer": model}),
    )
    return folder / "pytorch_lora_weights.safetensors", oracle_deltas(model)


def read_by_pipeline(dense, path):
    """The deltas that diffusers makes of a file."""
    model = copy.deepcopy(dense)
    state, metadata = ZImageLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    ZImageLoraLoaderMixin.load_lora_into_transformer(
        state, model, adapter_name="default", metadata=metadata
    )
    return oracle_deltas(model)


def converted_for_comfyui():
    """One layer as musubi-tuner's converter writes it, and its deltas: q, k, v in one pair."""
    down = {name: random(4, WIDTH, seed=n) for n, name in enumerate("qkv")}
    up = {name: random(WIDTH, 4, seed=n + 3) for n, name in enumerate("qkv")}
    stem, out = "lora_unet_layers_0_attention_qkv", "lora_unet_layers_0_attention_out"
    tensors = {
        f"{stem}.lora_down.weight": torch.cat(list(down.values())),
        f"{stem}.lora_up.weight": torch.block_diag(*up.values()),
        f"{stem}.alpha": torch.tensor(6.0),
        f"{out}.lora_down.weight": random(4, WIDTH, seed=8),
        f"{out}.lora_up.weight": random(WIDTH, 4, seed=9),
        f"{out}.alpha": torch.tensor(2.0),
    }
    deltas = {
        f"layers.0.attention.to_{name}": 0.5 * up[name].double() @ down[name].double()
        for name in "qkv"
    }
    halves = (tensors[f"{out}.lora_{half}.weight"].double() for half in ("up", "down"))
    up_out, down_out = halves
    return tensors, deltas | {"layers.0.attention.to_out.0": 0.5 * up_out @ down_out}


def fused_mlp():
    """A pair on the fused projection of an MLP, and its deltas: first the value's rows."""
    stem = "transformer.layers.1.feed_forward.net.0.proj"
    down, up = random(3, WIDTH, seed=5), random(2 * HIDDEN, 3, seed=6)
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    value, gate = up.double().split(HIDDEN)
    deltas = {"w3": value @ down.double(), "w1": gate @ down.double()}
    return tensors, {f"layers.1.feed_forward.{name}": delta for name, delta in deltas.items()}


@pytest.fixture
def three_sources(dense, tmp_path):
    """Sources of three spellings with their strengths, and the sum of their deltas."""
    patterns = {"rank_pattern": {"to_k": 3, "w2": 12}, "alpha_pattern": {"w1": 5}}
    sources = [saved_by_pipeline(dense, tmp_path / "diffusers", **patterns)]
    sources += [converted_for_comfyui(), fused_mlp()]
    strengths, total = (0.8, -0.5, 0.3), {}
    for (_, deltas), strength in zip(sources, strengths, strict=True):
        for name, delta in deltas.items():
            total[name] = total.get(name, 0) + strength * delta
    return [(source, s) for (source, _), s in zip(sources, strengths, strict=True)], total


def assert_deltas(found, expected):
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name]) for name in expected) < FLOAT32


def test_a_merge_of_all_spellings_is_the_sum(merged, three_sources):
    stack, expected = three_sources
    report, path = merged(*stack)
    assert report.complete
    assert_deltas(deltas_of(path), expected)
    assert all(key.startswith(PREFIX) for key in load_file(path))


def test_diffusers_reads_it_alike(dense, merged, three_sources):
    stack, expected = three_sources
    assert_deltas(read_by_pipeline(dense, merged(*stack)[1]), expected)


def test_a_merged_file_merged_again_keeps_its_bits(merged, three_sources):
    _, path = merged(*three_sources[0])
    _, again = merged((path, 1.0))
    first, second = load_file(path), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_factors_by_block_and_kind_are_in_the_sum(dense, merged, tmp_path):
    path, deltas = saved_by_pipeline(dense, tmp_path / "diffusers")
    report, result = merged((path, 0.7, "0:0.5, 1:0; mlp:-2, mod:3, txt:0.1, rest:4"))
    found = deltas_of(result)
    assert found.keys() == {name for name in deltas if not name.startswith("layers.1.")}
    for name, delta in found.items():
        factor = 0.5 if name.startswith("layers.0.") else 4.0
        factor *= -2 if ".feed_forward." in name else 1
        factor *= 3 if ".adaLN_modulation." in name and "final" not in name else 1
        factor *= 0.1 if name.startswith(("context_refiner", "cap_embedder")) else 1
        assert error(delta, 0.7 * factor * deltas[name]) < FLOAT32, name
    assert report.complete


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("attention.qkv", ["attention.to_q", "attention.to_k", "attention.to_v"]),
        ("feed_forward.net.0.proj", ["feed_forward.w3", "feed_forward.w1"]),
    ],
)
def test_a_lokr_of_a_fused_linear_is_cut_into_its_parts(name, parts, merged, dense):
    """Its parts begin inside blocks of rows that one row of the first factor makes."""
    sides = [dense.get_submodule(f"layers.0.{part}").weight.shape[0] for part in parts]
    w1, w2 = random(16, 4, seed=1), random(sum(sides) // 16, WIDTH // 4, seed=2)
    stem = f"diffusion_model.layers.0.{name}"
    report, path = merged(({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}, 0.5))
    rows = torch.kron(w1.double(), w2.double()).split(sides)
    expected = {f"layers.0.{part}": 0.5 * own for part, own in zip(parts, rows, strict=True)}
    assert_deltas(deltas_of(path), expected)
    assert report.loras[0].modules_applied == 1


def test_values_are_written_under_the_names_of_diffusers(merged):
    tensors = {
        "diffusion_model.layers.0.attention.q_norm.diff": random(32, seed=1),
        "diffusion_model.layers.1.ffn_norm2.diff": random(WIDTH, seed=2),
        "diffusion_model.layers.0.adaLN_modulation.0.diff_b": random(4 * WIDTH, seed=3),
        "diffusion_model.final_layer.linear.diff_b": random(16, seed=4),
        "diffusion_model.cap_embedder.0.diff": random(32, seed=5),
        "diffusion_model.norm_final.diff": random(WIDTH, seed=6),
    }
    report, path = merged((tensors, 0.5), diffs=True)
    names = ["layers.0.attention.norm_q.diff", "layers.1.ffn_norm2.diff"]
    names += ["layers.0.adaLN_modulation.0.diff_b", "all_final_layer.2-1.linear.diff_b"]
    names += ["cap_embedder.0.diff"]
    found = load_file(path)
    assert set(report.values) == set(names)
    # Nothing ever calls the norm that is left out.
    assert report.complete
    for name, values in zip(names, tensors.values(), strict=False):
        assert torch.equal(found[PREFIX + name], 0.5 * values), name


# ---- the corpus ----


def in_tiny(text):
    """Rename block 29 of a key, a target or a pattern to 1."""
    return re.sub(r"(layers[._])29(?=[._])", r"\g<1>1", text)


def is_in_tiny(row):
    """The tiny model has one block of each refiner."""
    return re.search(r"_refiner[._]1[._]", row["key"]) is None


def tiny_shape(dense, row, target):
    """A tensor's shape at the sizes of the tiny model; ranks stay."""
    if not row["shape"]:
        return []
    parts = [in_tiny(part) for part in row.get("split", [])] or [target]
    weights = [dense.get_submodule(part).weight for part in parts]
    out, *columns = sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]
    shapes = {
        "down": [*row["shape"][:1], *columns],
        "up": [out, *row["shape"][1:]],
        "diff": [out, *columns],
        "diff_b": [out],
    }
    return shapes.get(row["role"], row["shape"])


def tiny_file(dense, name):
    """A corpus file at the sizes of the tiny model: tensors, metadata, deltas, ignored keys."""
    document, generator = corpus.DOCUMENTS[name], torch.Generator().manual_seed(0)
    tensors, halves, ignored = {}, {}, set()
    for row in filter(is_in_tiny, document["tensors"]):
        key, target = in_tiny(row["key"]), row["target"] and in_tiny(row["target"])
        if row["role"] == "ignored":
            ignored.add(key)
        shape = tiny_shape(dense, row, target) if target else row["shape"]
        tensors[key] = corpus.tensor_of(row | {"shape": shape, "target": None}, generator)
        if (other := re.fullmatch("the same tensor as `(.*)`", row.get("reason", ""))) is not None:
            tensors[key] = tensors[in_tiny(other[1])]
        if row["role"] in ("down", "up"):
            parts = [in_tiny(part) for part in row.get("split", [])] or [target]
            halves.setdefault(target, {"parts": parts})[row["role"]] = tensors[key].double()
    scales = {in_tiny(row["target"]): row["scale"] for row in document["expected_modules"]}
    deltas = {}
    for target, half in halves.items():
        whole = _reference.lora_delta(half["down"], half["up"], scales[target])
        parts = half["parts"]
        deltas |= dict(zip(parts, whole.chunk(len(parts)), strict=True))
    metadata = {key: in_tiny(value) for key, value in document["metadata"].items()}
    return tensors, metadata, deltas, ignored


@pytest.mark.parametrize("name", LORAS)
def test_corpus_file_merges_to_the_reference(name, dense, merged, tmp_path):
    tensors, metadata, deltas, ignored = tiny_file(dense, name)
    own = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(own, tmp_path / "lora.safetensors", metadata=metadata or None)
    report, path = merged((tmp_path / "lora.safetensors", 0.7), diffs=True)
    assert deltas
    assert_deltas(deltas_of(path), {name: 0.7 * delta for name, delta in deltas.items()})
    assert {skip.name for skip in report.loras[0].skipped if not skip.matters} == ignored
    assert report.complete


# ---- the real model ----


def small_lora(path, module, sides, seed=0):
    """A LoRA of real size."""
    out, columns = sides
    tensors = {
        f"{module}.lora_A.weight": random(4, columns, seed=seed),
        f"{module}.lora_B.weight": random(out, 4, seed=seed + 1),
    }
    save_file(tensors, path)
    return path


def test_a_file_of_the_real_model_is_merged_on_its_own_table(tmp_path):
    first = small_lora(tmp_path / "a.safetensors", "t_embedder.mlp.0", (1024, 256))
    second = small_lora(tmp_path / "b.safetensors", "x_embedder", (3840, 64), seed=2)
    output = tmp_path / "o.safetensors"
    report = merge_loras(
        [LoraSpec(first), LoraSpec(second, blocks="30-40:0")], output, MergeOptions()
    )
    names = {"t_embedder.mlp.0", "all_x_embedder.2-1"}
    assert {module.path for module in report.modules} == names
    assert report.loras[1].blocks_note.endswith("names 30-40, but the model has the blocks 0 to 29")
    document = qwenlora.read_keys(output)
    assert (document["model"], document["verdict"]) == ("z-image", "apply")
    with safe_open(output, "pt") as file:
        assert json.loads(file.metadata()["qwenlora.merge"])["modules"] == 2


def test_files_of_two_models_are_refused_by_name(tmp_path):
    own = small_lora(tmp_path / "own.safetensors", "x_embedder", (3840, 64))
    other = small_lora(tmp_path / "other.safetensors", "img_in", (3072, 64))
    output = tmp_path / "o.safetensors"
    words = "`other` is a LoRA for `qwen-image`, but `own` is one for `z-image`\nhint: "
    with pytest.raises(errors.OtherModelError, match=words):
        merge_loras([LoraSpec(own), LoraSpec(other, -1.0)], output, MergeOptions())
    assert not output.exists()
    # What is off is not looked at.
    merge_loras([LoraSpec(own), LoraSpec(other, 0.0)], output, MergeOptions())


def test_the_table_is_that_of_the_model():
    slots = known_slots("z-image")
    assert sum(len(slot.parts) for slot in slots.values()) == 34 * 13 + 32 + 7
    assert slots["layers.29.feed_forward.net.0.proj"].rows == {
        "layers.29.feed_forward.w3": (0, 10240),
        "layers.29.feed_forward.w1": (10240, 20480),
    }
