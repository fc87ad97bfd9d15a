"""Optimal compression against the SVD of the dense sum, and the kernels' limit of 1024."""

from __future__ import annotations

import pytest
import torch

import qwenlora
from qwenlora.delta.compress import LowRankSum, decomposed
from qwenlora.packing.layout import MAX_RANK

TARGET = "transformer_blocks.0.attn.to_out.0"
QKV = "transformer_blocks.0.attn.to_qkv"


def factors(ranks, *, inputs=96, outputs=160, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rank, inputs, generator=generator).to(dtype),
            torch.randn(outputs, rank, generator=generator).to(dtype) / (1 + index),
        )
        for index, rank in enumerate(ranks)
    ]


def compress(pairs, rank):
    return decomposed(LowRankSum.of(pairs)).cut(rank)


def dense(pairs):
    return sum(up.double() @ down.double() for down, up in pairs)


def best(matrix, rank):
    """The best approximation of this rank, and the energy that it lacks (Eckart and Young)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = (left[:, :rank] * values[:rank]) @ right[:rank]
    lost = 1 - float(values[:rank].square().sum() / values.square().sum())
    return kept, lost


@pytest.mark.parametrize(
    ("ranks", "rank"),
    [((12,), 5), ((8, 8), 1), ((20, 30, 7), 16), ((64, 64), 40), ((60, 60), 95), ((3,), 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_the_tail_of_the_spectrum(ranks, rank, dtype):
    pairs = factors(ranks, dtype=dtype)
    total = dense(pairs)
    kept, lost = best(total, rank)
    result = compress(pairs, rank)
    assert result.down.shape == (rank, 96)
    assert result.up.shape == (160, rank)
    approximation = result.up.double() @ result.down.double()
    error = (total - approximation).norm()
    assert error == pytest.approx(float((total - kept).norm()), rel=1e-5)
    assert (approximation - kept).norm() < 1e-4 * total.norm()
    assert result.energy_lost == pytest.approx(lost, abs=1e-5)
    measured = 1 - float(approximation.square().sum() / total.square().sum())
    assert result.energy_lost == pytest.approx(measured, abs=1e-5)


def test_rank_that_suffices_loses_nothing():
    pairs = factors((4, 6))
    result = compress(pairs, 10)
    assert result.energy_lost == 0.0
    assert torch.allclose(result.up.double() @ result.down.double(), dense(pairs), atol=1e-4)
    # More than the sum can have is not made up.
    assert compress(factors((200,)), 500).down.shape[0] <= 96


def test_redundant_ranks_cost_nothing():
    ((down, up),) = factors((5,))
    result = compress([(down, up), (down, 2 * up), (down, -0.5 * up)], 5)
    assert result.energy_lost == pytest.approx(0.0, abs=1e-6)
    approximation = result.up.double() @ result.down.double()
    wanted = 2.5 * (up.double() @ down.double())
    assert (approximation - wanted).norm() < 1e-5 * wanted.norm()


def test_deltas_that_cancel_and_zeros_stay_finite():
    ((down, up),) = factors((6,))
    for pairs in ([(down, up), (down, -up)], [(down, 0 * up)]):
        result = compress(pairs, 3)
        assert torch.isfinite(result.down).all()
        assert torch.isfinite(result.up).all()
        assert 0.0 <= result.energy_lost <= 1.0
        assert (result.up @ result.down).norm() < 1e-3


def test_halves_share_the_size():
    ((down, up),) = factors((8,))
    result = compress([(1e-4 * down, 1e4 * up)], 4)
    ratio = float(result.down.norm(dim=1).div(result.up.norm(dim=0)).log().abs().max())
    assert ratio < 1e-3


def test_arguments_are_not_written_to():
    pairs = factors((8, 8))
    kept = [(down.clone(), up.clone()) for down, up in pairs]
    compress(pairs, 3)
    for (down, up), (down_before, up_before) in zip(pairs, kept, strict=True):
        assert torch.equal(down, down_before)
        assert torch.equal(up, up_before)


# ---- in a model ----


def _added(model, path):
    module = model.get_submodule(path)
    assert module.proj_down.shape[1] == module.proj_up.shape[1] <= MAX_RANK
    assert module.proj_down.shape[1] % 16 == 0
    return module.proj_down.shape[1] - model.config.rank


@pytest.mark.parametrize(
    ("base_rank", "ranks"), [(960, (40, 60)), (992, (17, 24, 24)), (1008, (20,)), (64, (500, 500))]
)
def test_a_stack_beyond_1024_is_compressed(base_rank, ranks, make_model, probe, Draft):
    model = make_model(rank=base_rank)
    untouched = probe.snapshot(model)
    drafts = [Draft(seed).add(TARGET, rank) for seed, rank in enumerate(ranks)]
    stack = [(draft.tensors, 0.5 + index) for index, draft in enumerate(drafts)]
    report = qwenlora.compose_loras(model, stack)
    free = MAX_RANK - base_rank
    kept_rank = min(free, 128)
    assert _added(model, TARGET) == kept_rank == report.slots[0].rank_added
    total = sum(
        strength * draft.deltas[TARGET] for draft, (_, strength) in zip(drafts, stack, strict=True)
    )
    kept, lost = best(total, kept_rank)
    assert (probe.delta(model, TARGET) - kept).norm() < 1e-5 * total.norm()
    assert report.slots[0].energy_lost == pytest.approx(lost, abs=1e-5)
    assert report.energy_lost == report.slots[0].energy_lost
    _layer_adds(model, make_model(rank=base_rank), kept)
    assert report.complete
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(untouched) == []


def _layer_adds(model, base, delta):
    """The layer, which checks what the kernels assume, gives the base's output plus the delta's."""
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        change = model.get_submodule(TARGET)(x) - base.get_submodule(TARGET)(x)
    wanted = x.double() @ delta.T
    assert (change.double() - wanted).norm() < 1e-4 * wanted.norm()


def test_separate_q_k_v_beyond_1024(make_model, probe, Draft):
    model = make_model(rank=992)
    draft = Draft(1)
    for name in ("to_q", "to_k", "to_v"):
        draft.add(f"transformer_blocks.0.attn.{name}", 16, alpha=4.0)
    report = qwenlora.compose_loras(model, draft.tensors)
    total = draft.slot_delta(QKV, (384, 128))
    kept, lost = best(total, 32)
    assert _added(model, QKV) == 32
    assert (probe.delta(model, QKV) - kept).norm() < 1e-5 * total.norm()
    assert report.slots[0].energy_lost == pytest.approx(lost, abs=1e-5)


def test_exactly_1024_is_not_compressed(make_model, probe, Draft):
    model = make_model(rank=960)
    drafts = [Draft(seed).add(TARGET, 32) for seed in (1, 2)]
    report = qwenlora.compose_loras(model, [draft.tensors for draft in drafts])
    assert (report.slots[0].energy_lost, report.slots[0].rank) == (None, 64)
    assert model.get_submodule(TARGET).proj_down.shape[1] == MAX_RANK
    probe.assert_holds(model, [(draft, 1.0) for draft in drafts], within=1e-6)


@pytest.mark.parametrize("max_rank", [None, 64, 60])
def test_padding_alone_is_closed_without_loss(max_rank, make_model, probe, Draft):
    # 20 + 20 + 20 ranks fit 64; each padded to 32 they would not.
    model = make_model(rank=960)
    drafts = [Draft(seed).add(TARGET, 20) for seed in (1, 2, 3)]
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank=max_rank)
    (slot,) = report.slots
    assert (slot.rank, slot.rank_added, slot.energy_lost) == (60, 64, None)
    assert _added(model, TARGET) == 64
    probe.assert_holds(model, [(draft, 1.0) for draft in drafts], within=1e-6)
    # Exact means the very columns of the files, side by side.
    from_one = make_model(rank=960)
    joined = Draft(0).add(
        TARGET,
        60,
        down=torch.cat([d.tensors[d.key(TARGET, "down")] for d in drafts]),
        up=torch.cat([d.tensors[d.key(TARGET, "up")] for d in drafts], dim=1),
    )
    qwenlora.compose_loras(from_one, joined.tensors)
    for name in ("proj_down", "proj_up"):
        one, other = (m.get_submodule(TARGET).get_parameter(name) for m in (model, from_one))
        assert torch.equal(one, other)


@pytest.mark.parametrize("max_rank", [1, 7, 15, 16, 17, 30, 31, 32, 40])
@pytest.mark.parametrize("target", [TARGET, "proj_out", "transformer_blocks.0.txt_mod.1"])
def test_max_rank_keeps_the_best(max_rank, target, make_model, probe, Draft):
    model = make_model()
    drafts = [Draft(seed).add(target, 15) for seed in (1, 2)]
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank=max_rank)
    (slot,) = report.slots
    total = sum(draft.deltas[target] for draft in drafts)
    rank = min(max_rank, 30)
    kept, lost = best(total, rank)
    assert slot.rank == rank
    assert (probe.delta(model, target) - kept).norm() < 2e-5 * total.norm()
    if max_rank >= 30:
        assert slot.energy_lost is None
    else:
        assert slot.energy_lost == pytest.approx(lost, abs=1e-5)
    if target == TARGET:
        assert slot.rank_added == _added(model, target) == (32 if max_rank > 16 else 16)
    else:
        assert slot.rank_added == rank


def test_max_rank_above_the_kernels_limit(make_model, Draft):
    model = make_model(rank=1008)
    report = qwenlora.compose_loras(model, Draft(1).add(TARGET, 20).tensors, max_rank=512)
    assert _added(model, TARGET) == 16
    assert report.slots[0].energy_lost > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_slots_stay_near_the_best(dtype, make_model, probe, Draft):
    model = make_model(dtype=dtype)
    drafts = [Draft(seed).add(TARGET, 24) for seed in (1, 2, 3)]
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank=32)
    total = sum(draft.deltas[TARGET] for draft in drafts)
    kept, lost = best(total, 32)
    rounding = torch.finfo(dtype).eps
    assert (probe.delta(model, TARGET) - kept).norm() < 4 * rounding * total.norm()
    assert report.slots[0].energy_lost == pytest.approx(lost, abs=rounding)


def test_compression_is_the_same_over_any_history(make_model, probe, Draft):
    drafts = [Draft.full(seed=seed, rank=9) for seed in (1, 2, 3)]
    stack = [draft.tensors for draft in drafts]
    fresh = make_model()
    qwenlora.compose_loras(fresh, stack, max_rank=8)
    model = make_model()
    qwenlora.compose_loras(model, stack[::-1], max_rank=3)
    qwenlora.compose_loras(model, stack)
    qwenlora.compose_loras(model, stack, max_rank=8)
    assert probe.snapshot(model).differences(probe.snapshot(fresh)) == []
