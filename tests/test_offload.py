"""Composing under block offload: the emulated manager behaves as Nunchaku's does."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file

import qwenlora
from qwenlora import ComposeOptions, Placement
from qwenlora.errors import LoraReadError, ModelStateError, UnsupportedModelError
from qwenlora.runtime import OPTIONS_KEY

from . import faults

BLOCKS = 4
RANKS = {0: 4, 1: 8, 2: 40, 3: None}
"""Rank of the LoRA in each block: they differ, and the last block has none."""


@pytest.fixture
def model(make_model):
    return make_model(num_layers=BLOCKS)


@pytest.fixture
def uneven(Draft, tmp_path):
    """A LoRA of some blocks only, with ranks that differ, on every kind of slot."""
    draft = Draft(seed=3)
    for block, rank in RANKS.items():
        if rank is not None:
            for name in ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "img_mod.1"):
                draft.add(f"transformer_blocks.{block}.{name}", rank)
    draft.add("proj_out", 4)
    return draft.save(tmp_path / "uneven.safetensors")


@pytest.fixture
def other(Draft, tmp_path):
    draft = Draft(seed=4)
    draft.add("transformer_blocks.3.attn.to_k", 24)
    draft.add("transformer_blocks.1.txt_mod.1", 6)
    return draft.save(tmp_path / "other.safetensors")


def same(found, expected):
    """Equal to rounding: padding to a common rank changes the order of sums."""
    return (found - expected).norm() <= 1e-6 * expected.norm()


def resident_output(model, loras, probe):
    """What the model without offload gives for a stack."""
    twin = copy.deepcopy(model)
    qwenlora.reset_loras(twin)
    twin.set_offload(False)
    qwenlora.compose_loras(twin, loras)
    return probe.output(twin)


@pytest.mark.in_turn("resident")
@pytest.mark.parametrize("resident", [1, 2, BLOCKS])
@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
def test_composing_under_offload_is_composing(model, uneven, other, probe, resident, placement):
    base = probe.output(model)
    loras = [(uneven, 0.8), (other, -0.5)]
    expected = resident_output(model, loras, probe)
    model.set_offload(True, num_blocks_on_gpu=resident)
    options = ComposeOptions(placement=placement)
    report = qwenlora.compose_loras(model, loras, options=options)
    assert same(probe.output(model), expected)
    assert not torch.equal(expected, base)
    assert report.complete
    assert (report.bus_bytes > 0) is (resident < BLOCKS)
    qwenlora.compose_loras(model, other, options=options)
    assert same(probe.output(model), resident_output(model, other, probe))
    qwenlora.reset_loras(model)
    assert torch.equal(probe.output(model), base)


@pytest.mark.in_turn("change")
@pytest.mark.parametrize("change", ["strength", "another", "none"])
def test_changes_between_forwards(model, uneven, other, probe, change):
    model.set_offload(True)
    qwenlora.compose_loras(model, uneven)
    probe.output(model)
    stack = {"strength": (uneven, 0.3), "another": [uneven, other], "none": []}[change]
    qwenlora.compose_loras(model, stack)
    assert same(probe.output(model), resident_output(model, stack, probe))


def test_offload_turned_on_after_composing(model, uneven, probe):
    report = qwenlora.compose_loras(model, uneven)
    expected = probe.output(model)
    model.set_offload(True)
    # The same stack, but not the same tensors: ranks must be uniform now.
    assert qwenlora.compose_loras(model, uneven) is not report
    assert same(probe.output(model), expected)
    assert qwenlora.compose_loras(model, uneven) is qwenlora.applied(model)


@pytest.mark.in_turn("names")
@pytest.mark.parametrize(
    "names",
    [
        ["transformer_blocks.0.img_mod.1"],
        ["transformer_blocks.2.img_mod.1"],
        ["transformer_blocks.0.img_mod.1", "transformer_blocks.2.txt_mod.1"],
        ["transformer_blocks.1.attn.to_out.0"],
        [f"transformer_blocks.{block}.img_mlp.net.2" for block in range(BLOCKS)],
    ],
)
@pytest.mark.parametrize("resident", [1, 3])
def test_offload_turned_on_without_composing_again(model, Draft, tmp_path, probe, names, resident):
    """Buffers are copies of block 0: a side branch of another block alone would be lost."""
    draft = Draft(seed=5)
    for name in names:
        draft.add(name, 8)
    base = probe.output(model)
    qwenlora.compose_loras(model, draft.save(tmp_path / "some.safetensors"))
    expected = probe.output(model)
    assert not same(expected, base)
    model.set_offload(True, num_blocks_on_gpu=resident)
    assert same(probe.output(model), expected)
    qwenlora.reset_loras(model)
    assert torch.equal(probe.output(model), base)
    assert "set_offload" not in model.__dict__


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_offload_turned_on_in_a_copy(model, uneven, probe, again):
    qwenlora.compose_loras(model, uneven)
    expected = probe.output(model)
    twin = again(model)
    twin.set_offload(True)
    assert same(probe.output(twin), expected)
    assert not model.offload
    assert torch.equal(probe.output(model), expected)


def test_offload_cannot_be_turned_on_over_what_was_let_go(model, uneven, probe):
    tensors = load_file(uneven)
    qwenlora.compose_loras(model, tensors)
    expected = probe.output(model)
    with pytest.raises(ModelStateError, match="differ from block to block"):
        model.set_offload(True)
    assert not model.offload
    assert torch.equal(probe.output(model), expected)
    qwenlora.reset_loras(model)
    model.set_offload(True)
    qwenlora.compose_loras(model, tensors)
    assert same(probe.output(model), expected)


@pytest.mark.parametrize("own", ["default", "of a forward"])
def test_offload_turned_on_where_the_runtime_was_removed(model, uneven, probe, own):
    """What it composed stays, and nothing brings anything before a forward any more."""
    expected = resident_output(model, uneven, probe)
    wrapper = qwenlora.ComfyQwenImageWrapper.of(model)
    if own == "default":
        wrapper.loras.append(uneven)
        wrapper.reconcile()
    else:
        wrapper.reconcile({OPTIONS_KEY: qwenlora.LoraSet.of(uneven)})
    qwenlora.ComfyQwenImageWrapper.remove(model)
    if own == "default":
        model.set_offload(True)
    else:
        with pytest.raises(ModelStateError, match="differ from block to block"):
            model.set_offload(True)
        assert not model.offload
    assert same(probe.output(model), expected)


def test_offload_turned_on_over_a_set_of_a_forward(model, uneven, other, probe):
    expected = resident_output(model, other, probe)
    qwenlora.compose_loras(model, other)
    wrapper = qwenlora.ComfyQwenImageWrapper.of(model)
    wrapper.reconcile({OPTIONS_KEY: qwenlora.LoraSet.of(uneven)})
    model.set_offload(True)
    assert same(probe.output(model), expected)


def test_offload_stays_off_where_a_file_is_gone(model, uneven, probe):
    qwenlora.compose_loras(model, uneven)
    expected = probe.output(model)
    qwenlora.clear_cache()
    uneven.unlink()
    with pytest.raises(LoraReadError):
        model.set_offload(True)
    assert not model.offload
    assert torch.equal(probe.output(model), expected)


def test_even_tensors_in_memory_may_be_let_go(model, Draft, tmp_path, probe):
    draft = Draft(seed=6)
    for block in range(BLOCKS):
        draft.add(f"transformer_blocks.{block}.img_mod.1", 8)
    qwenlora.compose_loras(model, load_file(draft.save(tmp_path / "even.safetensors")))
    expected = probe.output(model)
    model.set_offload(True)
    assert same(probe.output(model), expected)


def test_a_switch_of_others_comes_back(model, uneven, probe):
    calls = []

    def switch(on, **kwargs):
        calls.append(on)
        type(model).set_offload(model, on, **kwargs)

    model.__dict__["set_offload"] = switch
    qwenlora.compose_loras(model, uneven)
    expected = probe.output(model)
    model.set_offload(True)
    assert calls == [True]
    assert same(probe.output(model), expected)
    qwenlora.reset_loras(model)
    assert model.__dict__["set_offload"] is switch


def test_a_switch_keeps_no_model_alive(make_model, uneven):
    model = make_model(num_layers=BLOCKS)
    qwenlora.compose_loras(model, uneven)
    switch, alive = model.set_offload, weakref.ref(model)
    del model
    assert alive() is None
    with pytest.raises(ModelStateError, match="gone"):
        switch(True)


def test_offload_turned_off_after_composing(model, uneven, probe):
    model.set_offload(True)
    report = qwenlora.compose_loras(model, uneven)
    expected = probe.output(model)
    model.set_offload(False)
    assert same(probe.output(model), expected)
    assert qwenlora.compose_loras(model, uneven) is report
    qwenlora.reset_loras(model)


def test_the_manager_is_not_rebuilt(model, uneven):
    model.set_offload(True)
    manager = model.offload_manager
    buffers = list(manager.buffer_blocks)
    parameters = [list(block.parameters()) for block in buffers]
    qwenlora.compose_loras(model, uneven)
    qwenlora.reset_loras(model)
    assert model.offload_manager is manager
    assert all(a is b for a, b in zip(manager.buffer_blocks, buffers, strict=True))
    for block, before in zip(buffers, parameters, strict=True):
        assert all(a is b for a, b in zip(block.parameters(), before, strict=True))
        assert not list(block.buffers())


def test_buses_carry_what_the_report_says(model, uneven, probe):
    model.set_offload(True)
    manager = model.offload_manager
    manager.bytes_per_forward = []
    probe.output(model)
    report = qwenlora.compose_loras(model, uneven)
    probe.output(model)
    before, after = manager.bytes_per_forward
    assert after - before == report.bus_bytes


@pytest.mark.slow
@pytest.mark.in_turn("placement")
@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
def test_an_error_at_any_allocation(model, uneven, other, probe, placement, monkeypatch):
    model.set_offload(True)
    base = probe.output(model)
    calls = failing_at = 0

    def count_or_raise():
        nonlocal calls
        calls += 1
        if calls == failing_at:
            raise RuntimeError("injected")

    qwenlora.compose_loras(model, other)
    before = probe.output(model)
    done = False
    while not done:
        calls, failing_at = 0, failing_at + 1
        with monkeypatch.context() as patch:
            faults.replace(patch, [faults.FACTOR_COPY], faults.before(count_or_raise))
            try:
                qwenlora.compose_loras(model, uneven, options=ComposeOptions(placement=placement))
                done = True
            except RuntimeError:
                wanted = before if placement is Placement.WHOLE else base
                assert torch.equal(probe.output(model), wanted), failing_at
        qwenlora.compose_loras(model, other)
    assert failing_at > 10
    qwenlora.reset_loras(model)
    assert torch.equal(probe.output(model), base)


@pytest.mark.slow
def test_200_alternations_grow_nothing(model, uneven, other, probe):
    model.set_offload(True)
    sizes = set()
    for _ in range(100):
        for lora in (uneven, other):
            qwenlora.compose_loras(model, lora)
        blocks = (*model.transformer_blocks, *model.offload_manager.buffer_blocks)
        tensors = [t for b in blocks for t in (*b.parameters(), *b.buffers())]
        sizes.add((len(tensors), sum(t.nbytes for t in tensors)))
    assert len(sizes) == 1


def test_an_unknown_manager_is_refused(model, uneven):
    model.offload, model.offload_manager = True, object()
    with pytest.raises(UnsupportedModelError, match="not known"):
        qwenlora.compose_loras(model, uneven)


def test_progress_ends_at_its_total(model, uneven):
    told = []
    model.set_offload(True, device="cpu")
    options = ComposeOptions(progress=lambda *step: told.append(step))
    qwenlora.compose_loras(model, uneven, options=options)
    for phase in ("stage", "write"):
        steps = [(done, total) for name, done, total in told if name == phase]
        total = steps[0][1]
        assert steps == [(done, total) for done in range(total)]
