"""LoRA files written and read by PEFT and by diffusers, against what we make of the same files.

Every case has a real tool write a file and a real tool read it back into a dense diffusers model:
that model is the oracle. We compose the same file into the emulated model of the same weights. The
weight delta of every slot, the output of every layer and that of the whole model must agree.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora.emulation import EmulatedQwenImageTransformer, Precision
from qwenlora.packing.layout import LowRankSide
from qwenlora.packing.pack import deinterleave_modulation, unpack_lowrank

DENSE_CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
BASE_RANK = 32
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT_ATTENTION = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP = ["net.0.proj", "net.2"]
MODULATION = ["img_mod.1", "txt_mod.1"]
TOP_LEVEL = ["img_in", "txt_in", "linear_1", "linear_2", "norm_out.linear", "proj_out"]
ALL_LINEAR = [*JOINT_ATTENTION, *MLP, *MODULATION, *TOP_LEVEL]

# Bounds are relative errors in the Frobenius norm; measured values are the worst of all cases.
WEIGHT_BOUND = {
    # One rounding of the factor and one of each product of `up`; measured: 6.2e-8.
    torch.float32: 1e-6,
    # `down` and `up` are rounded to 8 bits of mantissa, 2^-9 at most each; measured: 2.8e-3.
    torch.bfloat16: 4e-3,
}
EXACT_BFLOAT16_BOUND = 1e-12
"""A bfloat16 file at a scale that is a power of two loses nothing in bfloat16; measured: 0."""
LAYER_BOUND = 5e-6
"""Delta of one layer's output in float32, taken as a difference of outputs; measured: 5.5e-7."""
MODEL_BOUND = 1e-4
"""Delta of the whole model's output in float32; measured: 3.9e-5 where it moves least."""
BFLOAT16_MODEL_BOUND = 1.2e-2
"""Output (not delta) of the whole model in bfloat16 against float32's; measured: 7.8e-3."""
BFLOAT16_MODEL_RATIO = 1.25
"""That error over the one of PEFT's dense model in bfloat16; measured: 1.03."""
LEAST_MOVE = 0.005
"""Least share of the output that a case must move; measured: 0.009."""
STRENGTH = 0.7


@dataclass(frozen=True)
class Case:
    """What a tool wrote, and the dense model into which a tool read it."""

    source: Any
    oracle: torch.nn.Module
    name: str = "default"


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**DENSE_CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: none may stay at 0 or 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 24, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 64, generator=generator),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.7, 0.3]),
        "img_shapes": [[(1, 4, 5), (1, 2, 2)]] * 2,
    }


@pytest.fixture(scope="module")
def emulated_models(dense):
    return {
        dtype: EmulatedQwenImageTransformer.from_diffusers(
            dense, rank=BASE_RANK, precision=Precision.EXACT, dtype=dtype
        )
        for dtype in WEIGHT_BOUND
    }


@pytest.fixture
def model(emulated_models):
    """The emulated model in float32, bare."""
    qwenlora.reset_loras(emulated_models[torch.float32])
    return emulated_models[torch.float32]


@pytest.fixture
def half_model(emulated_models):
    """The emulated model in bfloat16, bare."""
    qwenlora.reset_loras(emulated_models[torch.bfloat16])
    return emulated_models[torch.bfloat16]


# ---- writing with real tools ----


def randomize(model, seed):
    """Give every adapter random values: PEFT begins with B = 0, whose delta is nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            spread = 0.3 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def trained_by_diffusers(dense, *, name="default", seed=3, **config):
    model = copy.deepcopy(dense)
    model.add_adapter(lora_config(**config), adapter_name=name)
    return randomize(model, seed)


def trained_by_peft(dense, *, name="default", seed=4, **config):
    model = get_peft_model(copy.deepcopy(dense), lora_config(**config), adapter_name=name)
    return randomize(model, seed)


def lora_config(*, targets=ATTENTION, rank=8, alpha=4, **options):
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options)


def saved_by_pipeline(model, folder, *, metadata=True):
    extra = _collate_lora_metadata({"transformer": model}) if metadata else {}
    QwenImageLoraLoaderMixin.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(model), **extra
    )
    return folder / WEIGHTS_NAME


def read_by_pipeline(dense, path):
    model = copy.deepcopy(dense)
    add_by_pipeline(model, path, name="default")
    return model


def add_by_pipeline(model, path, *, name):
    """What `QwenImagePipeline.load_lora_weights` does, without a pipeline."""
    state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(
        state, model, adapter_name=name, metadata=metadata
    )


def read_by_model(dense, path, *, name="default"):
    model = copy.deepcopy(dense)
    # Without `use_safetensors` diffusers reads the tensors but not their metadata.
    model.load_lora_adapter(path, prefix=None, adapter_name=name, use_safetensors=True)
    return model


def read_by_peft(dense, folder, *, name="default"):
    return PeftModel.from_pretrained(copy.deepcopy(dense), folder, adapter_name=name)


def by_pipeline(dense, folder, *, metadata=True, **config):
    model = trained_by_diffusers(dense, **config)
    path = saved_by_pipeline(model, folder, metadata=metadata)
    return Case(path, read_by_pipeline(dense, path))


def by_model(dense, folder, *, name="default", **config):
    model = trained_by_diffusers(dense, name=name, **config)
    model.save_lora_adapter(folder, adapter_name=name)
    path = folder / WEIGHTS_NAME
    return Case(path, read_by_model(dense, path))


def by_peft(dense, folder, *, name="default", **config):
    trained_by_peft(dense, name=name, **config).save_pretrained(folder)
    # PEFT gives every adapter that is not the default a folder of its own.
    place = folder if name == "default" else folder / name
    return Case(place, read_by_peft(dense, place))


def by_raw_state(dense, folder, *, everything, train):
    """`state_dict()` as it is, adapter name in every key; scale 1, since it is not in there."""
    model = train(dense, name="my_style", alpha=8)
    state = {
        key: tensor.contiguous()
        for key, tensor in model.state_dict().items()
        if everything or "lora_" in key
    }
    save_file(state, folder / "raw.safetensors")
    return Case(folder / "raw.safetensors", model, name="my_style")


PATTERNS = {
    # Overlapping, with regular expressions; a file holds them sorted, and the first match wins.
    "rank_pattern": {
        r"transformer_blocks\.1\..*to_v": 12,
        "attn.to_q": 16,
        "to_q": 4,
    },
    "alpha_pattern": {
        "to_out.0": 32,
        "1.attn.to_out.0": 6,
        "to_(q|k)": 5,
        r"^transformer_blocks\.0\.attn\.to_k": 20,
        "attn.to_v": 3.0,
    },
}


def by_shared_down(dense, folder):
    """Q, K and V of one `lora_A`: the fused slot needs its rank once."""
    model = trained_by_peft(dense, targets=["to_q", "to_k", "to_v"])
    for block in model.base_model.model.transformer_blocks:
        for member in (block.attn.to_k, block.attn.to_v):
            member.lora_A["default"].weight.copy_(block.attn.to_q.lora_A["default"].weight)
    model.save_pretrained(folder)
    return Case(folder, read_by_peft(dense, folder))


def by_resaving(dense, folder):
    """Mixed ranks without alpha, read and written once more by diffusers: patterns with `^`."""
    model = trained_by_diffusers(dense, rank_pattern={"to_q": 4, "0.attn.to_v": 16})
    first = saved_by_pipeline(model, folder / "first", metadata=False)
    again = saved_by_pipeline(read_by_pipeline(dense, first), folder / "again")
    return Case(again, read_by_pipeline(dense, again))


def by_bfloat16(dense, folder):
    model = trained_by_diffusers(dense, targets=ALL_LINEAR).to(torch.bfloat16)
    model.save_lora_adapter(folder)
    path = folder / WEIGHTS_NAME
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    return Case(path, read_by_model(dense, path))


def respelled(dense, folder, *, prefix, down, up, flat=False, alpha=None, targets=JOINT_ATTENTION):
    """A trainer's spelling of a diffusers file, judged by diffusers' own converter."""
    model = trained_by_diffusers(dense, targets=targets, rank_pattern={"to_q": 16})
    state = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        path, _, half = key.partition(".lora_")
        name = prefix + (path.replace(".", "_") if flat else path)
        state[name + (down if half.startswith("A") else up)] = tensor
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(state, folder / "lora.safetensors")
    return Case(folder / "lora.safetensors", read_by_pipeline(dense, folder / "lora.safetensors"))


AB = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
DOWN_UP = {"down": ".lora_down.weight", "up": ".lora_up.weight"}
DEFAULT_SLOT = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}
BLOCK_LINEAR = [*JOINT_ATTENTION, *MLP, *MODULATION]

CASES = {
    "pipeline": (by_pipeline, {}),
    "pipeline-no-metadata": (by_pipeline, {"metadata": False}),
    "pipeline-patterns": (by_pipeline, PATTERNS),
    "pipeline-rslora": (by_pipeline, {"use_rslora": True}),
    "pipeline-rslora-patterns": (by_pipeline, {"use_rslora": True, **PATTERNS}),
    "pipeline-all-linear": (by_pipeline, {"targets": ALL_LINEAR}),
    "pipeline-resaved": (by_resaving, {}),
    "model": (by_model, {}),
    "model-patterns": (by_model, PATTERNS),
    "model-rslora": (by_model, {"use_rslora": True}),
    "model-named": (by_model, {"name": "my_style"}),
    "model-attention-mlp": (by_model, {"targets": JOINT_ATTENTION + MLP}),
    "model-all-linear": (by_model, {"targets": ALL_LINEAR, "rank": 5, "alpha": 7}),
    "model-bfloat16": (by_bfloat16, {}),
    "peft": (by_peft, {}),
    "peft-patterns": (by_peft, PATTERNS),
    "peft-rslora": (by_peft, {"use_rslora": True}),
    "peft-rslora-patterns": (by_peft, {"use_rslora": True, **PATTERNS}),
    "peft-named": (by_peft, {"name": "my_style"}),
    "peft-attention-mlp": (by_peft, {"targets": JOINT_ATTENTION + MLP}),
    "peft-all-linear": (by_peft, {"targets": ALL_LINEAR}),
    "peft-top-level": (by_peft, {"targets": TOP_LEVEL}),
    "peft-only-q-and-v": (by_peft, {"targets": ["to_q", "to_v"]}),
    "peft-only-text-k": (by_peft, {"targets": ["add_k_proj"]}),
    "peft-shared-down": (by_shared_down, {}),
    "raw-diffusers": (by_raw_state, {"everything": False, "train": trained_by_diffusers}),
    "raw-peft": (by_raw_state, {"everything": False, "train": trained_by_peft}),
    "kohya": (
        respelled,
        {
            "prefix": "lora_unet_",
            "flat": True,
            "alpha": 3.0,
            "targets": BLOCK_LINEAR,
            **DOWN_UP,
        },
    ),
    "lightning": (respelled, {"prefix": "", "alpha": 2.0, **DOWN_UP}),
    "ai-toolkit": (respelled, {"prefix": "diffusion_model.", "targets": BLOCK_LINEAR, **AB}),
    "diffsynth": (respelled, {"prefix": "", "targets": BLOCK_LINEAR, **DEFAULT_SLOT}),
}


@pytest.fixture(scope="module")
def case(request, dense, tmp_path_factory):
    """One case with its oracle at `STRENGTH`, shared by the tests that look at it."""
    write, options = CASES[request.param]
    with torch.no_grad():
        case = write(dense, tmp_path_factory.mktemp("case"), **options)
        set_strengths(case.oracle, {case.name: STRENGTH})
    return case


each_case = pytest.mark.parametrize("case", CASES, indirect=True)


# ---- the oracle's side ----


def set_strengths(oracle, strengths):
    """Activate adapters at these strengths, as a user of the tool does."""
    if isinstance(oracle, PeftModel) or not oracle._hf_peft_config_loaded:
        for layer in lora_layers(oracle).values():
            for name, strength in strengths.items():
                layer.set_scale(name, strength)
    else:
        oracle.set_adapters(list(strengths), list(strengths.values()))


def lora_layers(oracle):
    """PEFT's layers by the path of the dense layer."""
    inner = oracle.base_model.model if isinstance(oracle, PeftModel) else oracle
    return {path: module for path, module in inner.named_modules() if isinstance(module, LoraLayer)}


def oracle_deltas(oracle):
    """What PEFT would merge into each dense layer, (out, in) float64, by path."""
    deltas = {}
    for path, layer in lora_layers(copy.deepcopy(oracle).double()).items():
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        deltas[path] = sum(layer.get_delta_weight(name) for name in active)
    return deltas


# ---- our side ----


def slots_of(model):
    """Layers that can carry a delta, by path."""
    return {path: leaf for path, leaf in model.named_modules() if hasattr(leaf, "out_features")}


def dense_paths(path):
    """The dense layers whose rows a slot stacks, in order."""
    parent, _, last = path.rpartition(".")
    return [f"{parent}.{member}" for member in FUSED[last]] if last in FUSED else [path]


def delta_of(leaf):
    """The (out, in) float64 delta that a layer carries, rows in plane order; None if none."""
    if hasattr(leaf, "proj_down"):
        down = unpack_lowrank(leaf.proj_down, LowRankSide.DOWN)[BASE_RANK:]
        up = unpack_lowrank(leaf.proj_up, LowRankSide.UP)[:, BASE_RANK:]
    elif hasattr(leaf, "qwenlora_down"):
        down, up = leaf.qwenlora_down, leaf.qwenlora_up
    else:
        return None
    delta = up.double() @ down.double()
    return plane_order(leaf, delta) if down.shape[0] else None


def plane_order(leaf, rows):
    """A modulation layer interleaves its planes; everything else is in the file's order."""
    return deinterleave_modulation(rows) if hasattr(leaf, "wzeros") else rows


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same_deltas(model, expected, bound):
    """Compare every slot's delta; a slot without one must carry none."""
    for path, leaf in slots_of(model).items():
        members = dense_paths(path)
        actual = delta_of(leaf)
        if not any(member in expected for member in members):
            assert actual is None, path
            continue
        zeros = torch.zeros(leaf.out_features // len(members), leaf.in_features).double()
        joined = torch.cat([expected.get(member, zeros) for member in members])
        assert actual is not None, path
        assert relative_error(actual, joined) < bound, path


# ---- weights, slot by slot ----


@pytest.mark.slow
@each_case
def test_slot_deltas_are_the_tool_s(model, half_model, case):
    expected = oracle_deltas(case.oracle)
    for target in (model, half_model):
        report = qwenlora.compose_loras(target, (case.source, STRENGTH), strict=True)
        assert report.complete
        assert report.loras[0].modules_applied == len(expected)
        assert_same_deltas(target, expected, WEIGHT_BOUND[target.dtype])


def test_bfloat16_file_in_a_bfloat16_model_is_exact(dense, half_model, tmp_path):
    case = by_bfloat16(dense, tmp_path)
    qwenlora.compose_loras(half_model, case.source)  # alpha / rank is 1/2
    assert_same_deltas(half_model, oracle_deltas(case.oracle), EXACT_BFLOAT16_BOUND)


def test_shared_down_takes_its_rank_once(dense, model, tmp_path):
    case = by_shared_down(dense, tmp_path)
    report = qwenlora.compose_loras(model, case.source)
    assert {(slot.path.rpartition(".")[2], slot.rank) for slot in report.slots} == {("to_qkv", 8)}


def test_patterns_decide_scales(dense, tmp_path):
    """The oracle of the pattern cases is not trivial: scales differ, and order matters."""
    layers = lora_layers(by_peft(dense, tmp_path, **PATTERNS).oracle)
    block = "transformer_blocks.{}.attn.{}"
    scales = {path: layer.scaling["default"] for path, layer in layers.items()}
    assert scales[block.format(0, "to_q")] == 5 / 16
    assert scales[block.format(0, "to_k")] == 20 / 8
    assert scales[block.format(1, "to_k")] == 5 / 8
    assert scales[block.format(1, "to_v")] == 3 / 12
    assert scales[block.format(0, "to_out.0")] == 32 / 8
    assert scales[block.format(1, "to_out.0")] == 6 / 8


def test_pattern_beyond_our_regular_expressions_is_not_silent(dense, model, tmp_path):
    """PEFT's patterns are Python's: look-around and all."""
    pattern = {r"(?!.*blocks\.1).*to_q": 40}
    case = by_peft(dense, tmp_path, targets=["to_q"], alpha_pattern=pattern)
    set_strengths(case.oracle, {case.name: 1.0})
    try:
        report = qwenlora.compose_loras(model, case.source)
    except qwenlora.QwenLoraError:
        return
    if report.complete and not report.loras[0].notes:
        assert_same_deltas(model, oracle_deltas(case.oracle), WEIGHT_BOUND[torch.float32])


@pytest.mark.parametrize("train", [trained_by_diffusers, trained_by_peft])
def test_base_weights_saved_along_are_ignored(dense, model, tmp_path, train):
    """A whole `state_dict()`: weights and biases of every module beside the adapter's tensors."""
    case = by_raw_state(dense, tmp_path, everything=True, train=train)
    report = qwenlora.compose_loras(model, case.source)
    assert_same_deltas(model, oracle_deltas(case.oracle), WEIGHT_BOUND[torch.float32])
    assert [skip.name for skip in report.loras[0].skipped if skip.matters] == []


# ---- outputs ----


def layer_outputs(model, x):
    """Every layer's output for its width's input, rows in plane order, by path."""
    return {
        path: plane_order(leaf, leaf(x[leaf.in_features]).mT).mT
        for path, leaf in slots_of(model).items()
    }


@pytest.mark.slow
@each_case
def test_layer_outputs_move_as_the_tool_s(model, case):
    generator = torch.Generator().manual_seed(5)
    widths = (16, 64, 128, 256, 512)
    # The modulation kernel takes 8 rows at most.
    x = {width: torch.randn(8, width, generator=generator) for width in widths}
    before = layer_outputs(model, x)
    qwenlora.compose_loras(model, (case.source, STRENGTH))
    after = layer_outputs(model, x)
    layers = lora_layers(case.oracle)
    for path, leaf in slots_of(model).items():
        members = dense_paths(path)
        if not any(member in layers for member in members):
            assert torch.equal(after[path], before[path]), path
            continue
        zeros = torch.zeros(8, leaf.out_features // len(members))
        moved = [
            layers[member](x[leaf.in_features]) - layers[member].base_layer(x[leaf.in_features])
            if member in layers
            else zeros
            for member in members
        ]
        error = relative_error(after[path] - before[path], torch.cat(moved, dim=1))
        assert error < LAYER_BOUND, path


@pytest.mark.slow
@each_case
def test_model_output_moves_as_the_tool_s(dense, model, inputs, case):
    before = model(**inputs).sample
    qwenlora.compose_loras(model, (case.source, STRENGTH))
    expected = case.oracle(**inputs, return_dict=False)[0] - dense(**inputs, return_dict=False)[0]
    assert expected.norm() > LEAST_MOVE * before.norm()
    assert relative_error(model(**inputs).sample - before, expected) < MODEL_BOUND


def test_bfloat16_model_output_is_as_near_as_the_tool_s(dense, half_model, inputs, tmp_path):
    case = by_peft(dense, tmp_path, targets=ALL_LINEAR)
    set_strengths(case.oracle, {case.name: STRENGTH})
    # At time 0 the time embedding's waves are exact in any dtype.
    whole = {**inputs, "timestep": torch.zeros(2)}
    half = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) else value
        for name, value in whole.items()
    }
    expected = case.oracle(**whole, return_dict=False)[0]
    theirs = copy.deepcopy(case.oracle).bfloat16()(**half, return_dict=False)[0]
    qwenlora.compose_loras(half_model, (case.source, STRENGTH))
    ours = relative_error(half_model(**half).sample, expected)
    move = relative_error(dense(**whole, return_dict=False)[0], expected)
    assert ours < BFLOAT16_MODEL_BOUND < 0.2 * move
    assert ours < BFLOAT16_MODEL_RATIO * relative_error(theirs, expected)


# ---- stacks and strengths ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("strengths", [(0.8, -0.5), (-1.3, 0.25)])
def test_stack_is_diffusers_set_adapters(dense, model, inputs, tmp_path, strengths):
    a = by_model(dense, tmp_path / "a", targets=JOINT_ATTENTION + MLP, rank=12, alpha=5)
    b = by_pipeline(dense, tmp_path / "b", targets=ALL_LINEAR, seed=9, use_rslora=True)
    oracle = read_by_model(dense, a.source, name="a")
    add_by_pipeline(oracle, b.source, name="b")
    oracle.set_adapters(["a", "b"], list(strengths))
    before = model(**inputs).sample
    qwenlora.compose_loras(model, [(a.source, strengths[0]), (b.source, strengths[1])])
    assert_same_deltas(model, oracle_deltas(oracle), WEIGHT_BOUND[torch.float32])
    expected = oracle(**inputs, return_dict=False)[0] - dense(**inputs, return_dict=False)[0]
    assert relative_error(model(**inputs).sample - before, expected) < MODEL_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("strength", [-1.0, 0.1, math.pi])
def test_strength_is_the_tool_s_weight(dense, model, tmp_path, strength):
    case = by_model(dense, tmp_path, targets=ALL_LINEAR, use_rslora=True)
    set_strengths(case.oracle, {"default": strength})
    qwenlora.compose_loras(model, (case.source, strength))
    assert_same_deltas(model, oracle_deltas(case.oracle), WEIGHT_BOUND[torch.float32])


def test_output_is_the_merged_model_s(dense, model, inputs, tmp_path):
    """PEFT's merge is another way of its own: the merged model has no adapter left."""
    case = by_peft(dense, tmp_path, targets=ALL_LINEAR)
    merged = case.oracle.merge_and_unload()
    assert not lora_layers(merged)
    before = model(**inputs).sample
    qwenlora.compose_loras(model, case.source)
    expected = merged(**inputs, return_dict=False)[0] - dense(**inputs, return_dict=False)[0]
    assert relative_error(model(**inputs).sample - before, expected) < MODEL_BOUND


def test_fresh_lora_of_peft_is_said_to_be_zero(dense, model, tmp_path):
    """As training begins: B = 0."""
    get_peft_model(copy.deepcopy(dense), lora_config()).save_pretrained(tmp_path)
    assert qwenlora.compose_loras(model, tmp_path).loras[0].all_zero
