"""`qwenlora merge --base`: adapters that need the base weight, merged to plain LoRAs.

What is written is compared with W' - W of the float64 formulas, and with what the source itself
does when it is composed.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import LoraSpec, errors
from qwenlora import _reference as reference
from qwenlora.emulation import Precision
from qwenlora.merge import known
from qwenlora.merge.cut import Cut
from qwenlora.merge.job import merge_loras
from qwenlora.merge.plan import MergeOptions
from qwenlora.slots.find import find_targets
from qwenlora.weight.base_weight import BaseWeight

from .test_adapters import BLOCK
from .test_merge import PREFIX, deltas_of, error

FLOAT32 = 3e-6
"""Relative error of a delta formed in float32; measured: 4.0e-7."""
COMPOSED = 5e-5
"""Of what a file changes in an output of the model, merged against composed; measured: 6.8e-6."""
TO_Q, TO_K = f"{BLOCK}.attn.to_q", f"{BLOCK}.attn.to_k"
FC1, FC2, MOD = f"{BLOCK}.img_mlp.net.0.proj", f"{BLOCK}.img_mlp.net.2", f"{BLOCK}.img_mod.1"
PLACES = [TO_Q, FC1, FC2, MOD, "proj_out"]


def random(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Base:
    """A tiny model, its slots, and the weight (N, K) float64 of each module."""

    model: torch.nn.Module
    slots: dict[str, known.KnownSlot]
    weights: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Base:
        real = known.known_slots("qwen-image")
        targets = find_targets(model, {})
        slots = {p: known.KnownSlot(t.row, real[p].parts) for p, t in targets.items() if p in real}
        weights, biases = {}, {}
        for path, slot in slots.items():
            if slot.row.kind in ("svdq", "awq", "linear"):
                own = BaseWeight.of(targets[path])
                whole, bias = own.rows(0, own.rows_total).double(), own.true_bias()
                for part, (begin, end) in slot.rows.items():
                    weights[part], biases[part] = whole[begin:end], bias[begin:end].double()
        return cls(model, slots, weights, biases)

    def dense(self) -> dict[str, torch.Tensor]:
        """As a 16-bit checkpoint stores it, by diffusers' names, but in float32."""
        return {f"{path}.weight": own.float() for path, own in self.weights.items()} | {
            f"{path}.bias": own.float() for path, own in self.trained_biases().items()
        }

    def trained_biases(self) -> dict[str, torch.Tensor]:
        """Nunchaku adds the 1 of 1 + scale to the biases of modulations."""
        biases = {path: own.clone() for path, own in self.biases.items()}
        for path, own in biases.items():
            if path.endswith("_mod.1"):
                own.view(6, -1)[[1, 4]] -= 1
        return biases


@pytest.fixture
def base(make_model):
    return Base.of(make_model(num_layers=1))


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As Nunchaku's file stores it."""
    return {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}


@pytest.fixture
def merged(tmp_path):
    """Merges sources at strengths onto a checkpoint; the report and the path."""
    made = iter(range(100))

    def merge(slots, *stack, base=None, cut=None, **options):
        specs = []
        for tensors, strength in stack:
            path = tmp_path / f"source-{next(made)}.safetensors"
            save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path)
            specs.append(LoraSpec(path, strength))
        if isinstance(base, dict):
            own = tmp_path / f"base-{next(made)}.safetensors"
            save_file(base, own)
            base = own
        path = tmp_path / f"merged-{next(made)}.safetensors"
        options = {"dtype": torch.float32, **options}
        settings = MergeOptions(cut=cut, base=base, **options)
        return merge_loras(specs, path, settings, known=slots), path

    return merge


# ---- the kinds, and what they make of a weight ----


def pair(target, rows, columns, *, rank=4, seed=1):
    down, up = random(rank, columns, seed=seed, size=0.1), random(rows, rank, seed=seed + 1)
    up = 0.1 * up
    alpha = torch.tensor(2.0)
    tensors = {
        f"{target}.lora_down.weight": down,
        f"{target}.lora_up.weight": up,
        f"{target}.alpha": alpha,
    }
    return tensors, 2.0 / rank * (up.double() @ down.double())


def dora(target, weight, *, axis):
    tensors, delta = pair(target, *weight.shape)
    adapted = (weight + delta).norm(dim=1 - axis, keepdim=True)
    shape = adapted.shape
    magnitude = (adapted * (1 + 0.05 * random(*shape, seed=3).double())).float()
    tensors[f"{target}.dora_scale"] = magnitude
    return tensors, reference.dora_weight(weight, delta, magnitude.double())


def dora_of_lokr(target, weight):
    rows, columns = weight.shape
    w1, w2 = random(4, 4, seed=4, size=0.2), random(rows // 4, columns // 4, seed=5, size=0.05)
    delta = torch.kron(w1.double(), w2.double())
    magnitude = ((weight + delta).norm(dim=1, keepdim=True) * 1.03).float()
    tensors = {
        f"{target}.lokr_w1": w1,
        f"{target}.lokr_w2": w2,
        f"{target}.alpha": torch.tensor(1.0),
        f"{target}.dora_scale": magnitude,
    }
    return tensors, reference.dora_weight(weight, delta, magnitude.double())


def ia3(target, weight, *, on_input):
    learned = random(weight.shape[1 if on_input else 0], seed=6, size=0.1)
    shape = (1, -1) if on_input else (-1, 1)
    tensors = {
        f"{target}.weight": learned.view(shape),
        f"{target}.on_input": torch.tensor(on_input),
    }
    return tensors, weight * (1 + learned.double()).view(shape)


def glora(target, weight):
    rows, columns = weight.shape
    shapes = {"a1": (columns, 4), "a2": (4, columns), "b1": (rows, 4), "b2": (4, columns)}
    own = {n: random(*s, seed=at, size=0.1) for at, (n, s) in enumerate(shapes.items(), 7)}
    tensors = {f"{target}.{name}.weight": tensor for name, tensor in own.items()}
    tensors[f"{target}.alpha"] = torch.tensor(4.0)
    a1, a2, b1, b2 = (own[name].double() for name in shapes)
    return tensors, weight + b1 @ b2 + weight @ a1 @ a2


def hra(target, weight):
    directions = random(weight.shape[1], 4, seed=11)
    tensors = {f"base_model.model.{target}.hra_u": directions}
    return tensors, reference.hra_weight(weight, directions.double())


def turned(blocks):
    skews = reference.constrained_skews(blocks, 0.0).flatten(0, -3)
    return torch.stack([reference.cayley(skew) for skew in skews]).view(blocks.shape)


def diag_oft(target, weight, *, rescaled=False):
    blocks = random(weight.shape[0] // 8, 8, 8, seed=12, size=0.1)
    tensors = {f"{target}.oft_blocks": blocks, f"{target}.alpha": torch.tensor(0.0)}
    rescale = None
    if rescaled:
        rescale = 1 + random(weight.shape[0], 1, seed=13, size=0.05)
        tensors[f"{target}.rescale"] = rescale
    return tensors, reference.diag_oft_weight(weight, turned(blocks), rescale)


def boft(target, weight):
    blocks = random(2, weight.shape[0] // 8, 8, 8, seed=14, size=0.1)
    tensors = {f"{target}.oft_blocks": blocks, f"{target}.alpha": torch.tensor(0.0)}
    return tensors, reference.boft_weight(weight, turned(blocks))


def input_oft(target, weight):
    size = 8
    triangles = random(weight.shape[1] // size, size * (size - 1) // 2, seed=15, size=0.05)
    tensors = {f"base_model.model.{target}.oft_R.weight": triangles}
    skews = torch.stack([reference.skew_of_triangle(row, size) for row in triangles.double()])
    turns = torch.stack([reference.cayley_series(skew) for skew in skews])
    return tensors, reference.input_oft_weight(weight, turns)


def peft_boft(target, weight):
    blocks = random(1, weight.shape[1] // 8, 8, 8, seed=16, size=0.1)
    scale = 1 + random(weight.shape[0], 1, seed=17, size=0.05)
    tensors = {
        f"base_model.model.{target}.boft_R": blocks,
        f"base_model.model.{target}.boft_s": scale,
    }
    turns = torch.stack([reference.cayley(own) for own in (blocks[0].mT - blocks[0]).double() / 2])
    return tensors, scale.double() * reference.input_oft_weight(weight, turns)


KINDS = {
    "DoRA of rows": lambda t, w: dora(t, w, axis=0),
    "DoRA of columns": lambda t, w: dora(t, w, axis=1),
    "DoRA of a LoKr": dora_of_lokr,
    "IA3 of rows": lambda t, w: ia3(t, w, on_input=False),
    "IA3 of columns": lambda t, w: ia3(t, w, on_input=True),
    "GLoRA": glora,
    "HRA": hra,
    "OFT": diag_oft,
    "OFT, rescaled": lambda t, w: diag_oft(t, w, rescaled=True),
    "BOFT": boft,
    "OFT of inputs": input_oft,
    "BOFT of inputs": peft_boft,
}
LOW_RANK = ("GLoRA", "HRA")


@pytest.mark.slow
@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_becomes_plain(kind, target, base, merged):
    weight = base.weights[target]
    tensors, changed = KINDS[kind](target, weight)
    report, path = merged(base.slots, (tensors, -0.7), base=whole_state(base.model))
    assert report.complete
    expected = -0.7 * (changed - weight)
    assert error(deltas_of(path)[target], expected) < FLOAT32
    rank = 8 if kind == "GLoRA" else 4
    assert report.modules[0].rank == (rank if kind in LOW_RANK else min(weight.shape))
    assert report.base.form == "quantized"


@pytest.mark.parametrize("kind", KINDS)
def test_composed_a_merged_file_does_what_its_source_does(kind, base, merged, probe):
    tensors = {}
    for target in (TO_K, f"{BLOCK}.attn.to_out.0", FC1, FC2, MOD, "proj_out"):
        tensors |= KINDS[kind](target, base.weights[target])[0]
    _, path = merged(base.slots, (tensors, 1.0), base=whole_state(base.model))
    plain = probe.output(base.model)
    by_source, by_merge = copy.deepcopy(base.model), copy.deepcopy(base.model)
    qwenlora.compose_loras(by_source, (tensors, 0.5), strict=True)
    qwenlora.compose_loras(by_merge, (path, 0.5), strict=True)
    change = probe.output(by_source) - plain
    assert error(probe.output(by_merge) - plain, change) < COMPOSED


def test_a_16_bit_base_by_any_names_is_the_same(base, merged, tmp_path):
    tensors, changed = dora(TO_K, base.weights[TO_K], axis=0)
    expected = changed - base.weights[TO_K]
    for prefix in ("", "diffusion_model.", "model.diffusion_model.", "transformer."):
        state = {prefix + key: tensor.contiguous() for key, tensor in base.dense().items()}
        report, path = merged(base.slots, (tensors, 1.0), base=state)
        assert error(deltas_of(path)[TO_K], expected) < FLOAT32
        assert (report.base.form, report.base.estimated) == ("16-bit", 0)
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    halves = [dict([*state.items()][at::2]) for at in range(2)]
    weight_map = {}
    for at, half in enumerate(halves, 1):
        name = f"diffusion_pytorch_model-0000{at}-of-00002.safetensors"
        save_file(half, folder / name)
        weight_map |= dict.fromkeys(half, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for named in (folder.parent, folder, index):
        report, path = merged(base.slots, (tensors, 1.0), base=named)
        assert error(deltas_of(path)[TO_K], expected) < FLOAT32
        assert report.base.name == named.name


@pytest.mark.parametrize("precision", [Precision.W4A4, Precision.NVFP4])
@pytest.mark.parametrize("target", [TO_K, FC2, MOD])
def test_a_quantized_base_is_dequantized(precision, target, make_model, merged):
    base = Base.of(make_model(num_layers=1, dtype=torch.bfloat16, precision=precision))
    weight = base.weights[target]
    tensors, changed = glora(target, weight)
    _, path = merged(base.slots, (tensors, 1.0), base=whole_state(base.model))
    assert error(deltas_of(path)[target], changed - weight) < FLOAT32
    tensors, changed = dora(target, weight, axis=0)
    report, path = merged(base.slots, (tensors, 1.0), base=whole_state(base.model))
    assert (report.base.form, report.base.modules, report.base.estimated) == ("quantized", 1, 1)
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["qwenlora.merge"])
    assert document["base"]["form"] == "quantized"
    assert document["base"]["estimated"] == 1
    # Norms are those of the weight without the energy that rounding to 4 bits added.
    targets = find_targets(base.model, {})
    slot = next(s for s in base.slots.values() if target in s.parts)
    begin, end = slot.rows[target]
    norms = BaseWeight.of(targets[slot.row.path]).row_norms(begin, end - begin)
    delta = pair(target, *weight.shape)[1]
    added = (weight + delta).square().sum(dim=1) - weight.square().sum(dim=1)
    factors = tensors[f"{target}.dora_scale"].double() / (norms + added).sqrt().unsqueeze(1)
    assert error(deltas_of(path)[target], factors * (weight + delta) - weight) < FLOAT32


def test_a_cut_states_its_loss(base, merged):
    tensors, changed = dora(TO_K, base.weights[TO_K], axis=1)
    expected = changed - base.weights[TO_K]
    state = whole_state(base.model)
    report, path = merged(base.slots, (tensors, 1.0), base=state, cut=Cut(rank=8))
    found = deltas_of(path)[TO_K]
    lost = float((found - expected).square().sum() / expected.square().sum())
    assert report.modules[0].rank == 8
    assert report.share_lost == pytest.approx(lost, rel=1e-3)
    report, path = merged(base.slots, (tensors, 1.0), base=state, cut=Cut(energy=0.9))
    assert report.share_lost < 0.1
    assert error(deltas_of(path)[TO_K], expected) ** 2 < 0.1


def test_several_sources_add_up(base, merged):
    weight = base.weights[TO_K]
    first, own = dora(TO_K, weight, axis=0)
    second, plain = pair(TO_K, *weight.shape, seed=20)
    third, turned_weight = hra(TO_K, weight)
    state = whole_state(base.model)
    _, path = merged(base.slots, (first, 0.5), (second, -1.0), (third, 0.25), base=state)
    expected = 0.5 * (own - weight) - plain + 0.25 * (turned_weight - weight)
    assert error(deltas_of(path)[TO_K], expected) < FLOAT32


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_base_a_kind_is_left_out_by_name(kind, base, merged):
    tensors, _ = KINDS[kind](TO_K, base.weights[TO_K])
    with pytest.raises(errors.NothingToApplyError, match="needs the base weight: `--base CHECK"):
        merged(base.slots, (tensors, 1.0))
    if f"{TO_K}.alpha" in tensors:
        plain, delta = pair("proj_out", 64, 128)
        report, path = merged(base.slots, ({**tensors, **plain}, 1.0))
        assert not report.complete
        assert [skip.name for skip in report.loras[0].skipped] == [TO_K]
        assert list(deltas_of(path)) == ["proj_out"]
        assert error(deltas_of(path)["proj_out"], delta) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize("form", ["16-bit", "exact", "W4A4"])
def test_factors_on_a_bias_need_diffs(form, target, make_model, merged):
    four_bits = {"dtype": torch.bfloat16, "precision": Precision.W4A4} if form == "W4A4" else {}
    base = Base.of(make_model(num_layers=1, **four_bits))
    factors = 1 + random(len(base.weights[target]), seed=30, size=0.1)
    tensors = {f"base_model.model.{target}.ia3_l": factors.view(-1, 1)}
    state = base.dense() if form == "16-bit" else whole_state(base.model)
    report, path = merged(base.slots, (tensors, 1.0), base=state)
    (skip,) = report.loras[0].skipped
    assert (skip.name, skip.reason[:22]) == (target, "its factors on a bias,")
    assert [*deltas_of(path)] == [target]
    report, path = merged(base.slots, (tensors, 0.5), base=state, diffs=True)
    assert report.complete
    by = 0.5 * (factors.double() - 1)
    found = load_file(path)[f"{PREFIX}{target}.diff_b"].double()
    assert error(found, by * base.trained_biases()[target]) < FLOAT32
    assert error(deltas_of(path)[target], by.unsqueeze(1) * base.weights[target]) < FLOAT32


def test_what_the_base_lacks_is_left_out_by_name(base, merged):
    tensors = dora(TO_K, base.weights[TO_K], axis=0)[0]
    plain, _ = pair("proj_out", 64, 128)
    both = {**tensors, **plain}
    state = base.dense()
    cases = {
        "has no weight of it": {k: t for k, t in state.items() if k != f"{TO_K}.weight"},
        r"has a weight of 128 x 64 \(F32\)": {**state, f"{TO_K}.weight": torch.ones(128, 64)},
        "stores it as F8_E4M3": {
            **state,
            f"{TO_K}.weight": torch.ones(128, 128).to(torch.float8_e4m3fn),
        },
    }
    for words, own in cases.items():
        report, path = merged(base.slots, (both, 1.0), base=own)
        (skip,) = report.loras[0].skipped
        assert skip.name == TO_K
        assert skip.reason.startswith("DoRA needs the base weight: the base `base-")
        assert list(deltas_of(path)) == ["proj_out"]
        with pytest.raises(errors.NothingToApplyError, match=words):
            merged(base.slots, (tensors, 1.0), base=own)


def test_a_wrong_base_is_refused(base, merged, tmp_path):
    tensors = dora(TO_K, base.weights[TO_K], axis=0)[0]
    other = {"layers.0.attention.qkv.weight": torch.ones(4, 4)}
    real, _ = pair(TO_K, 3072, 3072)
    with pytest.raises(errors.OtherModelError, match="is `z-image`, but `source-0` is a LoRA for"):
        merged(None, (real, 1.0), base=other)
    nobodys = {f"single_transformer_blocks.0.{key}": own for key, own in real.items()}
    with pytest.raises(errors.OtherModelError, match="a FLUX or HunyuanVideo LoRA"):
        merged(None, (nobodys, 1.0), base=other)
    with pytest.raises(errors.OtherModelError, match="of no model that is known"):
        merged(base.slots, (tensors, 1.0), base=tensors)
    with pytest.raises(errors.LoraNotFoundError):
        merged(base.slots, (tensors, 1.0), base=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(errors.LoraFileError):
        merged(base.slots, (tensors, 1.0), base=tmp_path / "bad.safetensors")
    twice = base.dense()
    twice[f"model.diffusion_model.{TO_K}.weight"] = torch.ones(128, 128)
    with pytest.raises(errors.LoraFileError, match="twice"):
        merged(base.slots, (tensors, 1.0), base=twice)
    state = base.dense()
    state[f"{TO_K}.weight"] = torch.full((128, 128), torch.nan)
    with pytest.raises(errors.NonFiniteError, match="the base's weight holds NaN"):
        merged(base.slots, (tensors, 1.0), base=state)
    state = whole_state(base.model)
    state[f"{BLOCK}.attn.to_qkv.proj_down"] = torch.ones(128, 24)
    with pytest.raises(errors.UnknownWeightError, match="does not fit its 128 channels"):
        merged(base.slots, (tensors, 1.0), base=state)


def test_a_base_that_nothing_needs_is_not_named(base, merged):
    tensors, _ = pair(TO_K, 128, 128)
    report, _ = merged(base.slots, (tensors, 1.0), base=whole_state(base.model))
    assert report.base is None
