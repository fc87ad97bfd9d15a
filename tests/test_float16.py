"""Models in float16 (Turing GPUs): small values are not lost to subnormal numbers."""

from __future__ import annotations

import copy

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, Placement
from qwenlora.delta.pieces import KronPair
from qwenlora.delta.scale import scaled_kron
from qwenlora.group.partition import apart
from qwenlora.slots.branch import BRANCH_DOWN, BRANCH_UP
from qwenlora.slots.branch_layout import part_name
from qwenlora.slots.find import find_targets

BLOCKS = 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["attn.to_out.0", "attn.to_q", "attn.to_k", "attn.to_v", "img_mlp.net.2", "img_mod.1"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def base(make_model):
    return make_model(num_layers=BLOCKS, dtype=torch.float16)


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def drafted(Draft, size, dtype=torch.float32, *, shared=False, rank=8):
    """A LoRA whose `down` is as trainers leave it, and `up` is as large as asked."""
    draft = Draft(1, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for block in range(BLOCKS):
        for at, name in enumerate(NAMES):
            path = f"transformer_blocks.{block}.{name}"
            inp = 512 if name == "img_mlp.net.2" else 128
            out = 768 if name == "img_mod.1" else 128
            seed = 0 if shared and name.startswith("attn.to_") else at
            own = torch.Generator().manual_seed(seed)
            down = 0.018 * (2 * torch.rand(rank, inp, generator=own) - 1)
            up = size * torch.randn(out, rank, generator=generator)
            draft.add(path, rank, down=down, up=up, alpha=float(rank))
    return draft


def errors(model, draft, strength, probe):
    """The relative error of each slot's delta."""
    slots = {}
    for target in draft.deltas:
        path, _, name = target.rpartition(".")
        fused = f"{path}.to_qkv" if name in ("to_q", "to_k", "to_v") else target
        measured = probe.delta(model, fused)
        wanted = strength * draft.slot_delta(fused, tuple(measured.shape))
        slots[fused] = float((measured - wanted).norm() / wanted.norm())
    return slots


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("size", "strength"), [(1e-3, 1.0), (1e-4, 1.0), (1e-5, -0.7), (1e-2, 1e-3), (2e-7, 1.0)]
)
@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
def test_small_values_keep_their_bits(
    device, dtype, shared, size, strength, placement, model, Draft, probe, tmp_path
):
    if dtype is torch.float16 and size < 1e-4:
        pytest.skip("the file itself has lost them")
    model.to(device)
    draft = drafted(Draft, size, dtype, shared=shared)
    path = draft.save(tmp_path / "small.safetensors")
    options = ComposeOptions(placement=placement)
    report = qwenlora.compose_loras(model, (path, strength), options=options)
    assert report.complete
    found = errors(model.cpu(), draft, strength, probe)
    assert max(found.values()) < 1e-3, found


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [False, True])
def test_every_way_leaves_the_same_bits(device, shared, base, Draft, probe, tmp_path):
    path = drafted(Draft, 1e-5, shared=shared).save(tmp_path / "small.safetensors")
    strengths = (1.0, 1e-3, -30.0, 0.37)
    fresh = {}
    for strength in strengths:
        one = copy.deepcopy(base).to(device)
        with apart():
            qwenlora.compose_loras(one, (path, strength))
        fresh[strength] = probe.snapshot(one)
    for options in (
        ComposeOptions(),
        ComposeOptions(staging_bytes=1),
        ComposeOptions(cache_bytes=0, device_cache_bytes=0),
        ComposeOptions(placement=Placement.BY_PATH),
    ):
        many = copy.deepcopy(base).to(device)
        for strength in (*strengths, strengths[0]):
            qwenlora.compose_loras(many, (path, strength), options=options)
            assert probe.snapshot(many).tensors == fresh[strength].tensors, (options, strength)
        qwenlora.reset_loras(many)
        assert (
            probe.snapshot(many).tensors == probe.snapshot(copy.deepcopy(base).to(device)).tensors
        )


def test_a_failed_change_of_strengths_leaves_both_halves(model, Draft, probe, tmp_path):
    path = drafted(Draft, 1e-5).save(tmp_path / "small.safetensors")
    qwenlora.compose_loras(model, (path, 1.0))
    before = probe.snapshot(model)
    calls = []

    def fail(phase, done, total):
        calls.append(done)
        if done == total - 2:
            raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        qwenlora.compose_loras(model, (path, 1e-3), options=ComposeOptions(progress=fail))
    assert len(calls) > 2
    assert probe.snapshot(model).differences(before) == []


def test_under_offload(model, Draft, probe, tmp_path):
    draft = drafted(Draft, 1e-5)
    path = draft.save(tmp_path / "small.safetensors")
    model.set_offload(True)
    for strength in (1.0, 1e-2):
        qwenlora.compose_loras(model, (path, strength))
        found = errors(model, draft, strength, probe)
        assert max(found.values()) < 1e-3, found


@pytest.mark.parametrize("max_rank", [16, "auto"])
def test_compressed_sums(max_rank, model, Draft, probe):
    """What is cut is cut from values that were kept."""
    drafts = [drafted(Draft, 1e-5, rank=24) for _ in range(2)]
    report = qwenlora.compose_loras(model, [d.tensors for d in drafts], max_rank=max_rank)
    found = errors(model, drafts[0], 2.0, probe)
    for slot in report.slots:
        lost = slot.energy_lost or 0.0
        assert abs(found[slot.path] ** 2 - lost) < 1e-2 * max(lost, 1e-4)


def test_products(model):
    generator = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(8, 8, generator=generator), torch.randn(16, 16, generator=generator)
    wanted = 2e-5 * 0.01 * torch.kron(w1.double(), w2.double())
    target = find_targets(model, {})["transformer_blocks.0.attn.to_out.0"]
    kron = scaled_kron(KronPair(w1=w1, w2=0.01 * w2, scale=1e-3, row_begin=0), 0.02, target)
    w1, w2 = kron.tensors.values()
    assert w1.dtype is w2.dtype is torch.float16
    product = torch.kron(w1.double(), w2.double())
    assert float((product - wanted).norm() / wanted.norm()) < 1e-3


def test_dense_deltas(model):
    tiny = 2e-5
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(128, 96, generator=generator)
    qwenlora.compose_loras(model, {"diffusion_model.txt_in.diff": tiny * tiny * dense})
    # What the layer adds, in float64: its own weights are out of the way.
    layer = model.txt_in
    assert layer._buffers[part_name(0, "values")].dtype is torch.float16
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    x = (1000 * torch.randn(64, 96, generator=generator)).half()
    expected = tiny * tiny * (x.double() @ dense.double().T)
    found = layer(x).detach().double()
    assert float((found - expected).norm() / expected.norm()) < 2e-2


def test_values_that_are_large_enough_stay_where_they_are(model, Draft):
    """`down` is the file's, bit for bit: nothing moved."""
    draft = drafted(Draft, 0.05)
    qwenlora.compose_loras(model, draft.tensors)
    layer = model.transformer_blocks[0].img_mod[1]
    key = draft.key("transformer_blocks.0.img_mod.1", "down")
    assert torch.equal(layer._buffers[BRANCH_DOWN], draft.tensors[key].half())
    assert layer._buffers[BRANCH_UP].dtype is torch.float16
