"""Every kind of adapter on every kind of slot, against its dense float64 delta.

What a layer does is measured by calling it: composed minus base on the unit vectors is the delta.
The linears of the fused MLP are never called alone; there the packed ranks are read.
"""

from __future__ import annotations

import copy

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, LokrScale, LoraSpec, errors
from qwenlora.delta import truncate
from qwenlora.emulation import CPUOffloadManager, EmulatedConfig, Precision, random_transformer
from qwenlora.packing.pack import deinterleave_modulation, unpack_vector

BLOCK = "transformer_blocks.0"
CLOSE = 1e-3
"""Relative error: float32, and deltas of a ten-thousandth of the output that they are taken from;
wrong rows or a wrong scale show as 0.1 and more."""
SIZES = {
    f"{BLOCK}.attn.to_q": (128, 128),
    f"{BLOCK}.attn.to_add_out": (128, 128),
    f"{BLOCK}.img_mlp.net.0.proj": (128, 512),
    f"{BLOCK}.txt_mlp.net.2": (512, 128),
    f"{BLOCK}.img_mod.1": (128, 768),
    "proj_out": (128, 64),
    "img_in": (64, 128),
}
WIDE_SIZES = {
    f"{BLOCK}.attn.to_q": (256, 256),
    f"{BLOCK}.img_mod.1": (256, 1536),
    "norm_out.linear": (256, 512),
}


def slot_of(target: str) -> str:
    return target.replace("attn.to_q", "attn.to_qkv")


def measured(model, base, target: str, probe) -> torch.Tensor:
    """The (out, in) float64 delta of a target, rows as in files."""
    if "_mlp" in target:
        return probe.delta(model, target)
    inputs, outputs = SIZES[target]
    layers = [m.get_submodule(slot_of(target)) for m in (model, base)]
    rows = []
    with torch.no_grad():
        for unit in torch.eye(inputs).split(8):
            rows.append(layers[0](unit).double() - layers[1](unit).double())
        bias = layers[0](torch.zeros(1, inputs)) - layers[1](torch.zeros(1, inputs))
    delta = (torch.cat(rows) - bias.double()).mT
    if target.endswith("_mod.1"):
        delta = deinterleave_modulation(delta)
    return delta[:outputs]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def factor(draft, target: str, name: str, shape: tuple[int, int], rank: int | None):
    """Put a LoKr factor, whole or as two halves; its product in float64."""
    if rank is None:
        draft.put(target, name, *shape)
        return draft.tensors[draft.key(target, name)].double()
    draft.put(target, f"{name}_a", shape[0], rank).put(target, f"{name}_b", rank, shape[1])
    halves = [draft.tensors[draft.key(target, f"{name}_{h}")].double() for h in "ab"]
    return halves[0] @ halves[1]


def lokr(Draft, target: str, *, ranks=(None, None), split=4, alpha=None, seed=1):
    """A LoKr of one module: its draft, and its dense delta by numpy-style kron."""
    inputs, outputs = SIZES[target]
    draft = Draft(seed)
    w1 = factor(draft, target, "lokr_w1", (split, split), ranks[0])
    w2 = factor(draft, target, "lokr_w2", (outputs // split, inputs // split), ranks[1])
    scale = 1.0
    if alpha is not None:
        draft.tensors[draft.key(target, "alpha")] = torch.tensor(alpha)
        rank = ranks[1] or ranks[0]
        scale = alpha / rank if rank and alpha else 1.0
    return draft, scale * torch.kron(w1, w2)


@pytest.mark.parametrize("target", SIZES)
@pytest.mark.parametrize("ranks", [(None, None), (None, 3), (2, 3), (2, None)])
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_lokr_is_exact(target, ranks, strength, make_model, probe, Draft):
    base = make_model()
    model = copy.deepcopy(base)
    draft, dense = lokr(Draft, target, ranks=ranks, alpha=2.0)
    report = qwenlora.compose_loras(model, (draft.tensors, strength), strict=True)
    assert report.complete
    assert error(measured(model, base, target, probe), strength * dense) < CLOSE
    assert report.energy_lost == 0
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []


@pytest.mark.parametrize("target", list(WIDE_SIZES))
def test_high_rank_lokr_runs_as_a_kronecker_product(target, probe, Draft):
    base = wide_model()
    model = copy.deepcopy(base)
    inputs, outputs = WIDE_SIZES[target]
    draft = Draft(1).put(target, "lokr_w1", 16, 16)
    draft.put(target, "lokr_w2", outputs // 16, inputs // 16)
    w1, w2 = draft.tensors.values()
    report = qwenlora.compose_loras(model, (draft.tensors, 0.5), strict=True)
    (slot,) = report.slots
    assert (slot.krons, slot.rank_added) == (1, 0)
    dense = 0.5 * torch.kron(w1.double(), w2.double())
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(3))
    layers = [m.get_submodule(slot_of(target)) for m in (model, base)]
    with torch.no_grad():
        found = (layers[0](x) - layers[1](x)).double()
    if target.endswith("_mod.1"):
        found = deinterleave_modulation(found, dim=-1)
    assert error(found[:, :outputs], x.double() @ dense.mT) < CLOSE
    assert report.added_bytes == 4 * (w1.numel() + w2.numel())
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []


def wide_model(num_layers: int = 1):
    config = EmulatedConfig(
        num_layers=num_layers,
        heads=4,
        head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=96,
        rank=32,
        precision=Precision.EXACT,
        dtype=torch.float32,
    )
    return random_transformer(config, seed=0)


@pytest.mark.parametrize("budget", [16, 40, 128])
def test_lokr_in_the_fused_mlp_is_the_best_of_its_rank(budget, probe, Draft):
    target = f"{BLOCK}.img_mlp.net.0.proj"
    model = wide_model()
    draft = Draft(1).put(target, "lokr_w1", 16, 16).put(target, "lokr_w2", 64, 16)
    w1, w2 = draft.tensors.values()
    dense = torch.kron(w1.double(), w2.double())
    options = ComposeOptions(mlp="rank")
    report = qwenlora.compose_loras(
        model, draft.tensors, max_rank=budget, strict=True, options=options
    )
    values = torch.linalg.svdvals(dense)
    lost = float(values[budget:].square().sum() / values.square().sum())
    (slot,) = report.slots
    assert (slot.energy_lost or 0.0) == pytest.approx(lost, abs=1e-6)
    found = probe.delta(model, target)
    assert float((found - dense).norm() / dense.norm()) ** 2 == pytest.approx(lost, abs=1e-5)


def test_lokr_in_the_fused_mlp_is_exact_where_it_fits(probe, Draft):
    target = f"{BLOCK}.img_mlp.net.0.proj"
    model = wide_model()
    draft = Draft(1).put(target, "lokr_w1", 16, 16).put(target, "lokr_w2", 64, 16)
    dense = torch.kron(*(tensor.double() for tensor in draft.tensors.values()))
    options = ComposeOptions(truncated_rank=16, mlp="rank")
    report = qwenlora.compose_loras(model, draft.tensors, options=options)
    assert report.slots[0].rank_added == 256
    assert report.slots[0].energy_lost is None
    assert error(probe.delta(model, target), dense) < CLOSE


def test_both_factors_whole_are_not_scaled(make_model, probe, Draft):
    target = f"{BLOCK}.attn.to_add_out"
    base = make_model()
    draft, dense = lokr(Draft, target)
    draft.tensors[draft.key(target, "alpha")] = torch.tensor(float("inf"), dtype=torch.float16)
    model = copy.deepcopy(base)
    qwenlora.compose_loras(model, draft.tensors, strict=True)
    assert error(measured(model, base, target, probe), dense) < CLOSE


def test_the_network_s_scale_is_a_choice(make_model, probe, Draft, tmp_path):
    target = f"{BLOCK}.attn.to_add_out"
    base = make_model()
    draft, dense = lokr(Draft, target)
    path = draft.save(tmp_path / "a.safetensors", {"ss_network_alpha": "1", "ss_network_dim": "4"})
    for choice, scale in ((LokrScale.STANDARD, 1.0), (LokrScale.NETWORK, 0.25)):
        model = copy.deepcopy(base)
        qwenlora.compose_loras(model, path, options=ComposeOptions(lokr_scale=choice))
        assert error(measured(model, base, target, probe), scale * dense) < CLOSE


@pytest.mark.parametrize("target", SIZES)
def test_loha_is_exact(target, make_model, probe, Draft):
    inputs, outputs = SIZES[target]
    base = make_model()
    model = copy.deepcopy(base)
    draft = Draft(1)
    for index, rank in (("1", 3), ("2", 4)):
        draft.put(target, f"hada_w{index}_a", outputs, rank)
        draft.put(target, f"hada_w{index}_b", rank, inputs)
    draft.tensors[draft.key(target, "alpha")] = torch.tensor(1.5)
    half = {n: draft.tensors[draft.key(target, f"hada_w{n}")].double() for n in ("1_a", "1_b")}
    half |= {n: draft.tensors[draft.key(target, f"hada_w{n}")].double() for n in ("2_a", "2_b")}
    dense = 0.5 * (half["1_a"] @ half["1_b"]) * (half["2_a"] @ half["2_b"])
    report = qwenlora.compose_loras(model, draft.tensors, strict=True)
    assert report.slots[0].rank == 12
    assert error(measured(model, base, target, probe), dense) < CLOSE


def wide_loha(Draft, target: str, rank: int, dtype: torch.dtype = torch.float32):
    """A LoHa whose exact pair is wider than the matrix: its draft, and its dense float64 delta."""
    inputs, outputs = (256, 1024) if target.endswith("net.0.proj") else WIDE_SIZES[target]
    draft = Draft(1)
    for index in "12":
        # Falling columns, as training leaves them: equal ones would be the worst case.
        fall = torch.linspace(1, 0.1, rank)
        left, right = draft.random(outputs, rank) * fall, draft.random(rank, inputs)
        draft.tensors[draft.key(target, f"hada_w{index}_a")] = left.to(dtype)
        draft.tensors[draft.key(target, f"hada_w{index}_b")] = right.to(dtype)
    half = [tensor.double() for tensor in draft.tensors.values()]
    return draft, (half[0] @ half[1]) * (half[2] @ half[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [16, 100, 255])
@pytest.mark.parametrize("target", [f"{BLOCK}.img_mlp.net.0.proj", f"{BLOCK}.attn.to_q"])
def test_a_wide_loha_is_cut_to_the_best_of_its_rank(target, budget, dtype, probe, Draft):
    model = wide_model()
    draft, dense = wide_loha(Draft, target, 20, dtype)
    options = ComposeOptions(mlp="rank")
    report = qwenlora.compose_loras(
        model, draft.tensors, max_rank=budget, strict=True, options=options
    )
    values = torch.linalg.svdvals(dense)
    lost = float(values[budget:].square().sum() / values.square().sum())
    (slot,) = report.slots
    assert slot.rank == budget
    assert (slot.energy_lost or 0.0) == pytest.approx(lost, rel=1e-3, abs=1e-6)
    found = probe.delta(model, slot_of(target))[: dense.shape[0]]
    # No matrix of this rank is nearer than the root of `lost`.
    assert error(found, dense) ** 2 == pytest.approx(lost, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("target", [*WIDE_SIZES, f"{BLOCK}.img_mlp.net.0.proj"])
def test_a_wide_loha_is_exact_where_its_matrix_fits(target, probe, Draft):
    base = wide_model()
    model = copy.deepcopy(base)
    draft, dense = wide_loha(Draft, target, 20)
    report = qwenlora.compose_loras(model, draft.tensors, strict=True)
    (slot,) = report.slots
    assert (slot.rank, slot.energy_lost) == (256, None)
    layers = [m.get_submodule(slot_of(target)) for m in (model, base)]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = (layers[0](x) - layers[1](x)).double()
    if target.endswith("_mod.1"):
        found = deinterleave_modulation(found, dim=-1)
    assert error(found[:, : dense.shape[0]], x.double() @ dense.mT) < CLOSE


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_wide_loha_that_is_not_finite_names_the_module(bad, Draft):
    target = f"{BLOCK}.attn.to_q"
    draft, _ = wide_loha(Draft, target, 20)
    draft.tensors[draft.key(target, "hada_w2_b")][3, 4] = bad
    for limit in (None, 16):
        with pytest.raises(errors.NonFiniteError, match=r"to_q"):
            qwenlora.compose_loras(wide_model(), draft.tensors, max_rank=limit)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (64, 64)])
@pytest.mark.parametrize("rank", [1, 20, 59])
def test_the_best_of_a_matrix_is_that_of_its_svd(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    matrix[:, 3] = matrix[:, 4]  # a direction without any weight
    found = truncate.by_gram(matrix, rank)
    left, values, right = torch.linalg.svd(matrix.double())
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert error(found.up.double() @ found.down.double(), best) < 1e-4
    energy = values.square()
    assert found.share_lost == pytest.approx(float(energy[rank:].sum() / energy.sum()), abs=1e-6)


def test_lora_mid_is_a_product_of_three(make_model, probe, Draft):
    target = f"{BLOCK}.attn.to_add_out"
    base = make_model()
    model = copy.deepcopy(base)
    draft = Draft(1).put(target, "lora_down.weight", 6, 128, 1, 1)
    draft.put(target, "lora_mid.weight", 4, 6, 1, 1).put(target, "lora_up.weight", 128, 4, 1, 1)
    down, mid, up = (tensor.double().flatten(1) for tensor in draft.tensors.values())
    qwenlora.compose_loras(model, draft.tensors, strict=True)
    assert error(measured(model, base, target, probe), up @ mid @ down) < CLOSE


@pytest.mark.parametrize("target", ["proj_out", "img_in"])
def test_a_full_delta_of_a_plain_linear_is_exact(target, make_model, probe, Draft):
    inputs, outputs = SIZES[target]
    base = make_model()
    model = copy.deepcopy(base)
    draft = Draft(1).put(target, "diff", outputs, inputs).put(target, "diff_b", outputs)
    dense, bias = draft.tensors.values()
    report = qwenlora.compose_loras(model, (draft.tensors, -0.5), strict=True)
    assert report.slots[0].dense
    assert report.slots[0].values == ("bias",)
    assert error(measured(model, base, target, probe), -0.5 * dense.double()) < CLOSE
    moved = model.get_submodule(target).bias - base.get_submodule(target).bias
    assert torch.allclose(moved, -0.5 * bias, atol=1e-6)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []


@pytest.mark.parametrize(
    "target", [f"{BLOCK}.attn.to_add_out", f"{BLOCK}.img_mlp.net.0.proj", f"{BLOCK}.img_mod.1"]
)
def test_a_full_delta_of_a_quantized_layer_keeps_what_it_may(target, make_model, probe, Draft):
    inputs, outputs = SIZES[target]
    base = make_model()
    rank = 12
    low = Draft(2).random(outputs, rank) @ Draft(3).random(rank, inputs)
    noise = Draft(4).random(outputs, inputs)
    draft = Draft(1).add("proj_out", 4)
    draft.tensors[draft.key(target, "diff")] = low + noise * 0.3 * low.norm() / noise.norm()
    dense = draft.tensors[draft.key(target, "diff")].double()
    values = torch.linalg.svdvals(dense)
    lost = float(values[rank:].square().sum() / values.square().sum())
    assert 0.03 < lost < 0.1
    model = copy.deepcopy(base)
    options = ComposeOptions(truncated_rank=rank, max_energy_lost=lost * 1.01, dense_budget=0)
    report = qwenlora.compose_loras(model, draft.tensors, options=options, strict=True)
    found = {slot.path: slot.energy_lost for slot in report.slots}[target]
    assert found == pytest.approx(lost, rel=1e-3)
    assert error(measured(model, base, target, probe), dense) ** 2 == pytest.approx(lost, rel=1e-2)
    # Refused by name where it would lose more, the rest of the file applied.
    options = ComposeOptions(truncated_rank=rank, max_energy_lost=lost * 0.99, dense_budget=0)
    report = qwenlora.compose_loras(model, draft.tensors, options=options)
    (skip,) = [skip for skip in report.loras[0].skipped if skip.matters]
    assert (skip.name, skip.kind) == (target, "energy")
    assert [slot.path for slot in report.slots] == ["proj_out"]
    before = probe.snapshot(model)
    with pytest.raises(errors.EnergyLossError, match=f"`{target}` would be left out"):
        qwenlora.compose_loras(model, draft.tensors, options=options, strict=True)
    assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("role", ["diff_b", "lora_B.bias"])
@pytest.mark.parametrize("target", SIZES)
def test_bias_deltas_move_the_stored_bias(role, target, make_model, probe, Draft):
    base = make_model()
    model = copy.deepcopy(base)
    outputs = SIZES[target][1]
    draft = Draft(1).add(target, 4, alpha=2.0).put(target, role, outputs)
    bias = draft.tensors[draft.key(target, role)]
    report = qwenlora.compose_loras(model, (draft.tensors, 2.0), strict=True)
    assert report.complete
    slot = slot_of(target)
    moved = model.get_submodule(slot).bias - base.get_submodule(slot).bias
    if target.endswith("_mod.1"):
        moved = deinterleave_modulation(moved)
    elif hasattr(base.get_submodule(slot), "proj_down"):
        moved = unpack_vector(moved)
    factor_ = 2.0 * (0.5 if role == "lora_B.bias" else 1.0)
    assert torch.allclose(moved[:outputs], factor_ * bias, atol=1e-6)
    assert not moved[outputs:].any()
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []


def test_norms_are_moved_and_put_back(make_model, probe, Draft):
    base = make_model()
    model = copy.deepcopy(base)
    names = {"w_norm": "txt_norm", "diff": f"{BLOCK}.attn.norm_added_q"}
    draft = Draft(1)
    for role, target in names.items():
        draft.put(target, role, base.get_submodule(target).weight.numel())
    kept = {target: model.get_submodule(target).weight for target in names.values()}
    for strength in (0.5, -2.0):
        report = qwenlora.compose_loras(model, (draft.tensors, strength), strict=True)
        assert {slot.kind for slot in report.slots} == {"norm"}
        for role, target in names.items():
            moved = model.get_submodule(target).weight - base.get_submodule(target).weight
            delta = draft.tensors[draft.key(target, role)]
            assert torch.allclose(moved, strength * delta, atol=1e-6)
            assert model.get_submodule(target).weight is kept[target]
    assert not torch.equal(probe.output(model), probe.output(base))
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(probe.snapshot(base)) == []


def test_values_of_a_model_made_in_inference_mode(make_model, probe, Draft):
    with torch.inference_mode():
        model = make_model()
    base, output = probe.snapshot(model), probe.output(model)
    draft = Draft(1).put("txt_norm", "w_norm", 96).put(f"{BLOCK}.attn.to_add_out", "diff_b", 128)
    for _ in range(2):
        qwenlora.compose_loras(model, draft.tensors)
        assert not torch.equal(probe.output(model), output)
        qwenlora.reset_loras(model)
        assert probe.snapshot(model).tensors == base.tensors
        assert torch.equal(probe.output(model), output)
        assert not model.txt_norm.weight.data.is_inference()


def test_kinds_mix_in_one_file_and_stack(make_model, probe, Draft):
    base = make_model()
    model = copy.deepcopy(base)
    one, dense_one = lokr(Draft, f"{BLOCK}.attn.to_add_out", ranks=(None, 3))
    two = Draft(5).add(f"{BLOCK}.attn.to_add_out", 8).put("txt_norm", "w_norm", 96)
    mixed = Draft(6).add("proj_out", 4)
    mixed.put(f"{BLOCK}.attn.to_add_out", "diff_b", 128).put("img_in", "diff", 128, 64)
    stack = [(one.tensors, 0.5), (two.tensors, -1.5), (mixed.tensors, 1.0)]
    assert qwenlora.compose_loras(model, stack, strict=True).complete
    target = f"{BLOCK}.attn.to_add_out"
    expected = 0.5 * dense_one - 1.5 * two.deltas[target]
    assert error(measured(model, base, target, probe), expected) < CLOSE
    # Any history leads to the same bits.
    fresh = copy.deepcopy(base)
    qwenlora.compose_loras(fresh, stack)
    qwenlora.compose_loras(model, stack[:1])
    qwenlora.compose_loras(model, stack)
    assert probe.snapshot(model).tensors.keys() == probe.snapshot(fresh).tensors.keys()
    assert torch.equal(probe.output(model), probe.output(fresh))
    # A copy has a base of its own.
    other = copy.deepcopy(model)
    qwenlora.reset_loras(model)
    assert torch.equal(probe.output(other), probe.output(fresh))
    qwenlora.reset_loras(other)
    for restored in (model, other):
        assert probe.snapshot(restored).differences(probe.snapshot(base)) == []


def test_some_blocks_under_offload(probe, Draft):
    base = wide_model(4)
    stacks = []
    for seed in (1, 2):
        draft = Draft(seed)
        for block, split in ((0, 16), (2, 32)):
            target = f"transformer_blocks.{block}.attn.to_k"
            draft.put(target, "lokr_w1", split, split)
            draft.put(target, "lokr_w2", 256 // split, 256 // split)
        draft.put("transformer_blocks.1.attn.norm_q", "diff", 64)
        draft.put("transformer_blocks.3.img_mlp.net.2", "diff_b", 256)
        draft.put("transformer_blocks.3.txt_mod.1", "lokr_w1", 16, 16)
        draft.put("transformer_blocks.3.txt_mod.1", "lokr_w2", 96, 16)
        stacks.append([(draft.tensors, 0.5)])
    eager = copy.deepcopy(base)
    offloaded = copy.deepcopy(base)
    offloaded.set_offload(True)
    assert isinstance(offloaded.offload_manager, CPUOffloadManager)
    for stack in (stacks[0], stacks[1], [], stacks[0]):
        for model in (eager, offloaded):
            qwenlora.compose_loras(model, stack)
        assert torch.equal(probe.output(eager), probe.output(offloaded))
    # Offload turned on after composing.
    late = copy.deepcopy(eager)
    with pytest.raises(errors.ModelStateError, match="differ from block to block"):
        late.set_offload(True)
    assert torch.equal(probe.output(eager), probe.output(late))
    # The class's own leaves it to who composes next.
    type(late).set_offload(late, True)
    qwenlora.compose_loras(late, stacks[0])
    assert torch.equal(probe.output(eager), probe.output(late))


def test_one_lora_s_modulation_is_its_own(model, probe, Draft):
    target = f"{BLOCK}.img_mod.1"
    draft = Draft(1).add(target, 4).add("proj_out", 4)
    stack = [LoraSpec(draft.tensors, 1.0), LoraSpec(draft.tensors, 0.5, modulation=False)]
    report = qwenlora.compose_loras(model, stack)
    assert error(probe.delta(model, target), draft.deltas[target]) < CLOSE
    assert error(probe.delta(model, "proj_out"), 1.5 * draft.deltas["proj_out"]) < CLOSE
    assert [lora.complete for lora in report.loras] == [True, True]


@pytest.mark.parametrize("role", ["lokr_w1", "lokr_w2", "diff_b"])
def test_nan_is_named(role, model, probe, Draft):
    target = f"{BLOCK}.attn.to_add_out"
    draft, _ = lokr(Draft, target)
    draft.put(target, "diff_b", 128)
    draft.tensors[draft.key(target, role)].view(-1)[0] = float("nan")
    before = probe.snapshot(model)
    with pytest.raises(errors.NonFiniteError, match=target):
        qwenlora.compose_loras(model, draft.tensors)
    assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("part", ["first factor", "second factor", "hook", "both"])
def test_a_kronecker_branch_that_something_else_took_away(part, Draft):
    target = f"{BLOCK}.attn.to_q"
    draft = Draft(1).put(target, "lokr_w1", 16, 16).put(target, "lokr_w2", 16, 16)
    model = wide_model()
    qwenlora.compose_loras(model, draft.tensors)
    layer = model.get_submodule(slot_of(target))
    names = {"first factor": ["w1"], "second factor": ["w2"], "both": ["w1", "w2"], "hook": []}
    for name in names[part]:
        del layer._buffers[f"qwenlora_0_{name}"]
    if part == "hook":
        layer._forward_hooks.clear()
        # What is known of the layers is looked at again only where a tensor has changed.
        layer.register_buffer("theirs", torch.zeros(1), persistent=False)
    for call in (
        lambda: qwenlora.applied(model),
        lambda: qwenlora.reset_loras(model),
        lambda: qwenlora.compose_loras(model, draft.tensors),
    ):
        with pytest.raises(errors.ModelStateError, match="something else changed"):
            call()
