"""The lazy runtime on the emulated transformer: wanted sets, branches, locks, copies."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import qwenlora
from qwenlora import ComfyQwenImageWrapper, LoraSet
from qwenlora.emulation import EmulatedQwenImageTransformer
from qwenlora.errors import ModelStateError, UnsupportedModelError
from qwenlora.model.lock import lock_of
from qwenlora.runtime import OPTIONS_KEY


@pytest.fixture
def two(Draft, tmp_path):
    """Two LoRAs on the same slots."""
    files = []
    for seed in (1, 2):
        draft = Draft(seed)
        for name in ("attn.to_q", "img_mlp.net.0.proj", "txt_mod.1"):
            draft.add(f"transformer_blocks.0.{name}", 4 * seed)
        draft.add("proj_out", 4)
        files.append(draft.save(tmp_path / f"{seed}.safetensors"))
    return files


class Host:
    """Calls a transformer as a host does: a set travels in its options."""

    def __init__(self, model, probe):
        self.model = model
        self.probe = probe

    def __call__(self, lora_set="absent"):
        options = {} if lora_set == "absent" else {OPTIONS_KEY: lora_set}
        return self.probe.output(self.model, transformer_options=options)


@pytest.fixture
def host(model, probe):
    ComfyQwenImageWrapper.of(model)
    return Host(model, probe)


def fresh(model, loras, probe):
    """What a model that never saw anything else gives."""
    twin = copy.deepcopy(model)
    qwenlora.reset_loras(twin)
    qwenlora.compose_loras(twin, loras)
    return probe.output(twin)


def test_one_wrapper_per_transformer(model):
    wrapper = ComfyQwenImageWrapper.of(model)
    assert ComfyQwenImageWrapper.of(model) is wrapper
    assert ComfyQwenImageWrapper.of(torch.compile(model, backend="eager")) is wrapper
    assert wrapper.transformer is model
    with pytest.raises(UnsupportedModelError):
        ComfyQwenImageWrapper.of(object())


def test_two_branches_alternating_every_step(host, two, model, probe):
    base = probe.output(model)
    sets = [LoraSet.of((path, 0.7)) for path in two]
    expected = [fresh(model, (path, 0.7), probe) for path in two]
    for _ in range(3):
        for lora_set, wanted in zip(sets, expected, strict=True):
            assert torch.equal(host(lora_set), wanted)
        assert torch.equal(host(), base)
        assert torch.equal(host(LoraSet.of()), base)
        assert torch.equal(host(None), base)


def noting(steps):
    """Options that note every step of a composition."""
    return qwenlora.ComposeOptions(progress=lambda phase, *_: steps.append(phase))


def test_an_unchanged_set_composes_nothing(host, two):
    steps = []
    lora_set = LoraSet.of(two, options=noting(steps))
    host(lora_set)
    assert steps
    steps.clear()
    host(lora_set)
    host(copy.copy(lora_set))
    host(LoraSet.of(two, options=noting(steps)))
    assert steps == []


def test_the_default_is_what_a_script_asked_for(host, two, model, probe):
    wrapper = ComfyQwenImageWrapper.of(model)
    wrapper.loras.append((two[0], 0.5))
    assert torch.equal(host(), fresh(model, (two[0], 0.5), probe))
    wrapper.loras.append(two[1])
    stack = [(two[0], 0.5), two[1]]
    assert torch.equal(host(), fresh(model, stack, probe))
    # A set in the options goes first, an empty one too, and the default comes back after it.
    assert torch.equal(host(LoraSet.of(two[1])), fresh(model, two[1], probe))
    assert torch.equal(host(LoraSet.of()), fresh(model, [], probe))
    assert torch.equal(host(), fresh(model, stack, probe))
    wrapper.loras.clear()
    assert torch.equal(host(), fresh(model, [], probe))


def test_compose_loras_sets_the_default(host, two, model, probe):
    qwenlora.compose_loras(model, two[0])
    assert torch.equal(host(LoraSet.of(two[1])), fresh(model, two[1], probe))
    assert torch.equal(host(), fresh(model, two[0], probe))
    qwenlora.reset_loras(model)
    assert torch.equal(host(), fresh(model, [], probe))


def test_a_wrapper_made_after_composing_knows_the_default(model, two, probe):
    qwenlora.compose_loras(model, two[0])
    host = Host(model, probe)
    ComfyQwenImageWrapper.of(model)
    host(LoraSet.of(two[1]))
    assert torch.equal(host(), fresh(model, two[0], probe))


def test_a_default_of_tensors_that_were_let_go_is_said(model, two, probe, Draft):
    qwenlora.compose_loras(model, Draft.full(seed=5).tensors)
    before = probe.output(model)
    ComfyQwenImageWrapper.of(model)
    host = Host(model, probe)
    assert torch.equal(host(), before)
    host(LoraSet.of(two[0]))
    with pytest.raises(ModelStateError, match="cannot be made again"):
        host()
    qwenlora.reset_loras(model)
    host()


def test_a_copy_has_a_wrapper_of_its_own(host, two, model, probe):
    wrapper = ComfyQwenImageWrapper.of(model)
    wrapper.loras.append(two[0])
    host()
    twin = copy.deepcopy(model)
    base = fresh(model, [], probe)
    of_twin = ComfyQwenImageWrapper.of(twin)
    assert of_twin is not wrapper
    assert of_twin.transformer is twin
    of_twin.loras.clear()
    assert torch.equal(Host(twin, probe)(), base)
    assert torch.equal(host(), fresh(model, two[0], probe))


def test_an_error_while_composing_lets_go(host, two, model, tmp_path, probe):
    lora_set = LoraSet.of(two[0])
    two[0].write_bytes(two[1].read_bytes() + b" ")
    with pytest.raises(qwenlora.QwenLoraError):
        host(lora_set)
    assert not lock_of(model).is_mine()
    assert torch.equal(host(LoraSet.of(two[1])), fresh(model, two[1], probe))


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_error_within_the_forward_lets_go(host, two, model, probe, kind):
    def failing(*_):
        raise kind("injected")

    lora_set = LoraSet.of(two[0])
    handle = model.proj_out.register_forward_pre_hook(failing)
    with pytest.raises(kind):
        host(lora_set)
    handle.remove()
    assert torch.equal(host(lora_set), fresh(model, two[0], probe))
    assert not lock_of(model).is_mine()


def test_a_forward_within_a_forward_raises(host, two, model, probe):
    def again(*_):
        probe.output(model)

    handle = model.proj_out.register_forward_pre_hook(again)
    with pytest.raises(ModelStateError, match="this very thread"):
        host(LoraSet.of(two[0]))
    handle.remove()
    host(LoraSet.of(two[0]))


def test_a_refused_forward_does_not_let_go_of_the_lock(host, two, model, probe):
    held = []

    def again(*_):
        with pytest.raises(ModelStateError):
            probe.output(model)
        held.append(lock_of(model).is_mine())

    handle = model.proj_out.register_forward_pre_hook(again)
    host(LoraSet.of(two[0]))
    handle.remove()
    assert held == [True]
    assert not lock_of(model).is_mine()


def test_composing_within_a_forward_raises(host, two, model):
    def composing(*_):
        qwenlora.reset_loras(model)

    handle = model.proj_out.register_forward_pre_hook(composing)
    with pytest.raises(ModelStateError):
        host(LoraSet.of(two[0]))
    handle.remove()


def test_two_threads(host, two, model, probe):
    sets = [LoraSet.of(path) for path in two]
    expected = [fresh(model, path, probe) for path in two]
    wrong = []

    def work(index):
        # The first matrix products of a new thread round differently, with or without LoRAs.
        host(sets[index])
        for _ in range(10):
            if not torch.equal(host(sets[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_transformers(two, model, probe, when):
    expected = [fresh(model, path, probe) for path in two]
    base = probe.output(model)
    compiled = torch.compile(model, backend="eager")
    if when == "before":
        assert torch.equal(probe.output(compiled), base)
    wrapper = ComfyQwenImageWrapper.of(model)
    for path, wanted in zip(two, expected, strict=True):
        options = {OPTIONS_KEY: LoraSet.of(path)}
        wrapper.reconcile(options)
        found = probe.output(compiled, transformer_options=options)
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    torch._dynamo.reset()


def test_step_caches_are_forgotten_on_a_change(host, two, model):
    lora_set = LoraSet.of(two[0])
    host(lora_set)
    model._cache_context, model._prev_timestep = object(), 3.0
    host(lora_set)
    assert model._prev_timestep == 3.0
    host(LoraSet.of(two[1]))
    assert (model._cache_context, model._prev_timestep) == (None, None)


def test_an_aborted_offloaded_forward_begins_anew(make_model, two, probe):
    model = make_model(num_layers=5)
    ComfyQwenImageWrapper.of(model)
    host = Host(model, probe)
    lora_set = LoraSet.of(two[0])
    expected = host(lora_set)
    model.set_offload(True, device="cpu")
    assert (host(lora_set) - expected).norm() <= 1e-6 * expected.norm()
    buffer = model.offload_manager.buffer_blocks[1]

    def failing(*_):
        raise RuntimeError("injected")

    handle = buffer.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="injected"):
        host(lora_set)
    handle.remove()
    assert (host(lora_set) - expected).norm() <= 1e-6 * expected.norm()


def test_offload_switched_between_forwards(make_model, two, probe):
    model = make_model(num_layers=4)
    ComfyQwenImageWrapper.of(model)
    host = Host(model, probe)
    lora_set = LoraSet.of(two)
    expected = host(lora_set)
    for _ in range(2):
        model.set_offload(True, device="cpu")
        assert (host(lora_set) - expected).norm() <= 1e-6 * expected.norm()
        model.set_offload(False)
        assert (host(lora_set) - expected).norm() <= 1e-6 * expected.norm()


def test_offload_as_part_of_what_is_wanted(make_model, two, probe):
    model = make_model(num_layers=3)
    ComfyQwenImageWrapper.of(model)
    host = Host(model, probe)
    plain = LoraSet.of(two)
    expected = host(plain)
    assert not model.offload
    wanted = LoraSet.of(two, options=qwenlora.ComposeOptions(offload=True))
    assert (host(wanted) - expected).norm() <= 1e-6 * expected.norm()
    assert model.offload
    manager = model.offload_manager
    host(wanted)
    host(plain)
    # Only the loader's owner turns it off again.
    assert model.offload_manager is manager


def test_200_alternations_grow_nothing(host, two, model):
    sets = [LoraSet.of(path) for path in two]
    counts = set()
    for index in range(200):
        host(sets[index % 2])
        tensors = [*model.parameters(), *model.buffers()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        counts.add((index % 2, len(tensors), sum(t.nbytes for t in tensors), hooks))
    assert len(counts) == 2


def test_moves_need_no_composition(host, two, model):
    steps = []
    lora_set = LoraSet.of(two, options=noting(steps))
    expected = host(lora_set)
    steps.clear()
    model.to("cpu", torch.float32)
    assert torch.equal(host(lora_set), expected)
    assert steps == []


@pytest.mark.parametrize("mode", [True, False])
def test_offload_is_turned_on_in_the_mode_of_the_parameters(make_model, two, mode, monkeypatch):
    """A manager that pins parameters in the other mode leaves tensors that no operation takes."""
    with torch.inference_mode(mode):
        model = make_model(num_layers=2)
    seen = []
    switch = type(model).set_offload

    def recording(self, *args, **kwargs):
        seen.append(torch.is_inference_mode_enabled())
        switch(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "set_offload", recording)
    options = qwenlora.ComposeOptions(offload=True)
    with torch.inference_mode(not mode):
        qwenlora.compose_loras(model, two, options=options)
    assert seen == [mode]


def test_a_model_without_offload_says_so(host, two, model, monkeypatch):
    monkeypatch.delattr(EmulatedQwenImageTransformer, "set_offload")
    wanted = LoraSet.of(two, options=qwenlora.ComposeOptions(offload=True))
    with pytest.raises(UnsupportedModelError, match="no block offload"):
        host(wanted)


def test_called_like_the_transformer(model, probe, two):
    wrapper = ComfyQwenImageWrapper.of(model)
    wrapper.loras = [two[0]]
    assert torch.equal(probe.output(model, call=wrapper), fresh(model, two[0], probe))
    assert wrapper.report.complete
    wrapper.vram_margin_gb = 2.0
    assert wrapper.options.margin_bytes == 2_000_000_000


def test_a_hosts_base_keeps_nothing_of_what_it_leaves_on_the_device(
    host, model, probe, two, monkeypatch
):
    kept = []
    bring = qwenlora.runtime.bring

    def noting(module, wanted, **options):
        kept.append((len(wanted.specs), wanted.options.device_cache_bytes))
        return bring(module, wanted, **options)

    monkeypatch.setattr("qwenlora.runtime.bring", noting)
    host(LoraSet.of(two))
    host()
    assert kept == [(2, None), (0, 0)]
    # A script's own: what it leaves may come back.
    qwenlora.compose_loras(model, two)
    kept.clear()
    ComfyQwenImageWrapper.of(model).want(LoraSet.of())
    probe.output(model)
    assert kept == [(0, None)]
