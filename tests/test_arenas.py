"""Slots that lie in one allocation: copies, moves and saves take their own elements, no others.

Composing puts the tensors of one path over all blocks into one allocation, an arena.
"""

from __future__ import annotations

import copy
import gc
import io
import re
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

import qwenlora
from qwenlora import cache
from qwenlora.errors import ModelStateError
from qwenlora.group import arena
from qwenlora.group.allocation import evenly, is_part, rest_from, split
from qwenlora.group.arena import PackedArena
from qwenlora.group.filler import Filler
from qwenlora.group.group import Member
from qwenlora.group.host_arena import HostPackedArena, rewrite_packed
from qwenlora.group.load import Staged
from qwenlora.packing.layout import LowRankSide, round_up
from qwenlora.slots.find import find_targets

BLOCKS = 4


@pytest.fixture
def model(make_model):
    return make_model(num_layers=BLOCKS, dtype=torch.bfloat16)


@pytest.fixture
def stack(Draft, tmp_path):
    """A LoRA of every linear in every block: all slots of a path are alike."""
    draft = Draft.full(seed=1, rank=16, blocks=BLOCKS, dtype=torch.bfloat16)
    return [(draft.save(tmp_path / "full.safetensors"), 0.75)]


@pytest.fixture
def composed(model, stack):
    qwenlora.compose_loras(model, stack)
    # What the tests are about: one allocation holds a path's tensors of all blocks.
    for tensors in (
        [block.attn.to_out[0].proj_down for block in model.transformer_blocks],
        [block.img_mod[1].qwenlora_up for block in model.transformer_blocks],
    ):
        first, last = tensors[0], tensors[-1]
        assert evenly(tensors) == first.numel()
        assert rest_from(first.data_ptr(), last.data_ptr() + last.nbytes, first) is not None
    return model


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


def own_bytes(module):
    """Bytes of all elements."""
    return sum(tensor.nbytes for tensor in tensors_of(module))


def held_bytes(*modules):
    """Bytes of all memory that the tensors keep alive."""
    storages = [t.untyped_storage() for module in modules for t in tensors_of(module)]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


def test_a_composed_model_holds_no_more_than_its_elements(composed):
    assert held_bytes(composed) == own_bytes(composed)


# ---- in host memory ----

QKV = "attn.to_qkv"


@pytest.fixture
def targets(model):
    """One fused path's slots, which have bases of their own."""
    found = find_targets(model, {}).values()
    return [target for target in found if target.path.endswith(QKV)]


@pytest.fixture
def filler():
    own = Filler(threads=2)
    yield own
    own.close()


def part_of(row, slots, ranks, rank_begin, *, dtype, factors=(1.0, 0.3, -2.5)):
    """A LoRA's deltas of q, k and v in some slots."""
    generator = torch.Generator().manual_seed(slots.start + rank_begin)
    rows, features = row.out_features // 3, row.in_features

    def values(*shape):
        return torch.randn(len(slots), *shape, generator=generator).to(dtype)

    return arena.Part(
        slots=slots,
        members=[
            Member(r, 1.0, at * rows, rows, dtype, features, {}) for at, r in enumerate(ranks)
        ],
        downs=[values(rank, features) for rank in ranks],
        ups=[values(rows, rank) for rank in ranks],
        factors=factors,
        starts=[0, ranks[0], ranks[0] + ranks[1]],
        rank=sum(ranks),
        rank_begin=rank_begin,
    )


def same_factors(one, other):
    one.finish()
    pairs = zip(one.factors().wait(), other.factors().wait(), strict=True)
    return all(torch.equal(a, b) for own, its in pairs for a, b in zip(own, its, strict=True))


@pytest.mark.parametrize("formed_bytes", [1, 1 << 15, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", [(16, 16, 32), (4, 9, 16)])
def test_rust_packs_what_torch_does(formed_bytes, dtype, ranks, targets, filler, resize):
    """Loads of two LoRAs that begin and end at other slots."""
    resize(formed_bytes=formed_bytes)
    row, first = targets[0].row, round_up(sum(ranks), 16)
    loads = [(range(1), 0), (range(2), first), (range(1, BLOCKS), 0), (range(2, BLOCKS), first)]
    arenas = [
        HostPackedArena(targets, 2 * first, filler=filler),
        PackedArena(targets, 2 * first),
    ]
    for made in arenas:
        for slots, begin in loads:
            made.write(part_of(row, slots, ranks, begin, dtype=dtype))
    filler.wait()
    assert same_factors(*arenas)
    # Factors of another strength, over what is there.
    again = part_of(row, range(1, 3), ranks, 0, dtype=dtype, factors=(0.7, 1.0, 1e-3))
    base_tiles = row.base_rank // 16
    rewrite_packed(
        LowRankSide.UP, arenas[0]._factors[1].wait(), again, base_rank=row.base_rank, threads=2
    )
    arena.write_packed_ups(arenas[1]._up, again, base_tiles=base_tiles)
    assert same_factors(*arenas)


@pytest.mark.parametrize("cleared", [False, True])
def test_bases_come_with_the_first_deltas(cleared, targets, filler):
    """Whichever slots are written first, or none."""
    row, ranks = targets[0].row, (16, 16, 32)
    made = HostPackedArena(targets, 64, filler=filler)
    if cleared:
        made.clear()
    part = part_of(row, range(2, 3), ranks, 0, dtype=torch.bfloat16)
    made.write(part)
    made.write(part_of(row, range(1, 2), ranks, 0, dtype=torch.bfloat16))
    made.write(part)
    made.finish()
    filler.wait()
    downs, ups = made.factors().wait()
    for target, down, up in zip(targets, downs, ups, strict=True):
        for name, factor in (("proj_down", down), ("proj_up", up)):
            base = getattr(target.module, name)
            tiles = factor.view(factor.shape[0] // 16, -1, 256)
            own = tiles[:, : base.shape[1] // 16].reshape(base.shape)
            assert torch.equal(own, base)
            if cleared and target in (targets[0], targets[3]):
                assert not tiles[:, base.shape[1] // 16 :].any()


# ---- copies ----


def test_a_copy_of_a_block_holds_its_own_bytes(composed, probe):
    block = composed.transformer_blocks[1]
    twin = copy.deepcopy(block)
    assert held_bytes(twin) == own_bytes(twin) == own_bytes(block)
    assert probe.snapshot(twin).differences(probe.snapshot(block)) == []
    assert held_bytes(block, twin) == held_bytes(block) + own_bytes(twin)


@pytest.mark.parametrize("reset", [False, True])
def test_a_copy_of_the_model_holds_its_own_bytes(reset, composed, probe):
    if reset:
        qwenlora.reset_loras(composed)
    twin = copy.deepcopy(composed)
    assert held_bytes(twin) == own_bytes(twin) == own_bytes(composed)
    assert held_bytes(composed, twin) == held_bytes(composed) + held_bytes(twin)
    assert probe.snapshot(twin).tensors == probe.snapshot(composed).tensors


def test_a_copy_of_the_model_is_reset_and_composed_again(make_model, composed, stack, probe):
    before = probe.snapshot(composed)
    twin = copy.deepcopy(composed)
    assert qwenlora.applied(twin).complete
    qwenlora.reset_loras(twin)
    bare = make_model(num_layers=BLOCKS, dtype=torch.bfloat16)
    assert probe.snapshot(twin).tensors == probe.snapshot(bare).tensors
    assert probe.snapshot(composed).differences(before) == []
    qwenlora.compose_loras(twin, stack)
    assert probe.snapshot(twin).tensors == before.tensors
    assert held_bytes(twin) == own_bytes(twin)


def test_a_change_of_strength_does_not_reach_copies(composed, stack, probe):
    """It writes in place."""
    block = copy.deepcopy(composed.transformer_blocks[2])
    twin = copy.deepcopy(composed)
    where = probe.addresses(composed)
    before, of_block = probe.snapshot(twin), probe.snapshot(block)
    qwenlora.compose_loras(composed, [(stack[0][0], -1.5)])
    assert probe.addresses(composed) == where
    assert probe.snapshot(twin).differences(before) == []
    assert probe.snapshot(block).differences(of_block) == []
    assert probe.snapshot(composed).tensors != before.tensors
    assert qwenlora.applied(twin).loras[0].strength == 0.75


# ---- moves ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cast_there_and_back(dtype, make_model, composed, stack, probe):
    before = probe.snapshot(composed)
    composed.to(dtype)
    assert held_bytes(composed) == own_bytes(composed)
    composed.to(torch.bfloat16)
    if dtype is torch.float32:
        assert probe.snapshot(composed).tensors == before.tensors
    qwenlora.reset_loras(composed)
    bare = make_model(num_layers=BLOCKS, dtype=torch.bfloat16)
    bare.to(dtype).to(torch.bfloat16)
    assert probe.snapshot(composed).tensors == probe.snapshot(bare).tensors


@pytest.mark.gpu
@pytest.mark.parametrize("composed_on", ["cpu", "cuda"])
def test_a_move_there_and_back(composed_on, make_model, model, stack, probe):
    model.to(composed_on)
    qwenlora.compose_loras(model, stack)
    before = probe.snapshot(model)
    for device in ("cuda", "cpu", "cuda", "cpu"):
        model.to(device)
        assert probe.snapshot(model).tensors == before.tensors
    assert held_bytes(model) == own_bytes(model)
    qwenlora.reset_loras(model)
    bare = make_model(num_layers=BLOCKS, dtype=torch.bfloat16)
    assert probe.snapshot(model).tensors == probe.snapshot(bare).tensors


@pytest.mark.gpu
def test_a_pinned_block_holds_its_own_bytes(composed, stack, probe):
    block = composed.transformer_blocks[1]
    before = probe.snapshot(composed)
    for tensor in tensors_of(block):
        tensor.data = tensor.data.pin_memory()
    assert held_bytes(block) == own_bytes(block)
    assert probe.snapshot(composed).tensors == before.tensors
    qwenlora.compose_loras(composed, [(stack[0][0], 2.0)])
    qwenlora.compose_loras(composed, stack)
    assert probe.snapshot(composed).tensors == before.tensors


@pytest.mark.gpu
def test_a_model_that_leaves_the_device_leaves_no_arena(model, stack):
    # Libraries keep workspaces.
    before = torch.cuda.memory_allocated()
    model.to("cuda")
    qwenlora.compose_loras(model, stack, options=qwenlora.ComposeOptions(device_cache_bytes=0))
    model.to("cpu")
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_block_that_leaves_takes_nothing_along(composed, probe):
    """An arena is freed as a whole, with the last of its slots."""
    others = [composed.transformer_blocks[at] for at in range(BLOCKS) if at != 1]
    before = [probe.snapshot(block).tensors for block in others]
    del composed.transformer_blocks[1]
    gc.collect()
    assert [probe.snapshot(block).tensors for block in others] == before
    others[0].to("meta")
    gc.collect()
    assert [probe.snapshot(block).tensors for block in others[1:]] == before[1:]


@pytest.mark.parametrize("change", ["strength", "reset"])
def test_a_block_that_was_replaced_by_its_copy(change, make_model, composed, stack, probe):
    """Slots no longer lie in one arena: found out, and composed all the same."""
    composed.transformer_blocks[1] = copy.deepcopy(composed.transformer_blocks[1])
    fresh = make_model(num_layers=BLOCKS, dtype=torch.bfloat16)
    if change == "strength":
        qwenlora.compose_loras(composed, [(stack[0][0], 2.0)])
        qwenlora.compose_loras(fresh, [(stack[0][0], 2.0)])
    else:
        qwenlora.reset_loras(composed)
    assert probe.snapshot(composed).tensors == probe.snapshot(fresh).tensors


def test_a_slot_moved_out_of_its_arena_in_place(make_model, composed, stack, probe):
    """The parameter is the same object, its memory another: a write to the arena would miss it."""
    slot = composed.transformer_blocks[2].attn.to_out[0]
    slot.proj_up.data = slot.proj_up.data.clone()
    branch = composed.transformer_blocks[0].img_mod[1].qwenlora_up
    branch.data = branch.data.clone()
    qwenlora.compose_loras(composed, [(stack[0][0], 2.0)])
    fresh = make_model(num_layers=BLOCKS, dtype=torch.bfloat16)
    qwenlora.compose_loras(fresh, [(stack[0][0], 2.0)])
    assert probe.snapshot(composed).tensors == probe.snapshot(fresh).tensors


# ---- saves ----


@pytest.mark.parametrize("save", [save_file, save_model])
@pytest.mark.parametrize("part", ["model", "block"])
def test_safetensors_take_their_own_elements(save, part, composed, tmp_path):
    module = composed if part == "model" else composed.transformer_blocks[1]
    path = tmp_path / "saved.safetensors"
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    save(module if save is save_model else module.state_dict(), str(path))
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + sum(tensor.nbytes for tensor in state.values())
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(state)


def saved_bytes(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.tell(), stream


@pytest.mark.parametrize("part", ["model", "block"])
def test_torch_saves_the_elements_alone(part, composed):
    """It writes the storages behind tensors."""
    module = composed if part == "model" else composed.transformer_blocks[1]
    state = module.state_dict()
    elements = sum(tensor.nbytes for tensor in state.values())
    size, stream = saved_bytes(state)
    assert elements < size < 1.2 * elements
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("reset", [False, True])
def test_accelerate_drops_nothing(reset, composed):
    """It keeps one tensor of each storage."""
    utils = pytest.importorskip("accelerate.utils")
    if reset:
        qwenlora.reset_loras(composed)
    state = composed.state_dict()
    assert utils.clean_state_dict_for_safetensors(dict(state)).keys() == state.keys()


# ---- memory ----


@pytest.fixture
def allocations(monkeypatch):
    """Weak references to the memory of every arena."""
    found: list[weakref.ref] = []

    def recorded(allocate):
        def allocated(*args, **kwargs):
            array = allocate(*args, **kwargs)
            found.append(weakref.ref(array))
            return array

        return allocated

    monkeypatch.setattr(np, "empty", recorded(np.empty))
    monkeypatch.setattr(np, "zeros", recorded(np.zeros))

    def alive() -> int:
        # Deltas that are kept lie in memory of their own.
        kept = sum(isinstance(own, Staged) for own in cache.pieces.values())
        return sum(reference() is not None for reference in found) - kept

    return alive


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_no_arena_outlives_its_views(cached, model, stack, allocations, tmp_path, Draft):
    """Nor does a change of strengths or of the stack keep the arenas of before."""
    options = qwenlora.ComposeOptions(cache_bytes=1 << 30 if cached else 0)
    other = Draft.full(seed=2, rank=32, blocks=BLOCKS).save(tmp_path / "other.safetensors")
    qwenlora.compose_loras(model, stack, options=options)
    gc.collect()
    alive = allocations()
    assert alive > 0
    held = held_bytes(model)
    for strength in (0.5, 2.0):
        qwenlora.compose_loras(model, [(stack[0][0], strength)], options=options)
        gc.collect()
        assert (allocations(), held_bytes(model)) == (alive, held)
    qwenlora.compose_loras(model, [(other, 1.0)], options=options)
    qwenlora.compose_loras(model, stack, options=options)
    gc.collect()
    assert (allocations(), held_bytes(model)) == (alive, held)
    qwenlora.reset_loras(model)
    assert held_bytes(model) == own_bytes(model)


@pytest.mark.parametrize("base", ["kept", "copied"])
def test_a_reset_lets_every_arena_go_but_the_bases(base, model, stack, allocations):
    bare = held_bytes(model)
    options = qwenlora.ComposeOptions(cache_bytes=1 << 30 if base == "kept" else 0)
    qwenlora.compose_loras(model, stack, options=options)
    qwenlora.reset_loras(model)
    gc.collect()
    assert held_bytes(model) == own_bytes(model) == bare
    paths = {
        re.sub(r"\.\d+\.", ".", name, count=1)
        for name, _ in model.named_parameters()
        if name.endswith(("proj_down", "proj_up"))
    }
    # One for each path and factor holds the base's fragments, unless those are the first ones;
    # nothing of side branches is left.
    assert allocations() == (0 if base == "kept" else len(paths))
    twin = copy.deepcopy(model)
    del model
    gc.collect()
    assert own_bytes(twin) == bare


# ---- offload ----


@pytest.mark.parametrize("when", ["before", "after"])
def test_offload_buffers_hold_one_blocks_bytes(when, make_model, model, stack, probe):
    if when == "before":
        qwenlora.compose_loras(model, stack)
    model.set_offload(True, num_blocks_on_gpu=1)
    if when == "after":
        qwenlora.compose_loras(model, stack)
    manager = model.offload_manager
    for buffer in manager.buffer_blocks:
        assert held_bytes(buffer) == own_bytes(buffer)
        assert own_bytes(buffer) == own_bytes(model.transformer_blocks[-1])
    manager.bytes_per_forward = []
    moved = probe.output(model)
    offloaded = [own_bytes(block) for block in list(model.transformer_blocks)[1:]]
    assert manager.bytes_per_forward == [sum(offloaded)]
    resident = make_model(num_layers=BLOCKS, dtype=torch.bfloat16)
    qwenlora.compose_loras(resident, stack)
    assert torch.equal(moved, probe.output(resident))


def test_a_stranger_in_the_arena_is_found(composed, stack):
    """A slot whose tensor was swapped for one of another rank is not written over."""
    slot = composed.transformer_blocks[2].attn.to_out[0]
    slot.proj_up.data = slot.proj_up.data[:, :16].clone()
    slot.proj_down.data = slot.proj_down.data[:, :16].clone()
    with pytest.raises(ModelStateError, match="something else changed"):
        qwenlora.compose_loras(composed, [(stack[0][0], 2.0)])


# ---- the collector ----


def test_the_collector_may_run_at_any_moment():
    """What was split goes by the collector while others are looked up."""
    held = [split(torch.zeros(2, 4)) for _ in range(300)]
    before = gc.get_threshold()
    for turn in range(400):
        gc.disable()
        for _ in range(3):
            cycle = [split(torch.zeros(2, 4))]
            cycle.append(cycle)
            del cycle
        # The collection comes after another count of objects each time.
        gc.set_threshold(1 + turn % 40, 1, 1)
        gc.enable()
        try:
            assert not is_part(torch.zeros(4))
            assert is_part(held[-1][1])
        finally:
            gc.set_threshold(*before)
