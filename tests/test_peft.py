"""PEFT's other kinds of adapter: LoKr and LoHa do what PEFT does, all others are refused by name.

PEFT writes no alpha tensor; alpha and r stand in `adapter_config.json`. Of a LoKr whose factors are
both stored whole every other tool says that its scale is 1, PEFT alone divides alpha by r: with
PEFT's configuration beside the file its rule holds, without it that of the others.
"""

from __future__ import annotations

import copy
import json
import warnings
from typing import TYPE_CHECKING

import peft
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import get_peft_model
from peft.tuners.lora.config import KasaConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import errors
from qwenlora.emulation import EmulatedQwenImageTransformer, Precision

from .test_oracles import BLOCK_LINEAR, FUSED, TOP_LEVEL, dense_paths, plane_order, relative_error

if TYPE_CHECKING:
    from pathlib import Path

STRENGTH = -0.7
DENSE_CONFIG = {
    # As wide as a Kronecker product must be to run beside a layer: its rank is above 128.
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (16, 24, 24),
}
DELTA_BOUND = 1e-5
"""Relative error of a delta taken as a difference of float32 outputs; measured: 1.8e-6."""
ALL = [*BLOCK_LINEAR, *TOP_LEVEL]


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**DENSE_CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def emulated(dense):
    return EmulatedQwenImageTransformer.from_diffusers(
        dense, rank=32, precision=Precision.EXACT, dtype=torch.float32
    )


@pytest.fixture
def model(emulated):
    qwenlora.reset_loras(emulated)
    return emulated


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def trained(dense, config, *, adapter_name="default"):
    """PEFT's model, its adapters as after training: none of their tensors is zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(dense), config, adapter_name=adapter_name).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if model.prefix in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(model, folder: Path, *, adapter_name="default") -> Path:
    model.save_pretrained(folder)
    return folder if adapter_name == "default" else folder / adapter_name


def deltas_of(oracle, adapter_name="default"):
    """PEFT's own delta of each dense layer, (out, in) float64, by path."""
    inner = copy.deepcopy(oracle.base_model.model).double()
    return {
        path: layer.get_delta_weight(adapter_name)
        for path, layer in inner.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def outputs_of(model, path):
    """(out, in): what a layer makes of each unit vector, rows in plane order."""
    leaf = model.get_submodule(path)
    rows = [leaf(unit) for unit in torch.eye(leaf.in_features).split(8)]
    return plane_order(leaf, torch.cat(rows).double().mT)


def slots_of(model, expected):
    """The slots of the emulated model, each with the dense layers whose rows it stacks."""
    for path, leaf in model.named_modules():
        if hasattr(leaf, "out_features") and any(p in expected for p in dense_paths(path)):
            yield path, leaf


def assert_same_deltas(model, base, expected):
    seen = set()
    for path, leaf in slots_of(model, expected):
        members = dense_paths(path)
        seen.update(members)
        nothing = torch.zeros(leaf.out_features // len(members), leaf.in_features).double()
        joined = torch.cat([expected.get(member, nothing) for member in members])
        found = outputs_of(model, path) - base[path]
        assert relative_error(found, joined) < DELTA_BOUND, path
    assert seen >= set(expected)


@pytest.fixture(scope="module")
def base_outputs(emulated):
    qwenlora.reset_loras(emulated)
    leaves = [path for path, leaf in emulated.named_modules() if hasattr(leaf, "out_features")]
    with torch.no_grad():
        return {path: outputs_of(emulated, path) for path in leaves}


PATTERNS = {
    # Expressions, and the first that matches wins.
    "rank_pattern": {r"to_(q|k)": 3, "attn.to_v": 12, "img_mod.1": 2},
    "alpha_pattern": {r".*\.to_q": 5, "to_out.0": 32, "attn.to_(k|v)": 7},
}
LYCORIS = {
    "LoKr": peft.LoKrConfig(r=8, alpha=4, target_modules=ALL),
    "LoKr, alpha is r": peft.LoKrConfig(r=8, alpha=8, target_modules=ALL),
    "LoKr, halves": peft.LoKrConfig(r=2, alpha=3, target_modules=ALL),
    "LoKr, both halved": peft.LoKrConfig(
        r=2, alpha=5, target_modules=ALL, decompose_both=True, decompose_factor=8
    ),
    "LoKr, factor 4": peft.LoKrConfig(r=4, alpha=1, target_modules=ALL, decompose_factor=4),
    "LoKr, whole": peft.LoKrConfig(r=1000, alpha=500, target_modules=ALL, decompose_factor=16),
    "LoKr, dropouts": peft.LoKrConfig(
        r=4, alpha=2, target_modules=ALL, rank_dropout=0.5, module_dropout=0.5
    ),
    "LoKr, convolutions": peft.LoKrConfig(
        r=2, alpha=2, target_modules=ALL, use_effective_conv2d=True
    ),
    "LoKr, patterns": peft.LoKrConfig(r=8, alpha=4, target_modules=ALL, **PATTERNS),
    "LoKr, attention": peft.LoKrConfig(r=8, alpha=4, target_modules=["to_q", "to_v"]),
    "LoHa": peft.LoHaConfig(r=4, alpha=2, target_modules=ALL),
    "LoHa, patterns": peft.LoHaConfig(r=4, alpha=8, target_modules=ALL, **PATTERNS),
    "LoHa, one member": peft.LoHaConfig(r=6, alpha=3, target_modules=["add_k_proj"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adapter_name"), [*((name, "default") for name in LYCORIS), ("LoKr", "style")]
)
def test_a_folder_by_peft(name, adapter_name, dense, model, base_outputs, tmp_path):
    oracle = trained(dense, LYCORIS[name], adapter_name=adapter_name)
    folder = saved(oracle, tmp_path, adapter_name=adapter_name)
    assert not any("alpha" in key for key in load_file(folder / "adapter_model.safetensors"))
    report = qwenlora.compose_loras(model, (folder, STRENGTH), strict=True)
    assert report.complete
    assert report.energy_lost == 0
    deltas = deltas_of(oracle, adapter_name)
    assert report.loras[0].modules_applied == len(deltas)
    assert_same_deltas(model, base_outputs, {path: STRENGTH * d for path, d in deltas.items()})


def test_a_high_rank_lokr_of_peft_runs_beside_the_layer(dense, model, tmp_path):
    """The cases above have both: products that run as rank, and those that do not."""
    oracle = trained(dense, LYCORIS["LoKr, whole"])
    report = qwenlora.compose_loras(model, saved(oracle, tmp_path))
    krons = {slot.path.rpartition(".")[2]: slot.krons for slot in report.slots}
    assert krons["to_qkv"] == len(FUSED["to_qkv"])
    assert {slot.krons == 0 for slot in report.slots} == {True, False}


def test_without_its_configuration_a_whole_lokr_has_scale_1(dense, model, base_outputs, tmp_path):
    """As LyCORIS, ComfyUI, musubi-tuner and ai-toolkit have it; alpha / r would be 1/2."""
    oracle = trained(dense, LYCORIS["LoKr"])
    saved(oracle, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    weights = tmp_path / "adapter_model.safetensors"
    assert any(key.endswith("to_q.lokr_w2") for key in load_file(weights))
    qwenlora.compose_loras(model, weights)
    deltas = {path: 2 * delta for path, delta in deltas_of(oracle).items()}
    assert_same_deltas(model, base_outputs, deltas)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoKr, alpha is r", "LoHa, alpha is r"])
@pytest.mark.parametrize("form", ["state_dict", "get_peft_model_state_dict"])
def test_tensors_as_peft_holds_them(name, form, dense, model, base_outputs, tmp_path):
    """`state_dict()` has the adapter's name at the end of each key: `lokr_w1.style`."""
    kind = peft.LoKrConfig if name.startswith("LoKr") else peft.LoHaConfig
    config = kind(r=4, alpha=4, target_modules=BLOCK_LINEAR)
    oracle = trained(dense, config, adapter_name="style")
    if form == "state_dict":
        named = oracle.state_dict().items()
        tensors = {k: t.contiguous() for k, t in named if k.endswith(".style")}
    else:
        tensors = get_peft_model_state_dict(oracle, adapter_name="style")
    save_file(tensors, tmp_path / "raw.safetensors")
    assert qwenlora.compose_loras(model, tmp_path / "raw.safetensors", strict=True).complete
    assert_same_deltas(model, base_outputs, deltas_of(oracle, "style"))


def test_a_second_adapter_in_the_tensors_is_not_mixed_in(dense, model, base_outputs, tmp_path):
    config = peft.LoKrConfig(r=8, alpha=8, target_modules=["to_q"])
    oracle = trained(dense, config)
    oracle.add_adapter("other", peft.LoKrConfig(r=2, alpha=2, target_modules=["to_q"]))
    tensors = {k: t.contiguous() for k, t in oracle.state_dict().items() if "lokr" in k}
    assert {key.rpartition(".")[2] for key in tensors} == {"default", "other"}
    report = qwenlora.compose_loras(model, tensors)
    assert_same_deltas(model, base_outputs, deltas_of(oracle))
    assert {skip.reason for skip in report.loras[0].skipped} == {"a second adapter of its module"}


REFUSED = {
    "KaSA": peft.LoraConfig(r=4, kasa_config=KasaConfig(), target_modules=["to_q"]),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["to_q"]),
    "GLoRA": peft.GloraConfig(target_modules=["to_q"]),
    "VeRA": peft.VeraConfig(target_modules=["to_q"]),
    "HiRA": peft.HiraConfig(target_modules=["to_q"]),
    "FourierFT": peft.FourierFTConfig(target_modules=["to_q"], n_frequency=10),
    "MiSS": peft.MissConfig(target_modules=["to_q"]),
    "SHiRA": peft.ShiraConfig(target_modules=["to_q"]),
    "C3A": peft.C3AConfig(target_modules=["to_q"], block_size=16),
    "DeLoRA": peft.DeloraConfig(target_modules=["to_q"]),
    "GraLoRA": peft.GraloraConfig(target_modules=["to_q"]),
    "RandLoRA": peft.RandLoraConfig(target_modules=["to_q"]),
    "RoAd": peft.RoadConfig(target_modules=["to_q"]),
    "WaveFT": peft.WaveFTConfig(target_modules=["to_q"], n_frequency=10),
    "LN tuning": peft.LNTuningConfig(target_modules=["norm_q"]),
    "`pissa` initialisation": peft.LoraConfig(
        r=4, init_lora_weights="pissa", target_modules=["to_q"]
    ),
    "`olora` initialisation": peft.LoraConfig(
        r=4, init_lora_weights="olora", target_modules=["to_q"]
    ),
}


BASED = {
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=ALL),
    "OFT": peft.OFTConfig(oft_block_size=4, r=0, target_modules=ALL),
    "OFT, solved": peft.OFTConfig(
        oft_block_size=8, r=0, use_cayley_neumann=False, target_modules=ALL
    ),
    "OFT, one block": peft.OFTConfig(oft_block_size=8, r=0, block_share=True, target_modules=ALL),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "IA3": peft.IA3Config(target_modules=ALL, feedforward_modules=["net.2", "to_q"]),
    "HRA": peft.HRAConfig(r=4, target_modules=ALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BASED)
def test_a_folder_of_a_kind_that_needs_the_base(name, dense, model, base_outputs, tmp_path):
    with warnings.catch_warnings():
        # BOFT looks for a compiler, and goes on without one.
        warnings.simplefilter("ignore")
        oracle = trained(dense, BASED[name])
    report = qwenlora.compose_loras(model, (saved(oracle, tmp_path), STRENGTH), strict=True)
    assert report.complete
    assert report.energy_lost == 0
    changes = changes_of(oracle)
    assert report.loras[0].modules_applied == len(changes)
    assert_same_deltas(model, base_outputs, {path: STRENGTH * c for path, c in changes.items()})


def changes_of(oracle):
    """What PEFT's own layers change in the answers to unit vectors, (out, in) float64, by path."""
    changes = {}
    for path, layer in copy.deepcopy(oracle.base_model.model).double().named_modules():
        if hasattr(layer, "base_layer"):
            units = torch.eye(layer.base_layer.in_features, dtype=torch.float64)
            changes[path] = (layer(units) - layer.base_layer(units)).mT
    return changes


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("title", REFUSED)
def test_other_kinds_are_refused_by_name(title, with_config, dense, model, tmp_path):
    if "initialisation" in title and not with_config:
        pytest.skip("nothing in the tensors tells")
    folder = saved(trained(dense, REFUSED[title]), tmp_path)
    weights = folder / "adapter_model.safetensors"
    if not with_config:
        (folder / "adapter_config.json").unlink()
    with pytest.raises(errors.NothingToApplyError, match=f"{title} is not supported: "):
        qwenlora.compose_loras(model, folder if with_config else weights)


def test_a_pair_that_peft_has_converted_is_a_plain_lora(dense, model, base_outputs, tmp_path):
    """PiSSA with `path_initial_model_for_weight_conversion`: a delta of the unchanged base."""
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["to_out.0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = get_peft_model(copy.deepcopy(dense), config)
        oracle.peft_config["default"].init_lora_weights = True
        oracle.save_pretrained(tmp_path / "initial")
        oracle.peft_config["default"].init_lora_weights = "pissa"
        for name, parameter in oracle.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
        trained_weights = {
            path: layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
            for path, layer in oracle.base_model.model.named_modules()
            if hasattr(layer, "get_delta_weight")
        }
        oracle.save_pretrained(
            tmp_path / "converted",
            path_initial_model_for_weight_conversion=tmp_path / "initial",
        )
    written = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert qwenlora.compose_loras(model, tmp_path / "converted", strict=True).complete
    deltas = {
        path: weight - dense.get_submodule(path).weight.double()
        for path, weight in trained_weights.items()
    }
    assert_same_deltas(model, base_outputs, deltas)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_trained_biases_are_not_passed_over(bias, dense, model, tmp_path):
    """PEFT saves them whole; the base's, from which a delta would follow, is not in the file."""
    oracle = trained(dense, peft.LoraConfig(r=4, target_modules=["to_q"], bias=bias))
    report = qwenlora.compose_loras(model, saved(oracle, tmp_path))
    skipped = [skip for skip in report.loras[0].skipped if skip.matters]
    assert report.complete == (bias == "none")
    assert bool(skipped) == (bias != "none")
    assert all(skip.name.endswith(".bias") for skip in skipped)


def test_modules_saved_whole_are_not_passed_over(dense, model, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["to_q"], modules_to_save=["proj_out"])
    report = qwenlora.compose_loras(model, saved(trained(dense, config), tmp_path))
    assert not report.complete
    names = {skip.name.rpartition(".")[2] for skip in report.loras[0].skipped if skip.matters}
    assert names == {"weight", "bias"}
