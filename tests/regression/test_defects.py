"""Defects that users of the earlier loader met, one test each; numbers are the catalogue's."""

from __future__ import annotations

import copy

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, _reference, errors

BLOCK = "transformer_blocks.0"
QKV = f"{BLOCK}.attn.to_qkv"
EXACT = 2e-6


@pytest.mark.parametrize(
    "members", [("to_q", "to_v"), ("to_k",), ("to_v",), ("add_k_proj", "to_q"), ("add_v_proj",)]
)
def test_d2_missing_members_of_q_k_v(members, model, probe, Draft):
    """Q and V alone, or any one: the attention was dropped unsaid; now a member missing is zero."""
    draft = Draft(2)
    for name in members:
        draft.add(f"{BLOCK}.attn.{name}", 4, alpha=2.0)
    report = qwenlora.compose_loras(model, draft.tensors)
    assert report.complete
    assert report.loras[0].modules_applied == len(members)
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        rows = probe.delta(model, QKV)[part * 128 : (part + 1) * 128]
        assert (rows.norm() > 0) == (name in members)


def test_d2_missing_members_cost_no_rank(model, Draft):
    """Members that a file lacks took rank; a LoRA of one member takes that member's rank."""
    report = qwenlora.compose_loras(model, Draft(2).add(f"{BLOCK}.attn.to_k", 16).tensors)
    assert [(slot.rank, slot.rank_added) for slot in report.slots] == [(16, 16)]


def test_d3_ranks_differ_within_q_k_v(model, probe, Draft):
    """Ranks that differ in Q, K and V dropped the layer; each member keeps its own rank."""
    draft = Draft(3)
    for name, rank in (("to_q", 3), ("to_k", 17), ("to_v", 8)):
        draft.add(f"{BLOCK}.attn.{name}", rank)
    report = qwenlora.compose_loras(model, draft.tensors)
    assert [(slot.rank, slot.rank_added) for slot in report.slots] == [(28, 32)]
    assert report.complete
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)


@pytest.mark.parametrize("alphas", [(1.0, 1.0, 2.0), (1.0, None, 1.0), (None, 16.0, 4.0)])
@pytest.mark.parametrize("is_shared", [False, True])
def test_d4_alphas_differ_within_q_k_v(alphas, is_shared, model, probe, Draft):
    """Differing or missing alphas were discarded, up to 16 times too strong; each member scales."""
    draft = Draft(4)
    down = draft.random(16, 128) if is_shared else None
    for name, alpha in zip(("to_q", "to_k", "to_v"), alphas, strict=True):
        draft.add(f"{BLOCK}.attn.{name}", 16, alpha=alpha, down=down)
    report = qwenlora.compose_loras(model, (draft.tensors, 0.75))
    assert report.slots[0].rank == (16 if is_shared else 48)
    probe.assert_holds(model, [(draft, 0.75)], within=EXACT)


def test_d5_equal_downs_share_their_rank(model, probe, Draft):
    """A LoRA trained on the fused layer cost three times its rank; equal downs are stored once."""
    draft = Draft(5)
    down = draft.random(16, 128)
    for name in ("to_q", "to_k", "to_v"):
        draft.add(f"{BLOCK}.attn.{name}", 16, down=down.clone())
    report = qwenlora.compose_loras(model, draft.tensors)
    assert [(slot.rank, slot.rank_added) for slot in report.slots] == [(16, 16)]
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)


def test_d5_downs_that_differ_in_one_bit_are_not_shared(model, probe, Draft):
    """Sharing must not touch what differs: nearly equal downs keep their own ranks."""
    draft = Draft(5)
    down = draft.random(8, 128)
    near = down.clone()
    near[3, 5] = torch.nextafter(near[3, 5], torch.tensor(9.0))
    draft.add(f"{BLOCK}.attn.to_q", 8, down=down).add(f"{BLOCK}.attn.to_k", 8, down=near)
    report = qwenlora.compose_loras(model, draft.tensors)
    assert report.slots[0].rank == 16
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)


def test_d6_ranks_beyond_1024(make_model, probe, Draft):
    """Past rank 1024 the kernels read out of bounds, undefined output; now compressed and said."""
    model = make_model(rank=128)
    stack = []
    for seed in range(3):
        draft = Draft(seed)
        for name in ("to_q", "to_k", "to_v"):
            draft.add(f"{BLOCK}.attn.{name}", 128)
        stack.append(draft)
    report = qwenlora.compose_loras(model, [draft.tensors for draft in stack])
    (slot,) = report.slots
    assert slot.base_rank + slot.rank_added <= 1024
    assert model.get_submodule(QKV).proj_down.shape[1] == 128 + slot.rank_added
    # The sum of nine deltas of 128 columns has rank 128: nothing of it is lost.
    assert slot.energy_lost == pytest.approx(0.0, abs=1e-6)
    assert "compressed" in report.summary()
    probe.assert_holds(model, [(draft, 1.0) for draft in stack], within=1e-5)
    assert torch.isfinite(probe.output(model)).all()


@pytest.mark.parametrize("strict", [False, True])
def test_d7_one_module_that_does_not_fit(strict, model, probe, Draft):
    """A mismatch raised midway and left half composed; it is skipped and said, or raised before."""
    draft = Draft(7).add(f"{BLOCK}.attn.to_q", 4).add(f"{BLOCK}.attn.to_out.0", 4)
    misfit = f"{BLOCK}.img_mlp.net.2"
    draft.put(misfit, "down", 4, 64).put(misfit, "up", 128, 4)
    draft.add("proj_out", 4)
    before = probe.snapshot(model)
    if strict:
        with pytest.raises(errors.ShapeMismatchError, match=misfit):
            qwenlora.compose_loras(model, draft.tensors, strict=True)
        assert probe.snapshot(model).differences(before) == []
        return
    report = qwenlora.compose_loras(model, draft.tensors)
    assert [skip.name for skip in report.loras[0].skipped] == [misfit]
    assert [slot.path for slot in report.slots] == [QKV, f"{BLOCK}.attn.to_out.0", "proj_out"]
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)


def test_d8_halves_of_different_rank(model, Draft):
    """A pair whose halves differ in rank was passed over unsaid; it is reported with both ranks."""
    target = f"{BLOCK}.attn.to_q"
    draft = Draft(8).add("proj_out", 4).put(target, "down", 4, 128).put(target, "up", 128, 8)
    report = qwenlora.compose_loras(model, draft.tensors)
    (skip,) = report.loras[0].skipped
    assert (skip.name, skip.kind) == (target, "broken")
    assert skip.reason == "the halves differ in rank: down has 4, up has 8"
    assert not report.complete
    with pytest.raises(errors.BrokenPairError):
        qwenlora.compose_loras(model, draft.tensors, strict=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_d9_float8_files(dtype, model, probe, Draft, tmp_path):
    """A float8 LoRA failed at sampling, torch cannot multiply float8; it scales in float32."""
    draft = Draft.full(seed=9, rank=6, dtype=dtype)
    down = draft.random(6, 128)
    for name in ("to_q", "to_k"):
        draft.add(f"{BLOCK}.attn.{name}", 6, down=down, alpha=3.0)
    qwenlora.compose_loras(model, (draft.save(tmp_path / "f8.safetensors"), 0.3))
    probe.assert_holds(model, [(draft, 0.3)], within=EXACT)
    qwenlora.compose_loras(model, (tmp_path / "f8.safetensors", 0.3), max_rank=4)
    assert qwenlora.applied(model).energy_lost > 0


@pytest.mark.parametrize("ending", ["reset", "another", "turned off", "strength 0"])
def test_d13_modulation_is_removed(ending, model, probe, Draft):
    """Modulation deltas outlived reset, other LoRAs and the switch; they leave with their stack."""
    mods = [f"{BLOCK}.img_mod.1", f"{BLOCK}.txt_mod.1"]
    draft = Draft(13).add(mods[0], 4).add(mods[1], 4).add("proj_out", 4)
    other = Draft(14).add("proj_out", 4)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(3))
    layers = [model.get_submodule(path) for path in mods]
    with torch.no_grad():
        before = [layer(x) for layer in layers]
        qwenlora.compose_loras(model, draft.tensors)
        assert not any(torch.equal(layer(x), y) for layer, y in zip(layers, before, strict=True))
        if ending == "reset":
            qwenlora.reset_loras(model)
        elif ending == "another":
            qwenlora.compose_loras(model, other.tensors)
        elif ending == "turned off":
            options = ComposeOptions(modulation=False)
            qwenlora.compose_loras(model, draft.tensors, options=options)
        else:
            qwenlora.compose_loras(model, (draft.tensors, 0.0))
        assert all(torch.equal(layer(x), y) for layer, y in zip(layers, before, strict=True))
    for layer in layers:
        assert not layer._forward_hooks
        assert not layer._buffers


@pytest.mark.parametrize("kind", ["modulation", "plain linear", "all zero", "attention"])
def test_d20_a_stack_is_composed_once(kind, model, Draft):
    """A LoRA without packed layers was composed at each call again; the same stack is no work."""
    target = {"modulation": f"{BLOCK}.img_mod.1", "attention": f"{BLOCK}.attn.to_k"}
    draft = Draft(20).add(target.get(kind, "norm_out.linear"), 4)
    if kind == "all zero":
        draft.tensors[draft.key("norm_out.linear", "up")].zero_()
    done = []
    options = qwenlora.ComposeOptions(progress=lambda phase, *_: done.append(phase))
    report = qwenlora.compose_loras(model, draft.tensors, options=options)
    assert done == ["stage", "write"]
    assert qwenlora.compose_loras(model, draft.tensors, options=options) is report
    assert len(done) == 2


def test_modulation_rows_are_interleaved(model, Draft):
    """Planar rows were added to interleaved outputs, 1.36 times the delta wrong; rows are moved."""
    path = f"{BLOCK}.img_mod.1"
    draft = Draft(1).add(path, 4)
    layer = model.get_submodule(path)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = layer(x)
        qwenlora.compose_loras(model, draft.tensors)
        change = (layer(x) - before).T  # (6*C, 3)
    planar = _reference.deinterleave_modulation(change)
    wanted = draft.deltas[path] @ x.double().T
    assert torch.allclose(planar.double(), wanted, atol=1e-5)
    assert (change.double() - wanted).norm() > wanted.norm()


@pytest.mark.parametrize("plane", range(6))
def test_a_plane_of_the_modulation_stays_that_plane(plane, make_model, Draft):
    """Each plane was spread over all six; the block's chunks give the plane that was trained."""
    model = make_model()
    base = copy.deepcopy(model)
    up = torch.zeros(6 * 128, 2)
    up[plane * 128 : (plane + 1) * 128] = 1.0
    qwenlora.compose_loras(model, Draft(1).add(f"{BLOCK}.txt_mod.1", 2, up=up).tensors)
    x = torch.ones(1, 128)
    with torch.no_grad():
        change = model.transformer_blocks[0].txt_mod(x) - base.transformer_blocks[0].txt_mod(x)
    # As the block undoes it: (B, 6C) -> (B, C, 6) -> (B, 6, C), then six chunks.
    planes = change.view(1, -1, 6).transpose(1, 2).reshape(1, -1).chunk(6, dim=-1)
    assert [bool(p.abs().max() > 1e-4) for p in planes] == [n == plane for n in range(6)]


@pytest.mark.parametrize("strength", [0.3, -1.0, 2.5])
def test_strength_acts_on_the_packed_fragments_of_its_lora(strength, make_model, probe, Draft):
    """Scaling columns of a packed tensor was 71 % wrong; a new strength scales its LoRA's ranks."""
    model = make_model()
    first, second = (Draft(seed) for seed in (1, 2))
    for draft, rank in ((first, 20), (second, 9)):
        draft.add(f"{BLOCK}.attn.to_q", rank).add(f"{BLOCK}.attn.to_v", 5)
        draft.add(f"{BLOCK}.img_mlp.net.2", rank)
    base = copy.deepcopy(model)
    qwenlora.compose_loras(model, [first.tensors, second.tensors])
    qwenlora.compose_loras(model, [(first.tensors, strength), second.tensors])
    probe.assert_holds(model, [(first, strength), (second, 1.0)], within=EXACT)
    # Nothing of the base moved with it.
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []
