"""Composed models that are saved, sent to another process, or loaded over."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import qwenlora
from qwenlora import ComfyQwenImageWrapper, LoraSet, LoraSpec
from qwenlora.errors import ModelStateError
from qwenlora.runtime import OPTIONS_KEY


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


WAYS = [through_torch, through_pickle]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["tensors", "file"])
def test_what_is_loaded_is_a_composed_model(way, kind, model, lora, probe):
    base = probe.snapshot(model)
    path, draft = lora
    source = draft.tensors if kind == "tensors" else path
    report = qwenlora.compose_loras(model, (source, 0.5))
    loaded = way(model)
    assert probe.snapshot(loaded).differences(probe.snapshot(model)) == []
    assert torch.equal(probe.output(loaded), probe.output(model))
    found = qwenlora.applied(loaded)
    assert found.loras == report.loras
    assert [slot.path for slot in found.slots] == [slot.path for slot in report.slots]
    # It goes on like any other: another strength, another stack, its base.
    qwenlora.compose_loras(loaded, (source, -1.0))
    probe.assert_holds(loaded, [(draft, -1.0)], within=2e-6)
    qwenlora.reset_loras(loaded)
    assert probe.snapshot(loaded).differences(base) == []
    assert qwenlora.applied(model).loras == report.loras


def test_the_same_files_again_are_no_work(model, lora, monkeypatch):
    qwenlora.compose_loras(model, lora[0])
    loaded = through_torch(model)
    before = qwenlora.applied(loaded)
    assert qwenlora.compose_loras(loaded, lora[0]) is before


def test_the_default_stack_of_a_model_whose_files_are_gone(model, lora, probe):
    """What is composed stays; it cannot be made again once something else was there."""
    path, _ = lora
    wrapper = ComfyQwenImageWrapper.of(model)
    qwenlora.compose_loras(model, str(path))
    composed = probe.output(model)
    data = pickle.dumps(model)
    path.unlink()
    loaded = pickle.loads(data)
    assert torch.equal(probe.output(loaded), composed)
    empty = {OPTIONS_KEY: LoraSet.of([])}
    assert not torch.equal(probe.output(loaded, transformer_options=empty), composed)
    with pytest.raises(ModelStateError, match="cannot be made again"):
        probe.output(loaded)
    qwenlora.reset_loras(loaded)
    assert wrapper.report.loras


def test_a_set_is_planned_again_from_its_files(lora):
    path, _ = lora
    made = LoraSet.of([LoraSpec(path, 0.5)], max_rank=64)
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.slow
def test_another_process_gets_a_composed_model(model, lora, tmp_path, probe):
    qwenlora.compose_loras(model, lora[0])
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch, qwenlora\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(len(qwenlora.applied(model).slots))\n"
        "qwenlora.reset_loras(model)\n"
        "torch.save(model.state_dict(), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "model.pt", tmp_path / "base.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(qwenlora.applied(model).slots)
    qwenlora.reset_loras(model)
    base = torch.load(tmp_path / "base.pt")
    assert all(torch.equal(base[name], own) for name, own in model.state_dict().items())


# ---- loading over a composed model ----


def test_a_base_loaded_over_a_composed_model(model, lora):
    """It fails half way: shapes of composed slots differ, all others are written."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qwenlora.compose_loras(model, lora[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(base)
    for look in (
        qwenlora.applied,
        qwenlora.reset_loras,
        lambda m: qwenlora.compose_loras(m, lora[0]),
    ):
        with pytest.raises(ModelStateError, match=r"the model was written to.*load_state_dict"):
            look(model)


def test_a_composed_state_loaded_over_a_composed_model(make_model, lora, Draft, tmp_path):
    """Its shapes are the same, its values are another stack's."""
    model, other = make_model(), make_model()
    qwenlora.compose_loras(model, lora[0])
    path = Draft.full(seed=7, rank=4).save(tmp_path / "other.safetensors")
    qwenlora.compose_loras(other, path)
    model.load_state_dict(other.state_dict())
    with pytest.raises(ModelStateError, match=r"the model was written to"):
        qwenlora.applied(model)
    with pytest.raises(ModelStateError, match="reload the model"):
        qwenlora.compose_loras(model, (lora[0], 0.5))


def through_deepcopy(model):
    return copy.deepcopy(model)


@pytest.mark.slow
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["base", "composed"])
@pytest.mark.parametrize("way", [lambda m: m, through_deepcopy, through_pickle, nn.ModuleList])
def test_however_a_state_is_loaded(assign, kind, way, make_model, lora, Draft, probe):
    """Whole or half way, into the model, a copy that nobody looked at, or a module around it."""
    model, other = make_model(), make_model(seed=1)
    wrapped = way is nn.ModuleList
    wrapper = ComfyQwenImageWrapper.of(model)
    qwenlora.compose_loras(model, lora[0])
    subject = way([model]) if wrapped else way(model)
    if kind == "composed":
        qwenlora.compose_loras(other, Draft.full(seed=7, rank=4).tensors)
    state = (nn.ModuleList([other]) if wrapped else other).state_dict()
    with contextlib.suppress(RuntimeError):
        subject.load_state_dict(state, assign=assign)
    own = model if wrapped else subject
    for look in (qwenlora.applied, qwenlora.reset_loras, probe.output):
        with pytest.raises(ModelStateError, match="load_state_dict"):
            look(own)
    if own is not model:
        assert wrapper.report.loras


def test_loading_is_heard_of_while_something_is_composed(model, lora):
    assert not model._load_state_dict_pre_hooks
    qwenlora.compose_loras(model, lora[0])
    qwenlora.compose_loras(model, (lora[0], 0.5))
    assert len(model._load_state_dict_pre_hooks) == 1
    qwenlora.reset_loras(model)
    assert not model._load_state_dict_pre_hooks


def test_a_factor_that_was_written_to(model, lora):
    qwenlora.compose_loras(model, lora[0])
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_qkv.proj_up.mul_(2)
    with pytest.raises(ModelStateError, match=r"`transformer_blocks\.0\.attn\.to_qkv` was written"):
        qwenlora.reset_loras(model)


@pytest.mark.parametrize(
    ("layer", "parameter"),
    [
        ("transformer_blocks.0.attn.to_out.0", "bias"),
        ("transformer_blocks.0.img_mod.1", "bias"),
        ("transformer_blocks.0.attn.norm_q", "weight"),
        ("txt_norm", "weight"),
        ("proj_out", "bias"),
    ],
)
def test_a_composed_value_that_was_written_to(layer, parameter, model, Draft, tmp_path):
    """A reset would put the composed model's base over what was loaded."""
    module = model.get_submodule(layer)
    role = "diff_b" if parameter == "bias" else "diff"
    size = module.get_parameter(parameter).numel()
    draft = Draft.full(seed=1, rank=4).put(layer, role, size)
    loaded = module.get_parameter(parameter).detach().clone()
    qwenlora.compose_loras(model, draft.save(tmp_path / "values.safetensors"))
    assert qwenlora.applied(model).complete
    module.load_state_dict({parameter: loaded}, strict=False)
    for look in (qwenlora.applied, qwenlora.reset_loras):
        with pytest.raises(ModelStateError, match=rf"`{layer}\.{parameter}` was written to"):
            look(model)


def test_a_value_that_no_lora_changed(model, lora):
    """A bias that is the model's own may change."""
    qwenlora.compose_loras(model, lora[0])
    with torch.no_grad():
        model.proj_out.bias.add_(1)
    assert qwenlora.applied(model).complete
    qwenlora.reset_loras(model)


def test_one_weight_that_is_somebodys_own(model, lora, probe):
    """A base weight beside a branch may change: the delta is what it was."""
    path, draft = lora
    qwenlora.compose_loras(model, path)
    with torch.no_grad():
        model.img_in.weight.add_(1)
    assert qwenlora.applied(model).complete
    qwenlora.compose_loras(model, (path, 0.5))
    probe.assert_holds(model, [(draft, 0.5)], within=2e-6)


def test_a_base_loaded_into_a_base(make_model, lora, probe):
    model, other = make_model(seed=0), make_model(seed=1)
    qwenlora.compose_loras(model, lora[0])
    qwenlora.reset_loras(model)
    model.load_state_dict(other.state_dict())
    assert not qwenlora.applied(model).loras
    before = probe.snapshot(model)
    qwenlora.compose_loras(model, lora[0])
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(before) == []


def test_moves_and_casts_are_no_writing(model, lora):
    qwenlora.compose_loras(model, lora[0])
    model.to(torch.float64).to(torch.float32)
    model.to("cpu")
    assert qwenlora.applied(model).complete
