"""Tensors in memory that nobody writes to: one LoRA, however often it is asked for."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import deque

import pytest
import torch

import qwenlora
from qwenlora import LoraSet, LoraSpec, cache
from qwenlora.held import HeldSource, HeldTensors

STEM = "transformer_blocks.0.attn.to_out.0"


def pair(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{STEM}.lora_A.weight": torch.randn(4, 128, generator=generator),
        f"{STEM}.lora_B.weight": torch.randn(128, 4, generator=generator),
    }


@pytest.fixture
def composed(monkeypatch):
    """Keys of the sets that were built, in order; a change of strength alone builds none."""
    seen = []
    compose = qwenlora.compose.bring.compose

    def counting(task):
        seen.append(task.wanted.key)
        return compose(task)

    monkeypatch.setattr("qwenlora.compose.bring.compose", counting)
    return seen


def test_it_composes_what_a_state_dict_does(make_model):
    models = [make_model(), make_model()]
    for model, source in zip(models, (pair(), HeldTensors(pair())), strict=True):
        qwenlora.compose_loras(model, (source, 0.5), strict=True)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("inference", [False, True])
def test_the_same_object_is_the_same_lora(inference):
    with torch.inference_mode(inference):
        tensors = {key: tensor.clone() for key, tensor in pair().items()}
    held = HeldTensors(tensors)
    first, again = (LoraSet.of(LoraSpec(held, 0.5)) for _ in range(2))
    assert first == again
    assert hash(first) == hash(again)
    assert first != LoraSet.of(LoraSpec(held, 0.6))
    assert first != LoraSet.of(LoraSpec(HeldTensors(tensors), 0.5))
    plain = [LoraSet.of(LoraSpec(tensors, 0.5)) for _ in range(2)]
    # In inference mode tensors do not count their changes: the reason for all this.
    assert (plain[0] == plain[1]) is not inference


def test_a_strength_is_changed_in_place_and_back(make_model, composed):
    model, held = make_model(), HeldTensors(pair())
    states = []
    for strength in (0.5, 0.5, -1.25, 0.5):
        report = qwenlora.compose_loras(model, (held, strength))
        assert report.complete
        states.append({name: own.clone() for name, own in model.state_dict().items()})
    assert len(composed) == 1
    assert all(torch.equal(states[0][name], states[3][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_it_is_a_mapping_that_is_copied_by_reference():
    tensors = pair()
    held = HeldTensors(tensors)
    tensors.clear()
    assert list(held) == list(pair())
    assert len(held) == 2
    assert copy.deepcopy(held) is held
    assert copy.deepcopy(LoraSet.of(held).sources[0].identity) == held.token
    assert held != HeldTensors(held)
    assert "2 tensors" in repr(held)


def test_another_process_has_another_lora():
    held = HeldTensors(pair())
    again = pickle.loads(pickle.dumps(held))
    assert again.token != held.token
    assert all(torch.equal(again[key], held[key]) for key in held)
    wanted = LoraSet.of(LoraSpec(held, 0.5))
    assert pickle.loads(pickle.dumps(wanted)) != wanted


def test_nothing_holds_the_tensors_but_its_sets():
    held = HeldTensors(pair())
    source = LoraSet.of(held).sources[0]
    assert isinstance(source, HeldSource)
    gone = weakref.ref(held)
    del held, source
    gc.collect()
    assert gone() is None


def test_its_deltas_go_with_it(make_model):
    """At the next composition: nothing can ask for them again."""
    model = make_model()
    before = cache.pieces.nbytes
    for _ in range(3):
        qwenlora.compose_loras(model, HeldTensors(pair()))
        kept = cache.pieces.nbytes
        qwenlora.reset_loras(model)
    assert kept > before
    gc.collect()
    qwenlora.compose_loras(model, HeldTensors(pair(1)))
    assert cache.pieces.nbytes == kept


def test_two_compositions_begin_at_once(model, monkeypatch):
    """What was forgotten goes with the one that comes to it first."""

    class Shared(deque):
        def popleft(self):
            """Another thread has just taken all."""
            self.clear()
            return super().popleft()

    shared = Shared()
    monkeypatch.setattr(cache, "_FORGOTTEN", shared)
    shared.append(HeldTensors(pair()).token)
    assert qwenlora.compose_loras(model, HeldTensors(pair(1))).complete
    assert not shared
