"""Large sums, truncated by orthogonal iteration, against the float64 SVD of the dense sum."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qwenlora
from qwenlora import ComposeOptions, sizes
from qwenlora.delta import compress, limit
from qwenlora.delta.compress import LowRankSum, RowBlock, decomposed, energy, iterated
from qwenlora.errors import NonFiniteError

WITHIN = 1.1
"""Energy lost, relative to the least that any truncation loses."""
ROUNDING = 3e-6
"""What float32 may add to an energy, relative to the sum's."""

FLAT = torch.ones(48)
SPECTRA = {
    "flat": FLAT,
    "slow": torch.arange(1, 49).float() ** -0.5,
    "trained": torch.arange(1, 49).float() ** -1.0,
    "steep": 0.7 ** torch.arange(48).float(),
    "cliff": torch.cat([FLAT[:8], 1e-3 * FLAT[8:]]),
    "deficient": torch.cat([FLAT[:12], 0 * FLAT[12:]]),
    "one giant": torch.cat([1e4 * FLAT[:1], FLAT[1:]]),
}


def pairs_of(spectrum, *, loras=6, inputs=224, outputs=320, seed=0, dtype=torch.float32):
    """LoRAs whose singular values are the spectrum, about, at strengths of their own."""
    generator = torch.Generator().manual_seed(seed)
    rank = spectrum.numel()
    return [
        (
            torch.randn(rank, inputs, generator=generator).div(inputs**0.5).to(dtype),
            (torch.randn(outputs, rank, generator=generator) * spectrum * (1 + lora)).to(dtype),
        )
        for lora in range(loras)
    ]


def dense(pairs):
    return sum(up.double() @ down.double() for down, up in pairs)


def least_lost(matrix, rank):
    energies = torch.linalg.svdvals(matrix).square()
    return float(energies[rank:].sum() / energies.sum())


def really_lost(matrix, cut):
    error = matrix - cut.up.double() @ cut.down.double()
    return float(error.square().sum() / matrix.square().sum())


def check(sum_, matrix, rank, *, within=WITHIN, rounding=ROUNDING):
    (truncation,) = iterated([sum_], rank)
    assert truncation is not None
    assert truncation.energy == pytest.approx(float(matrix.square().sum()), rel=1e-5)
    assert truncation.kept.numel() == rank
    for part in (rank, rank // 2, 16):
        cut = truncation.cut(part)
        assert cut.down.shape == (part, matrix.shape[1])
        assert cut.up.shape == (matrix.shape[0], part)
        lost = really_lost(matrix, cut)
        # What is stated is what the very result lacks: no bound, no estimate.
        assert cut.energy_lost == pytest.approx(lost, abs=rounding)
        assert lost <= within * least_lost(matrix, part) + rounding
    return truncation


@pytest.mark.parametrize("rank", [32, 80, 160])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_near_the_optimum_and_says_what_it_lost(spectrum, rank):
    pairs = pairs_of(SPECTRA[spectrum])
    check(LowRankSum.of(pairs), dense(pairs), rank)


@pytest.mark.parametrize(
    ("of_down", "of_up"), [(1e-7, 1e7), (1e9, 1e-3), (1e-9, 1e-3), (1e6, 1e6), (6e4, 1e-7)]
)
def test_any_scale(of_down, of_up):
    pairs = [(of_down * down, of_up * up) for down, up in pairs_of(SPECTRA["trained"])]
    truncation = check(LowRankSum.of(pairs), dense(pairs), 64)
    cut = truncation.cut(64)
    # Halves of one norm, direction by direction: each in the range of float16 where it can be.
    ratios = cut.down.norm(dim=1) / cut.up.norm(dim=0)
    assert float(ratios.log().abs().max()) < 1e-3


def test_loras_of_very_different_size():
    pairs = pairs_of(SPECTRA["trained"])
    pairs = [(down, up * 10.0 ** (3 - 2 * n)) for n, (down, up) in enumerate(pairs)]
    check(LowRankSum.of(pairs), dense(pairs), 64)


@pytest.mark.parametrize("spectrum", ["flat", "slow", "trained"])
def test_shifts_bring_it_nearer(spectrum, resize):
    pairs = pairs_of(SPECTRA[spectrum])
    matrix = dense(pairs)
    shifted = check(LowRankSum.of(pairs), matrix, 64, within=1.03)
    resize(shifts=(0.0,) * len(sizes.current().shifts))
    plain = check(LowRankSum.of(pairs), matrix, 64)
    assert shifted.lost(64) < plain.lost(64)


@pytest.mark.parametrize(("top", "low"), [(1.0, 0.15), (1.1, 0.15), (1.1, 0.5), (2.0, 0.15)])
def test_a_shift_lifts_no_weak_direction(top, low):
    """The mean outside is more than half of the least one wanted, and some are near zero."""
    left, right = (torch.linalg.qr(torch.randn(400, 400))[0] for _ in range(2))
    energies = torch.cat([top * torch.ones(280), torch.ones(102), low * torch.ones(18)])
    pair = (right, left * energies.sqrt())
    (truncation,) = iterated([LowRankSum.of([pair])], 280)
    least = float(energies[280:].sum() / energies.sum())
    assert truncation.lost(280) <= WITHIN * least + ROUNDING


def test_a_shift_takes_no_wanted_direction():
    """All directions nearly of one size: the mean outside is nearly the least one wanted."""
    left, right = (torch.linalg.qr(torch.randn(256, 256))[0] for _ in range(2))
    sizes = torch.cat([torch.ones(65), 0.95 * torch.ones(191)])
    sum_ = LowRankSum.of([(right, left * sizes)])
    check(sum_, dense([(right, left * sizes)]), 64, within=1.03)


@pytest.mark.parametrize("has_instructions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_halves(dtype, has_instructions, resize):
    resize(cpu_multiplies_bfloat16=has_instructions)
    pairs = pairs_of(SPECTRA["trained"], dtype=dtype)
    # bfloat16 factors may be multiplied as such: 2^-9 of each half, squared.
    check(LowRankSum.of(pairs), dense(pairs), 96, rounding=2e-5)


@pytest.mark.parametrize("shape", [(96, 640), (300, 500), (1, 64)])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_gram_matrices_of_bfloat16(shape, side, resize):
    """Twice 8 bits of mantissa, whatever the panels and strides."""
    resize(cpu_multiplies_bfloat16=True)
    half = (torch.randn(shape) * torch.logspace(-3, 3, shape[0]).unsqueeze(1)).bfloat16()
    if side == "columns":
        half = half.mT.contiguous().mT
    exact = half.double() @ half.double().mT
    found = compress._gram(half)
    assert found.dtype == torch.float32
    lengths = exact.diagonal().sqrt()
    error = (found - exact).abs() / (lengths.unsqueeze(0) * lengths.unsqueeze(1))
    assert float(error.max()) < 1e-5


def test_shared_and_repeated_downs():
    pairs = pairs_of(SPECTRA["slow"], loras=3)
    pairs += [(down, 0.5 * up.flip(0)) for down, up in pairs] + pairs[:1]
    check(LowRankSum.of(pairs), dense(pairs), 64)
    check(LowRankSum.of(pairs), dense(pairs), 150)


def test_more_ranks_than_the_matrix_has():
    pairs = pairs_of(FLAT, loras=12, inputs=160)
    check(LowRankSum.of(pairs), dense(pairs), 64)
    assert iterated([LowRankSum.of(pairs)], 160) == [None]


def supported(ranks, seed=0):
    """q, k and v with downs of their own, a fused LoRA, and one of q and v alone."""
    generator = torch.Generator().manual_seed(seed)
    pairs, supports = [], []
    for parts in ranks:
        mask = torch.zeros((3, sum(parts)), dtype=torch.bool)
        up = torch.zeros(3 * 160, sum(parts))
        end = 0
        for part, rank in enumerate(parts):
            mask[part, end : end + rank] = True
            rows = slice(160 * part, 160 * (part + 1))
            up[rows, end : end + rank] = torch.randn(160, rank, generator=generator)
            end += rank
        pairs.append((torch.randn(sum(parts), 192, generator=generator), up))
        supports.append(mask)
    return pairs, supports


def test_fused_projections_are_not_filled_with_zeros():
    pairs, supports = supported([(32, 32, 32), (24, 0, 24), (8, 40, 16)])
    pairs.append((torch.randn(32, 192), torch.randn(480, 32)))
    supports.append(torch.ones((1, 32), dtype=torch.bool))
    sum_ = LowRankSum.of(pairs, supports)
    assert [block.up.shape for block in sum_.blocks] == [(160, 96), (160, 104), (160, 104)]
    down, up = sum_.pair()
    whole = dense(pairs)
    assert (up.double() @ down.double() - whole).norm() < 1e-6 * whole.norm()
    assert energy(sum_) == pytest.approx(float(whole.square().sum()), rel=1e-5)
    check(sum_, whole, 64)
    check(sum_, whole, 128)


def test_ranks_without_any_row_are_left_out():
    pairs, supports = supported([(32, 32, 32), (32, 32, 32)])
    supports[0][1] = False
    sum_ = LowRankSum.of(pairs, supports)
    assert sum_.rank == 160
    pairs[0][1][160:320] = 0
    down, up = sum_.pair()
    whole = dense(pairs)
    assert (up.double() @ down.double() - whole).norm() < 1e-6 * whole.norm()


def test_cancelling_deltas_are_left_to_the_exact_way():
    pairs = pairs_of(SPECTRA["slow"], loras=4)
    small = [(down, 1e-3 * up) for down, up in pairs_of(SPECTRA["trained"], seed=9)]
    sum_ = LowRankSum.of([*pairs, *((down, -up) for down, up in pairs), *small])
    assert iterated([sum_], 64) == [None]
    cut = decomposed(sum_).cut(64)
    whole = dense(small)
    assert really_lost(whole, cut) <= least_lost(whole, 64) + 1e-4


@pytest.mark.parametrize("value", [0.0, 1e-25, 1e25, float("inf"), float("nan")])
def test_what_float32_products_cannot_hold(value):
    pairs = [(down, value * up) for down, up in pairs_of(SPECTRA["slow"])]
    assert iterated([LowRankSum.of(pairs)], 64) == [None]


def test_a_zero_sum_stays_zero():
    pairs = [(down, 0 * up) for down, up in pairs_of(SPECTRA["slow"])]
    cut = decomposed(LowRankSum.of(pairs)).cut(20)
    assert (cut.energy_lost, float(cut.up.abs().max())) == (0.0, 0.0)


def test_nothing_but_the_sum_decides():
    sums = [LowRankSum.of(pairs_of(SPECTRA["slow"], seed=seed)) for seed in (1, 2, 3)]
    torch.manual_seed(1)
    one = iterated(sums[1:2], 64)[0].cut(64)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = iterated(sums[1:2], 64)[0].cut(64)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.up, again.up)
    assert torch.equal(one.down, again.down)
    # In a batch the order of sums may differ, and no more.
    batched = iterated(sums, 64)[1].cut(64)
    alone = one.up.double() @ one.down.double()
    assert (batched.up.double() @ batched.down.double() - alone).norm() < 1e-4 * alone.norm()


@given(
    ranks=st.lists(st.integers(8, 90), min_size=3, max_size=6).filter(lambda r: sum(r) > 150),
    decay=st.floats(0, 2),
    rank=st.integers(16, 128),
    seed=st.integers(0, 1000),
)
def test_any_sum(ranks, decay, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (
            torch.randn(own, 144, generator=generator),
            torch.randn(176, own, generator=generator) * torch.arange(1.0, own + 1) ** -decay,
        )
        for own in ranks
    ]
    check(LowRankSum.of(pairs), dense(pairs), rank, within=1.1)


# ---- in a model ----

QKV = "transformer_blocks.0.attn.to_qkv"
SLOTS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.2", "img_mod.1")


@pytest.fixture
def large(resize):
    """Tiny models' sums count as large."""
    resize(exact_side=8)


@pytest.fixture
def stack(Draft):
    drafts = []
    for seed in (1, 2, 3):
        draft = Draft(seed)
        for block in range(3):
            for name in SLOTS:
                draft.add(f"transformer_blocks.{block}.{name}", 16)
        drafts.append(draft)
    return drafts


@pytest.mark.parametrize("in_batches", [False, True])
def test_a_model_holds_what_the_report_says(large, in_batches, stack, make_model, probe, resize):
    resize(cpu_batches=in_batches)
    model = make_model(num_layers=3)
    report = qwenlora.compose_loras(model, [draft.tensors for draft in stack], max_rank=32)
    assert len(report.slots) == 3 * 4
    for slot in report.slots:
        whole = sum(
            draft.slot_delta(slot.path, probe.delta(model, slot.path).shape) for draft in stack
        )
        found = probe.delta(model, slot.path)
        lost = float((whole - found).square().sum() / whole.square().sum())
        assert slot.energy_lost == pytest.approx(lost, abs=1e-5)
        assert lost <= WITHIN * least_lost(whole, 32)
        assert slot.energy == pytest.approx(float(whole.square().sum()), rel=1e-5)
        assert (slot.rank, slot.rank_added) == (32, 32)
        assert slot.rank_exact == (144 if slot.path.endswith("qkv") else 48)
    lost = sum(slot.energy * slot.energy_lost for slot in report.slots)
    total = sum(slot.energy for slot in report.slots)
    assert report.total_energy_lost == pytest.approx(lost / total)
    assert "less than exact" in report.text()
    assert report.saved_bytes > 0 == report.saved_bus_bytes


@pytest.mark.slow
@pytest.mark.parametrize("in_batches", [False, True])
@pytest.mark.parametrize("max_rank", [24, "auto"])
def test_the_same_over_any_history(large, in_batches, max_rank, stack, make_model, probe, resize):
    resize(cpu_batches=in_batches)
    loras = [draft.tensors for draft in stack]
    fresh = make_model(num_layers=3)
    qwenlora.compose_loras(fresh, loras, max_rank=max_rank)
    model = make_model(num_layers=3)
    qwenlora.compose_loras(model, loras[:2], max_rank=16)
    qwenlora.compose_loras(model, loras[::-1])
    torch.manual_seed(5)
    placement = qwenlora.spec.Placement.BY_PATH
    options = ComposeOptions(placement=placement)
    qwenlora.compose_loras(model, loras, max_rank=max_rank, options=options)
    assert probe.snapshot(model).differences(probe.snapshot(fresh)) == []


def test_a_value_that_is_not_finite_is_named(large, stack, make_model, probe):
    model = make_model(num_layers=3)
    before = probe.snapshot(model)
    target = "transformer_blocks.1.attn.to_out.0"
    stack[1].tensors[stack[1].key(target, "up")][3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=target):
        qwenlora.compose_loras(model, [draft.tensors for draft in stack], max_rank=32)
    assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("in_batches", [False, True])
def test_progress_is_told_and_ends_the_work(large, in_batches, stack, make_model, probe, resize):
    resize(cpu_batches=in_batches)
    model = make_model(num_layers=3)
    before = probe.snapshot(model)
    told = []

    def progress(phase, done, total):
        told.append((phase, done, total))
        if phase == "compress" and len([p for p, _, _ in told if p == phase]) == 3:
            raise KeyboardInterrupt

    loras = [draft.tensors for draft in stack]
    with pytest.raises(KeyboardInterrupt):
        qwenlora.compose_loras(model, loras, max_rank=32, options=ComposeOptions(progress=progress))
    assert probe.snapshot(model).differences(before) == []
    done = [at for phase, at, _ in told if phase == "compress"]
    assert done == sorted(done)
    assert len(done) == 3
    assert all(at < total for _, at, total in told)


def test_batches_are_bounded(large, stack, make_model, resize):
    """Sums that exceed the bound together go in several batches; the result is their optimum."""
    resize(cpu_batches=True)
    batches = Counter()
    options = ComposeOptions(progress=lambda phase, *_: batches.update([phase]))
    loras = [draft.tensors for draft in stack]
    qwenlora.compose_loras(make_model(num_layers=3), loras, max_rank=32, options=options)
    together = batches.pop("compress")
    assert together > 0
    resize(batch_bytes=1)
    qwenlora.compose_loras(make_model(num_layers=3), loras, max_rank=32, options=options)
    assert batches["compress"] == 3 * together


# ---- max_rank="auto" ----


def decaying(Draft, target, rank, *, seed, decay, inputs=128, outputs=128):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator)
    up = torch.randn(outputs, rank, generator=generator) * torch.arange(1.0, rank + 1) ** -decay
    return Draft(seed).add(target, rank, down=down, up=up)


TARGET = "transformer_blocks.0.attn.to_out.0"


@pytest.mark.parametrize("loras", [1, 3])
def test_auto_gives_up_what_costs_little(loras, Draft, make_model, probe):
    drafts = [decaying(Draft, TARGET, 32, seed=n, decay=3) for n in range(loras)]
    model = make_model()
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank="auto")
    (slot,) = report.slots
    assert slot.rank_exact == 32 * loras
    assert slot.rank_added % 16 == 0
    assert slot.rank_added < slot.rank_exact
    whole = sum(draft.deltas[TARGET] for draft in drafts)
    assert slot.energy_lost == pytest.approx(least_lost(whole, slot.rank), abs=1e-5)
    saved = 1 - slot.rank_added / slot.rank_exact
    assert slot.energy_lost <= limit.AUTO_PRICE * saved
    assert report.saved_bytes == (slot.rank_exact - slot.rank_added) * (128 + 128) * 4
    assert f"{report.saved_bytes / 1e6:.1f} MB saved" in report.summary()
    assert "compressed: rank" in report.text()
    found = probe.delta(model, TARGET)
    assert float((whole - found).square().sum() / whole.square().sum()) == pytest.approx(
        slot.energy_lost, abs=1e-5
    )


@pytest.mark.parametrize("is_large", [False, True])
def test_auto_leaves_flat_spectra_exact(is_large, Draft, make_model, probe, request):
    if is_large:
        request.getfixturevalue("large")
    drafts = [Draft(seed).add(TARGET, 32) for seed in (1, 2)]
    auto, exact = make_model(), make_model()
    report = qwenlora.compose_loras(auto, [d.tensors for d in drafts], max_rank="auto")
    qwenlora.compose_loras(exact, [d.tensors for d in drafts])
    assert probe.snapshot(auto).differences(probe.snapshot(exact)) == []
    (slot,) = report.slots
    assert (slot.energy_lost, slot.rank, slot.rank_added, slot.rank_exact) == (None, 64, 64, 64)
    assert slot.energy > 0
    assert report.saved_bytes == 0
    assert report.total_energy_lost == 0.0


def test_auto_closes_padding_without_loss(Draft, make_model, probe):
    drafts = [Draft(seed).add(TARGET, 20) for seed in (1, 2, 3)]
    model = make_model()
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank="auto")
    (slot,) = report.slots
    assert (slot.energy_lost, slot.rank, slot.rank_added, slot.rank_exact) == (None, 60, 64, 96)
    probe.assert_holds(model, [(draft, 1.0) for draft in drafts], within=1e-6)


def test_auto_does_not_touch_what_is_one_tile(Draft, make_model, probe):
    draft = decaying(Draft, TARGET, 16, seed=1, decay=4)
    auto, exact = make_model(), make_model()
    qwenlora.compose_loras(auto, draft.tensors, max_rank="auto")
    qwenlora.compose_loras(exact, draft.tensors)
    assert probe.snapshot(auto).differences(probe.snapshot(exact)) == []


@pytest.mark.parametrize("is_large", [False, True])
def test_auto_stays_within_the_kernels_limit(is_large, Draft, make_model, request):
    if is_large:
        request.getfixturevalue("large")
    model = make_model(rank=960)
    drafts = [Draft(seed).add(TARGET, 40) for seed in (1, 2)]
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank="auto")
    assert report.slots[0].rank_added == 64
    drafts = [decaying(Draft, TARGET, 40, seed=n, decay=3) for n in (1, 2)]
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank="auto")
    assert report.slots[0].rank_added < 64


def test_auto_announces_an_upper_bound(Draft, make_model):
    model = make_model()
    drafts = [decaying(Draft, TARGET, 32, seed=n, decay=3) for n in (1, 2)]
    wanted = qwenlora.LoraSet.of([d.tensors for d in drafts], max_rank="auto")
    planned = qwenlora.compose.planning.plan_report(model, wanted)
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank="auto")
    assert planned.added_bytes == report.added_bytes + report.saved_bytes


def test_auto_under_offload_is_uniform(large, Draft, make_model, probe):
    drafts = []
    for seed in (1, 2):
        draft = Draft(seed)
        for block, decay in enumerate((3.0, 0.0, 4.0)):
            target = f"transformer_blocks.{block}.attn.to_out.0"
            one = decaying(Draft, target, 32, seed=10 * seed + block, decay=decay)
            draft.tensors |= one.tensors
            draft.deltas |= one.deltas
        drafts.append(draft)
    loras = [draft.tensors for draft in drafts]
    model = make_model(num_layers=3)
    model.set_offload(True)
    report = qwenlora.compose_loras(model, loras, max_rank="auto")
    assert len({slot.rank_added for slot in report.slots if slot.rank_added}) <= 2
    twin = make_model(num_layers=3)
    qwenlora.compose_loras(twin, loras, max_rank="auto")
    found, wanted = probe.output(model), probe.output(twin)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert report.saved_bus_bytes <= report.saved_bytes


def test_auto_is_part_of_a_sets_key(Draft):
    tensors = Draft(1).add(TARGET, 20).tensors
    auto, exact = (qwenlora.LoraSet.of(tensors, max_rank=rank) for rank in ("auto", None))
    assert auto != exact
    assert auto.extended(tensors).max_rank == "auto"


def test_energy_of_blocks():
    pairs, supports = supported([(8, 8, 8)])
    sum_ = LowRankSum.of(pairs, supports)
    assert energy(sum_) == pytest.approx(float(dense(pairs).square().sum()), rel=1e-5)
    assert all(isinstance(block, RowBlock) for block in sum_.blocks)
