"""`compose_loras`, `reset_loras` and `applied` on tiny emulated models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, LoraSpec, _core, cache, compat, errors
from qwenlora.emulation import Precision
from qwenlora.group.load import Staged
from qwenlora.plan.documents import StackPlan
from qwenlora.slots.branch import BRANCH_DOWN, BRANCH_UP
from qwenlora.slots.find import find_targets

EXACT = 2e-6
"""Relative error of float32 tensors against float64 formulas."""

BLOCK = "transformer_blocks.0"


# ---- what a stack may look like ----


def _forms(path: Path, tensors):
    return {
        "Path": (path, 1.0),
        "str": (str(path), 1.0),
        "state dict": (tensors, 1.0),
        "pair": ((path, 0.5), 0.5),
        "pair of str and int": ((str(path), 2), 2.0),
        "pair of state dict": ((tensors, -0.5), -0.5),
        "LoraSpec": (LoraSpec(path, 0.25), 0.25),
        "LoraSpec of state dict": (LoraSpec(tensors, strength=0.25, name="mine"), 0.25),
        "list": ([path], 1.0),
        "tuple of items": ((LoraSpec(path),), 1.0),
        "list of pair": ([(path, 0.75)], 0.75),
        "mixed list": ([path, (tensors, 0.5), LoraSpec(str(path), -0.25)], 1.25),
        "the same twice": ([path, path], 2.0),
        "strength 0 is absent": ([(path, 0.0), (path, 1.5), LoraSpec(path, 0)], 1.5),
    }


@pytest.mark.parametrize("form", list(_forms(Path("x"), {})))
def test_every_form_of_a_stack(form, model, lora, probe):
    path, draft = lora
    loras, strength = _forms(path, draft.tensors)[form]
    report = qwenlora.compose_loras(model, loras)
    probe.assert_holds(model, [(draft, strength)], within=EXACT)
    assert report.complete
    assert qwenlora.applied(model) is report


@pytest.mark.parametrize("item", [3, None, [["x", 1.0]], [("x", "1.0")], [("x", 1.0, 2.0)]])
def test_other_forms_are_type_errors(item, model):
    with pytest.raises(TypeError):
        qwenlora.compose_loras(model, item)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_strengths_are_finite(strength, model, lora):
    with pytest.raises(ValueError, match=r"strength is .*: it must be finite"):
        qwenlora.compose_loras(model, (lora[0], strength))


def test_peft_folder(model, probe, Draft, tmp_path):
    draft = Draft.full(seed=3)
    folder = tmp_path / "peft"
    draft.save(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    qwenlora.compose_loras(model, folder)
    probe.assert_holds(model, [(draft, 2.0)], within=EXACT)
    # Another configuration beside the same weights is another LoRA.
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    qwenlora.compose_loras(model, folder)
    probe.assert_holds(model, [(draft, 4.0)], within=EXACT)


def test_kohya_keys_and_alphas(model, probe, Draft, kohya, tmp_path):
    draft = Draft(5, style=kohya)
    draft.add(f"{BLOCK}.attn.to_q", 8, alpha=2.0).add(f"{BLOCK}.attn.to_v", 3, alpha=12.0)
    draft.add(f"{BLOCK}.img_mod.1", 4, alpha=1.0).add("proj_out", 5, alpha=5.0)
    qwenlora.compose_loras(model, draft.save(tmp_path / "kohya.safetensors"))
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_of_files(dtype, model, probe, Draft, tmp_path):
    draft = Draft.full(seed=4, dtype=dtype)
    qwenlora.compose_loras(model, (draft.save(tmp_path / "a.safetensors"), 0.3))
    probe.assert_holds(model, [(draft, 0.3)], within=EXACT)


# ---- nothing to do ----


def test_the_same_stack_is_no_work(model, lora, probe, reads):
    stack = [(lora[0], 0.5), (lora[0], -0.25)]
    report = qwenlora.compose_loras(model, stack, max_rank=20)
    before, read = probe.addresses(model), (reads.plans, reads.tensors)
    assert qwenlora.compose_loras(model, list(stack), max_rank=20) is report
    assert probe.addresses(model) == before
    assert (reads.plans, reads.tensors) == read
    assert reads.open == 0


@pytest.mark.parametrize("change", ["strength", "order", "max_rank", "modulation", "name"])
def test_another_stack_is_work(change, model, lora, Draft, tmp_path):
    other = Draft.full(seed=8, rank=2).save(tmp_path / "other.safetensors")
    stack = [LoraSpec(lora[0]), LoraSpec(other)]
    report = qwenlora.compose_loras(model, stack)
    changed = {
        "strength": lambda: qwenlora.compose_loras(model, [stack[0], LoraSpec(other, 0.5)]),
        "order": lambda: qwenlora.compose_loras(model, stack[::-1]),
        "max_rank": lambda: qwenlora.compose_loras(model, stack, max_rank=3),
        "modulation": lambda: qwenlora.compose_loras(
            model, stack, options=ComposeOptions(modulation=False)
        ),
        "name": lambda: qwenlora.compose_loras(model, [stack[0], LoraSpec(other, name="n")]),
    }[change]()
    assert changed is not report
    assert qwenlora.applied(model) is changed


def _absent(path: Path):
    return {
        "nothing": [],
        "no items": (),
        "one of strength 0": (path, 0),
        "all of strength 0": [(path, 0.0), LoraSpec(path, -0.0)],
        "a file that is not there": [("missing.safetensors", 0.0)],
    }


@pytest.mark.parametrize("form", list(_absent(Path("x"))))
@pytest.mark.parametrize("composed_before", [False, True])
def test_an_empty_stack_is_a_model_never_touched(form, composed_before, model, lora, probe):
    before, output = probe.snapshot(model), probe.output(model)
    if composed_before:
        qwenlora.compose_loras(model, lora[0])
        assert probe.snapshot(model).differences(before)
        assert not torch.equal(probe.output(model), output)
    report = qwenlora.compose_loras(model, _absent(lora[0])[form])
    assert probe.snapshot(model).differences(before) == []
    assert torch.equal(probe.output(model), output)
    assert report.summary() == "base model: no LoRA"
    assert report.complete
    assert qwenlora.applied(model) == report


def test_parameters_stay_the_same_objects(model, lora):
    before = dict(model.named_parameters())
    qwenlora.compose_loras(model, lora[0])
    qwenlora.reset_loras(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_no_base_tensor_is_written_to(model, lora, probe):
    kept = {name: tensor.data for name, tensor in probe.tensors(model)}
    values = {name: tensor.clone() for name, tensor in kept.items()}
    qwenlora.compose_loras(model, lora[0])
    qwenlora.compose_loras(model, (lora[0], 2.0))
    assert all(torch.equal(kept[name], values[name]) for name in kept)


# ---- the report ----


def test_report_of_a_whole_lora(model, lora, probe):
    bytes_before = sum(tensor.nbytes for _, tensor in probe.tensors(model))
    report = qwenlora.compose_loras(model, (lora[0], 0.5))
    (entry,) = report.loras
    assert (entry.name, entry.strength) == ("full", 0.5)
    assert entry.modules_applied == len(lora[1].deltas)
    assert (entry.skipped, entry.zero_slots, entry.all_zero) == ((), (), False)
    assert report.complete
    assert report.failure is None
    assert report.energy_lost == 0.0
    assert {slot.energy_lost for slot in report.slots} == {None}
    slots = {slot.path: slot for slot in report.slots}
    qkv = slots[f"{BLOCK}.attn.to_qkv"]
    assert (qkv.kind, qkv.base_rank, qkv.rank, qkv.rank_added) == ("svdq", 32, 12, 16)
    for path, kind in ((f"{BLOCK}.img_mod.1", "awq"), ("proj_out", "linear")):
        side = slots[path]
        assert (side.kind, side.base_rank, side.rank, side.rank_added) == (kind, 0, 4, 4)
    bytes_after = sum(tensor.nbytes for _, tensor in probe.tensors(model))
    assert report.added_bytes == bytes_after - bytes_before
    assert "\n" not in report.summary()
    assert report.summary().startswith(f"1 LoRA on {len(slots)} slots, rank +4 to +16, ")
    assert report.summary().endswith("; complete")
    assert "full x 0.5: 20 modules" in report.text()
    assert json.loads(json.dumps(report.to_dict()))["complete"] is True


def test_shared_downs_are_counted_once(model, probe, Draft):
    draft = Draft(1)
    shared = draft.random(5, 128)
    draft.add(f"{BLOCK}.attn.to_q", 5, down=shared, alpha=2.0)
    draft.add(f"{BLOCK}.attn.to_k", 7)
    draft.add(f"{BLOCK}.attn.to_v", 5, down=shared.clone(), alpha=4.0)
    report = qwenlora.compose_loras(model, draft.tensors)
    assert (report.slots[0].rank, report.slots[0].rank_added) == (12, 16)
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)


def test_skipped_tensors_of_other_components_do_not_matter(model, Draft):
    draft = Draft(1).add("proj_out", 4)
    draft.tensors["lora_te1_text_model_encoder.lora_down.weight"] = torch.ones(4, 8)
    report = qwenlora.compose_loras(model, draft.tensors, strict=True)
    (skip,) = report.loras[0].skipped
    assert (skip.kind, skip.reason, skip.matters) == ("foreign", "text encoder", False)
    assert report.complete
    assert "ignored: 1 x text encoder" in report.text()


def test_a_zero_lora_is_said_to_be_zero(model, probe, Draft):
    untouched = probe.snapshot(model)
    zero = Draft(1).add("proj_out", 4, up=torch.zeros(64, 4))
    zero.add(f"{BLOCK}.attn.to_k", 4, down=torch.zeros(4, 128))
    report = qwenlora.compose_loras(model, LoraSpec(zero.tensors, name="untrained"))
    (entry,) = report.loras
    assert entry.all_zero
    assert set(entry.zero_slots) == {"proj_out", f"{BLOCK}.attn.to_qkv"}
    assert report.slots == ()
    assert "`untrained` is all zero" in report.summary()
    assert "its delta is all zero" in report.text()
    assert probe.snapshot(model).tensors == untouched.tensors
    # In one slot only, beside a LoRA that is not zero there.
    partly = Draft(2).add("proj_out", 4).add("img_in", 4, up=torch.zeros(128, 4))
    report = qwenlora.compose_loras(model, [zero.tensors, partly.tensors])
    assert [lora.all_zero for lora in report.loras] == [True, False]
    assert report.loras[1].zero_slots == ("img_in",)
    assert [(slot.path, slot.rank) for slot in report.slots] == [("proj_out", 4)]
    # A LoRA's zero takes the place of another's delta.
    qwenlora.compose_loras(model, zero.tensors)
    assert probe.snapshot(model).tensors == untouched.tensors


def test_modulation_turned_off_is_reported_and_no_failure(model, lora, probe):
    report = qwenlora.compose_loras(
        model, lora[0], strict=True, options=ComposeOptions(modulation=False)
    )
    skipped = {skip.name: skip for skip in report.loras[0].skipped}
    assert set(skipped) == {f"{BLOCK}.img_mod.1", f"{BLOCK}.txt_mod.1"}
    assert {skip.kind for skip in skipped.values()} == {"turned_off"}
    assert report.complete
    assert probe.delta(model, f"{BLOCK}.img_mod.1").norm() == 0


def test_progress_is_told(model, lora):
    calls = []
    options = ComposeOptions(progress=lambda *call: calls.append(call))
    report = qwenlora.compose_loras(model, lora[0], options=options)
    count = len(report.slots)
    assert calls == [(phase, n, count) for phase in ("stage", "write") for n in range(count)]


@pytest.mark.parametrize("max_rank", [1, 5, 16, 20])
def test_max_rank_holds_in_every_slot(max_rank, model, Draft):
    stack = [Draft.full(seed=seed, rank=9).tensors for seed in (1, 2)]
    report = qwenlora.compose_loras(model, stack, max_rank=max_rank)
    for slot in report.slots:
        held = model.get_submodule(slot.path)
        assert slot.rank <= max_rank
        padded = -(-max_rank // 16) * 16 if slot.kind == "svdq" else max_rank
        assert slot.rank_added <= padded
        if slot.kind == "svdq":
            assert held.proj_down.shape[1] == held.proj_up.shape[1] == 32 + slot.rank_added
        else:
            assert held.get_buffer(BRANCH_DOWN).shape[0] == slot.rank_added
            assert held.get_buffer(BRANCH_UP).shape[1] == slot.rank_added
    assert report.energy_lost > 0
    assert "slots compressed, up to" in report.summary()


# ---- copies, dtypes, modes ----


def test_a_copy_of_a_composed_model_stands_alone(model, lora, probe):
    untouched = probe.snapshot(model)
    qwenlora.compose_loras(model, lora[0])
    composed, output = probe.snapshot(model), probe.output(model)
    twin = copy.deepcopy(model)
    assert probe.snapshot(twin).differences(composed) == []
    assert torch.equal(probe.output(twin), output)
    qwenlora.reset_loras(twin)
    assert probe.snapshot(twin).differences(untouched) == []
    assert probe.snapshot(model).differences(composed) == []
    assert torch.equal(probe.output(model), output)
    twin = copy.deepcopy(model)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(untouched) == []
    assert probe.snapshot(twin).differences(composed) == []
    qwenlora.compose_loras(twin, (lora[0], -1.0))
    probe.assert_holds(twin, [(lora[1], -1.0)], within=EXACT)
    assert torch.equal(probe.output(twin), probe.output(copy.deepcopy(twin)))


def test_a_copy_of_one_block_carries_its_side_branches(model, lora):
    qwenlora.compose_loras(model, lora[0])
    twin = copy.deepcopy(model.transformer_blocks[0])
    x = torch.ones(1, 128)
    expected = model.transformer_blocks[0].img_mod(x)
    qwenlora.reset_loras(model)
    with torch.no_grad():
        assert torch.equal(twin.img_mod(x), expected)
        assert not torch.equal(model.transformer_blocks[0].img_mod(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(dtype, make_model, lora, probe):
    model = make_model(dtype=dtype)
    before, output = probe.snapshot(model), probe.output(model)
    qwenlora.compose_loras(model, (lora[0], 0.7))
    probe.assert_holds(model, [(lora[1], 0.7)], within=2 * torch.finfo(dtype).eps)
    assert {p.dtype for n, p in model.named_parameters() if "proj_" in n} == {dtype}
    assert {b.dtype for b in model.buffers()} == {dtype}
    assert not torch.equal(probe.output(model), output)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_composed_model_may_be_cast(dtype, make_model, lora, probe):
    model = make_model(precision=Precision.W4A4)
    base = copy.deepcopy(model).to(dtype)
    untouched, fresh = probe.snapshot(base), copy.deepcopy(base)
    qwenlora.compose_loras(fresh, lora[0])
    qwenlora.compose_loras(model, lora[0])
    model.to(dtype)
    assert probe.snapshot(model).differences(probe.snapshot(fresh)) == []
    assert torch.isfinite(probe.output(model)).all()
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(untouched) == []


def test_callers_in_inference_mode(model, lora, probe):
    untouched = probe.snapshot(model)
    with torch.inference_mode():
        qwenlora.compose_loras(model, [lora[0], (dict(lora[1].tensors), 0.5)])
        tensors = [tensor for _, tensor in probe.tensors(model)]
        assert not any(tensor.is_inference() for tensor in tensors)
        kept = [own for own in cache.pieces.values() if isinstance(own, Staged)]
        assert kept
        assert not any(own.bytes.is_inference() for own in kept)
    probe.assert_holds(model, [(lora[1], 1.5)], within=EXACT)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(untouched) == []


def test_models_made_in_inference_mode(make_model, lora, probe):
    with torch.inference_mode():
        model = make_model()
    untouched, output = probe.snapshot(model), probe.output(model)
    parameters = dict(model.named_parameters())
    fresh = make_model()
    qwenlora.compose_loras(fresh, lora[0])
    for strength in (0.5, 1.0):
        qwenlora.compose_loras(model, (lora[0], strength))
    assert probe.snapshot(model).differences(probe.snapshot(fresh)) == []
    assert torch.equal(probe.output(model), probe.output(fresh))
    twin = copy.deepcopy(model)
    qwenlora.reset_loras(twin)
    qwenlora.reset_loras(model)
    for reset in (model, twin):
        assert probe.snapshot(reset).differences(untouched) == []
        assert torch.equal(probe.output(reset), output)
    assert list(dict(model.named_parameters())) == list(parameters)


def test_state_dicts_of_inference_tensors(model, lora, probe):
    draft = lora[1]
    with torch.inference_mode():
        tensors = {key: tensor.clone() for key, tensor in draft.tensors.items()}
        qwenlora.compose_loras(model, tensors)
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)
    assert not any(tensor.is_inference() for _, tensor in probe.tensors(model))


def test_a_state_dict_changed_in_place_is_another_lora(model, probe, Draft):
    draft = Draft(1).add("proj_out", 4)
    report = qwenlora.compose_loras(model, draft.tensors)
    assert qwenlora.compose_loras(model, dict(draft.tensors)) is report
    draft.tensors[draft.key("proj_out", "up")].mul_(3.0)
    assert qwenlora.compose_loras(model, draft.tensors) is not report
    probe.assert_holds(model, [(draft, 3.0)], within=EXACT)


def test_state_dicts_are_not_written_to(model, lora):
    before = {key: tensor.clone() for key, tensor in lora[1].tensors.items()}
    qwenlora.compose_loras(model, [(lora[1].tensors, 0.5), (lora[1].tensors, 2.0)])
    assert all(torch.equal(lora[1].tensors[key], before[key]) for key in before)


def test_state_dicts_that_require_gradients(model, probe, Draft):
    draft = Draft.full(seed=2)
    tensors = {key: t.clone().requires_grad_() for key, t in draft.tensors.items()}
    qwenlora.compose_loras(model, tensors)
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)
    assert not any(buffer.requires_grad for buffer in model.buffers())


# ---- forward ----


@pytest.mark.parametrize("target", ["proj_out", f"{BLOCK}.img_mod.1", f"{BLOCK}.attn.to_q"])
def test_each_kind_of_slot_changes_the_output(target, model, probe, Draft):
    before = probe.output(model)
    draft = Draft(1).add(target, 4)
    qwenlora.compose_loras(model, (draft.tensors, 4.0))
    strong = probe.output(model) - before
    assert strong.norm() > 1e-3 * before.norm()
    qwenlora.compose_loras(model, (draft.tensors, 1e-3))
    assert 0 < (probe.output(model) - before).norm() < 1e-2 * strong.norm()


def test_layers_add_the_delta_of_their_input(model, lora, probe):
    base = copy.deepcopy(model)
    qwenlora.compose_loras(model, lora[0])
    for path in ("img_in", f"{BLOCK}.attn.to_qkv", f"{BLOCK}.txt_mod.1"):
        layer, plain = model.get_submodule(path), base.get_submodule(path)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            change = layer(x) - plain(x)
        delta = probe.delta(model, path)
        if "mod" in path:  # the layer's rows are interleaved: (C, 6) -> (6, C)
            change = change.view(3, -1, 6).transpose(1, 2).reshape(3, -1)
        assert torch.allclose(change.double(), x.double() @ delta.T, atol=1e-5)


def test_side_branches_take_keyword_arguments(model, Draft):
    draft = Draft(1).add("img_in", 4)
    qwenlora.compose_loras(model, draft.tensors)
    x = torch.ones(1, 64)
    with torch.no_grad():
        assert torch.equal(model.img_in(input=x), model.img_in(x))
        assert not torch.equal(model.img_in(input=x), torch.nn.Linear.forward(model.img_in, x))


def test_side_branches_are_not_saved(model, lora):
    keys = list(model.state_dict())
    qwenlora.compose_loras(model, lora[0])
    assert list(model.state_dict()) == keys


def test_other_hooks_stay(model, lora, probe):
    seen = []
    handle = model.proj_out.register_forward_hook(lambda *_: seen.append(1))
    before = probe.snapshot(model)
    qwenlora.compose_loras(model, lora[0])
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(before) == []
    probe.output(model)
    assert seen == [1]
    handle.remove()


# ---- slots that share an offload buffer ----


def _offloaded(find):
    """Targets as they would be under offload: every block's slots share one buffer."""

    def found(model, base_ranks):
        targets = find(model, base_ranks)
        return {
            path: t._replace(row=t.row._replace(offloaded=path.startswith("transformer_blocks.")))
            for path, t in targets.items()
        }

    return found


def test_offloaded_slots_are_planned_in_groups(make_model, Draft):
    model = make_model(num_layers=3)
    draft = Draft(1).add("transformer_blocks.0.attn.to_q", 20)
    draft.add("transformer_blocks.2.attn.to_k", 40).add("transformer_blocks.1.txt_mod.1", 5)
    draft.add("proj_out", 3)
    rows = [t.row for t in _offloaded(find_targets)(model, {}).values()]
    tensors = [(k, "F32", list(t.shape), t.nbytes) for k, t in draft.tensors.items()]
    plan = _core.FilePlan.from_tensors(
        "x", tensors, scalars=[None] * len(tensors), metadata=[], same=lambda *_: True
    )
    options = {"max_rank": None, "strict": False, "truncated_rank": 256}
    options["lokr_scale"] = "standard"
    core = _core.plan_stack([("x", plan, 1.0, True, [])], _core.SlotMap(rows), json.dumps(options))
    stack = StackPlan(core)
    groups = {group.pattern: group for group in stack.groups}
    assert {name: group.rank for name, group in groups.items()} == {
        "transformer_blocks.*.attn.to_qkv": 48,
        "transformer_blocks.*.txt_mod.1": 16,
    }
    qkv = groups["transformer_blocks.*.attn.to_qkv"]
    assert qkv.slots == tuple(f"transformer_blocks.{n}.attn.to_qkv" for n in range(3))
    assert {slot.path: slot.group is None for slot in stack.slots}["proj_out"]
    added = 4 * (3 * 48 * (128 + 384) + 3 * 16 * (128 + 768) + 16 * (128 + 64))
    assert stack.added_bytes == added


# ---- names of the earlier loader ----


def test_compat(model, lora, probe):
    untouched = probe.snapshot(model)
    configs = [(lora[0], 0.5), (str(lora[0]), 0.25, {"save_precompiled": True})]
    assert compat.compose_loras_v2(model, configs) is True
    probe.assert_holds(model, [(lora[1], 0.75)], within=EXACT)
    compat.compose_loras_v2(model, configs, apply_awq_mod=False, cache_dir="x")
    assert probe.delta(model, f"{BLOCK}.img_mod.1").norm() == 0
    assert compat.reset_lora_v2(model) is None
    assert probe.snapshot(model).differences(untouched) == []
    with pytest.raises(errors.LoraReadError):
        compat.compose_loras_v2(model, [("missing.safetensors", 1.0)])
