"""Sets that were left: a return moves pointers, within bounds, and never to anything stale."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

import qwenlora
from qwenlora import cache
from qwenlora.group import sets as kept
from qwenlora.group.group import Group
from qwenlora.group.sets import KeptGroup, KeptSets
from qwenlora.slots.find import find_targets

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS = 4


@pytest.fixture
def model(make_model):
    return make_model(num_layers=BLOCKS, dtype=torch.bfloat16)


@pytest.fixture
def loras(Draft, tmp_path):
    """Two LoRAs of every linear, and one of two blocks alone."""

    def make(name, **more):
        draft = Draft.full(rank=16, dtype=torch.bfloat16, **more)
        return draft.save(tmp_path / f"{name}.safetensors")

    return [
        make("a", seed=1, blocks=BLOCKS),
        make("b", seed=2, blocks=BLOCKS),
        make("part", seed=3, blocks=2),
    ]


def packed(model):
    return [
        tensor
        for module in model.modules()
        for tensor in (getattr(module, "proj_down", None), getattr(module, "proj_up", None))
        if tensor is not None
    ]


def places(model):
    return [tensor.data_ptr() for tensor in packed(model)]


def base_bytes(model):
    return sum(tensor.nbytes for tensor in packed(model))


# ---- the base in host memory ----


@pytest.mark.parametrize("blocks", [1, BLOCKS])
@pytest.mark.parametrize("everywhere", [False, True])
def test_zero_deltas_are_said_again_after_a_return(blocks, everywhere, make_model, Draft, tmp_path):
    """Their slots hold the base, which is kept: the report of a return is the first one's."""
    model = make_model(num_layers=blocks)
    draft, other = Draft(1), Draft.full(seed=2, blocks=blocks)
    for block in range(blocks):
        target = f"transformer_blocks.{block}.attn.to_add_out"
        draft.add(target, 4, down=torch.zeros(4, 128))
        draft.add(f"transformer_blocks.{block}.attn.to_out.0", 4)
        if everywhere:
            draft.tensors[draft.key(f"transformer_blocks.{block}.attn.to_out.0", "up")].zero_()
    path, second = draft.save(tmp_path / "zero.safetensors"), other.save(tmp_path / "o.safetensors")
    for again in range(3):
        (lora,) = qwenlora.compose_loras(model, path).loras
        assert len(lora.zero_slots) == blocks * (1 + everywhere), f"return {again}"
        assert lora.all_zero == everywhere
        qwenlora.compose_loras(model, second)


def test_a_reset_puts_the_very_base_back(model, loras, probe):
    base, before = places(model), probe.snapshot(model)
    for lora in (loras[0], loras[2]):
        qwenlora.compose_loras(model, lora)
        assert cache.shelved_bytes(on_host=True) > 0
        qwenlora.reset_loras(model)
        assert places(model) == base
        assert cache.shelved_bytes(on_host=True) == 0
    assert probe.snapshot(model).differences(before) == []


def test_the_base_stays_over_several_sets(model, loras):
    base, size = places(model), base_bytes(model)
    for lora in loras[:2]:
        qwenlora.compose_loras(model, lora)
        assert cache.shelved_bytes(on_host=True) == size
    qwenlora.reset_loras(model)
    assert places(model) == base


@pytest.mark.parametrize("change", ["clear", "cast", "delete"])
def test_nothing_outlives_what_it_is_of(change, make_model, loras, probe):
    # A fixture's model would be kept alive by the fixture.
    model = make_model(num_layers=BLOCKS, dtype=torch.bfloat16)
    base = places(model)
    before = probe.snapshot(model)
    qwenlora.compose_loras(model, loras[0])
    if change == "clear":
        qwenlora.clear_cache()
        qwenlora.reset_loras(model)
        assert places(model) != base
        assert probe.snapshot(model).differences(before) == []
    elif change == "cast":
        # Every tensor is another one: the model was moved.
        model.to(torch.float64)
    else:
        del model
        gc.collect()
    assert cache.shelved_bytes(on_host=True) == 0


def test_deltas_come_first(model, loras):
    """The base takes what a stack's deltas leave of the cache."""
    qwenlora.compose_loras(model, loras[0])
    deltas = cache.pieces.nbytes
    base = cache.shelved_bytes(on_host=True)
    for limit in (0, deltas, deltas + base // 2, deltas + base):
        qwenlora.reset_loras(model)
        qwenlora.clear_cache()
        qwenlora.compose_loras(model, loras[0], options=qwenlora.ComposeOptions(cache_bytes=limit))
        found = cache.shelved_bytes(on_host=True)
        assert found <= max(0, limit - deltas)
        assert cache.pieces.nbytes + found <= limit
        assert (found > 0) == (limit > deltas)
    assert found == base


def test_a_base_of_other_slots_is_not_mistaken(model, loras, probe):
    """Part of a path leaves its base, then all of it; then all return at once."""
    before = probe.snapshot(model)
    qwenlora.compose_loras(model, loras[2])
    qwenlora.compose_loras(model, loras[0])
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(before) == []


def test_a_base_that_was_written_to_is_not_undone(make_model, loras, Draft, tmp_path, probe):
    """Another checkpoint was loaded into the same tensors: what was kept is of the old one."""
    model, other = (make_model(num_layers=BLOCKS, dtype=torch.bfloat16) for _ in range(2))
    for tensor in packed(other):
        tensor.data = tensor.data.flip(0)
    part = Draft(5, dtype=torch.bfloat16)
    for block in range(BLOCKS):
        part.add(f"transformer_blocks.{block}.attn.to_out.0", 16)
    few = part.save(tmp_path / "few.safetensors")
    for stack in (few, loras[0], []):
        qwenlora.compose_loras(model, stack)
    model.load_state_dict(other.state_dict())
    for stack in (loras[0], few, []):
        qwenlora.compose_loras(model, stack)
        qwenlora.compose_loras(other, stack)
        assert probe.snapshot(model).tensors == probe.snapshot(other).tensors


def test_a_smaller_cache_drops_what_is_kept(model, loras, Draft, tmp_path):
    qwenlora.compose_loras(model, loras[0])
    assert cache.shelved_bytes(on_host=True) > 0
    none = qwenlora.ComposeOptions(cache_bytes=0)
    qwenlora.compose_loras(model, loras[1], options=none)
    assert (cache.shelved_bytes(on_host=True), cache.pieces.nbytes) == (0, 0)


def test_a_base_in_an_arena_is_kept_whole_or_not_at_all(model, loras, Draft, tmp_path):
    """A part of one keeps all of it alive."""
    none = qwenlora.ComposeOptions(cache_bytes=0)
    qwenlora.compose_loras(model, loras[0], options=none)
    qwenlora.reset_loras(model)
    qwenlora.compose_loras(model, loras[2])
    assert cache.shelved_bytes(on_host=True) == 0
    qwenlora.compose_loras(model, [])
    qwenlora.compose_loras(model, loras[0])
    assert cache.shelved_bytes(on_host=True) > 0


@pytest.mark.parametrize("block", [0, BLOCKS - 1])
def test_a_block_that_is_replaced_takes_all_along(block, model, loras):
    qwenlora.compose_loras(model, loras[0])
    assert cache.shelved_bytes(on_host=True) > 0
    model.transformer_blocks[block].to(torch.float32)
    assert cache.shelved_bytes(on_host=True) == 0


@pytest.mark.slow
def test_models_of_several_threads_share_the_account(make_model, loras):
    """Their shelves come and go while others add them up."""

    def work():
        for _ in range(6):
            model = make_model(num_layers=2, dtype=torch.bfloat16)
            qwenlora.compose_loras(model, loras[2])
            cache.clear_devices()
            qwenlora.reset_loras(model)

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work) for _ in range(4)]
        for _ in range(2000):
            cache.shelved_bytes(on_host=True)
        for own in working:
            own.result()


def test_a_failed_composition_keeps_what_is_true(model, loras, probe, monkeypatch):
    before = probe.snapshot(model)
    qwenlora.compose_loras(model, loras[0])
    composed = probe.snapshot(model)

    class Stop(Exception):
        pass

    def stop(phase, done, total):
        if phase == "write" and done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        qwenlora.compose_loras(model, [], options=qwenlora.ComposeOptions(progress=stop))
    assert probe.snapshot(model).differences(composed) == []
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(before) == []


# ---- composed sets on a device ----


@pytest.fixture
def on_device(model):
    """A model on a device."""
    return model.to("cuda")


ROOM = qwenlora.ComposeOptions(device_cache_bytes=1 << 30)


@pytest.mark.gpu
def test_a_switch_moves_pointers(on_device, loras, probe):
    model, (a, b, part) = on_device, loras
    states = {}
    for stack in ([], [a], [(b, 0.5)], [a, b], [part]):
        qwenlora.clear_cache()
        qwenlora.compose_loras(model, stack, options=ROOM)
        states[str(stack)] = probe.snapshot(model)
    qwenlora.reset_loras(model)
    qwenlora.clear_cache()
    seen = {}
    for stack in ([], [a], [(b, 0.5)], [a], [], [a, b], [part], [a], [a, b], [(b, 0.5)], []):
        report = qwenlora.compose_loras(model, stack, options=ROOM)
        assert probe.snapshot(model).differences(states[str(stack)]) == []
        assert qwenlora.applied(model) == report
        if str(stack) in seen and stack != [part]:
            assert places(model) == seen[str(stack)], stack
        seen[str(stack)] = places(model)


@pytest.mark.gpu
def test_a_strength_changes_after_a_return(on_device, loras, probe):
    model, (a, b, _) = on_device, loras
    qwenlora.compose_loras(model, (a, 0.25), options=ROOM)
    expected = probe.snapshot(model)
    qwenlora.clear_cache()
    for stack in ([(a, 1.0)], [b], [(a, 1.0)], [(a, 0.25)]):
        qwenlora.compose_loras(model, stack, options=ROOM)
    assert probe.snapshot(model).differences(expected) == []
    # What was left at full strength is not what is in place by now.
    qwenlora.compose_loras(model, b, options=ROOM)
    qwenlora.compose_loras(model, (a, 0.25), options=ROOM)
    assert probe.snapshot(model).differences(expected) == []


@pytest.mark.gpu
def test_no_more_than_allowed(on_device, loras):
    model, (a, b, _) = on_device, loras
    none = qwenlora.ComposeOptions(device_cache_bytes=0)
    for stack in ([a], [b], []):
        qwenlora.compose_loras(model, stack, options=none)
        assert cache.shelved_bytes(on_host=False) == 0
    qwenlora.compose_loras(model, a, options=ROOM)
    base = cache.shelved_bytes(on_host=False)
    limit = cache.on_device.nbytes + base
    little = qwenlora.ComposeOptions(device_cache_bytes=limit)
    for turn in range(6):
        qwenlora.compose_loras(model, [(b, 0.5), a][turn % 2], options=little)
        held = cache.shelved_bytes(on_host=False) + cache.on_device.nbytes
        assert held <= limit


@pytest.mark.gpu
def test_few_sets_are_kept(on_device, loras):
    model, (a, b, part) = on_device, loras
    for stack in ([a], [b], [part], [a, b], [b, a], [a, part], [part, a], [b, part]):
        qwenlora.compose_loras(model, stack, options=ROOM)
    sets = kept_sets(model)
    assert len(sets) == kept._MAX_SETS
    held = sum(own.nbytes for groups in sets.values() for own in groups.values())
    assert cache.shelved_bytes(on_host=False) == held > 0


@dataclass(frozen=True, eq=False)
class Fleeting(KeptGroup):
    """A group that is being asked for its place when a finalizer drops all sets."""

    drop: Callable[[], None] = lambda: None

    @property
    def on_host(self):
        self.drop()
        return True


def test_all_may_be_dropped_in_the_midst_of_a_look(model):
    group = Group(tuple(find_targets(model, {}).values())[:1])
    sets = KeptSets()
    for key in range(3):
        sets.put(key, [Fleeting(group, None, 0, None, (), drop=sets.clear)])
        assert sets.holds(key)
    sets.drop_oldest(on_host=True)
    assert not any(sets.holds(key) for key in range(3))


def kept_sets(model):
    from qwenlora.compose import structure

    return structure._known(model).kept._sets


@pytest.mark.gpu
@pytest.mark.parametrize("leave", ["move", "delete"])
def test_a_model_that_leaves_takes_its_sets_along(leave, make_model, loras):
    model, (a, b, _) = make_model(num_layers=BLOCKS, dtype=torch.bfloat16).to("cuda"), loras
    for stack in (a, b):
        qwenlora.compose_loras(model, stack, options=ROOM)
    assert cache.shelved_bytes(on_host=False) > 0
    if leave == "move":
        model.to("cpu")
    else:
        del model
    gc.collect()
    assert cache.shelved_bytes(on_host=False) == 0


def test_parameters_of_inference_mode_that_were_moved_outside_of_it(make_model, lora):
    """They say that they are normal ones, and count no writes: a base cannot be told by those."""
    with torch.inference_mode():
        model = make_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    layer = model.transformer_blocks[0].attn.to_qkv
    assert not layer.proj_down.is_inference()
    before = {name: own.data.clone() for name, own in model.named_parameters()}
    for stack in (lora[0], [(lora[0], 0.5)], [], lora[0], []):
        qwenlora.compose_loras(model, stack)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name].data, own) for name, own in before.items())
