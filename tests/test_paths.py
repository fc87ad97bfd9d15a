"""Every way of composing gives the same bits.

Slots that are alike are composed together, in loads of any size; a change of strengths is written
in place; everything else goes slot by slot, which is the slow and obvious way. Whatever the stack,
all of them leave equal tensors.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qwenlora
from qwenlora import ComposeOptions, Placement
from qwenlora.group.partition import apart

from . import faults

BLOCKS = 3
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

ONE_BY_ONE = "slot by slot"
WAYS = {
    "together": ComposeOptions(),
    "loads of one slot": ComposeOptions(staging_bytes=1),
    "loads of few slots": ComposeOptions(staging_bytes=1 << 16),
    "path by path": ComposeOptions(placement=Placement.BY_PATH),
    "path by path, in parts": ComposeOptions(placement=Placement.BY_PATH, staging_bytes=1 << 14),
    "nothing cached": ComposeOptions(cache_bytes=0),
    "one thread": ComposeOptions(threads=1),
    "three threads": ComposeOptions(threads=3),
    "deltas in host memory": ComposeOptions(device_cache_bytes=0),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def bases(make_model):
    """Models never touched, by dtype."""
    return {dtype: make_model(num_layers=BLOCKS, dtype=dtype) for dtype in DTYPES}


@pytest.fixture
def alone():
    """Composes with no slots together."""

    def composed(model, loras, options=None):
        with apart():
            return qwenlora.compose_loras(model, loras, options=options)

    return composed


# ---- stacks ----


class Stack:
    """LoRAs in the making over the blocks of a model."""

    def __init__(self, Draft, seed, dtype):
        self.draft = Draft(seed, dtype=dtype)

    def add(self, names, rank, *, blocks=range(BLOCKS), alpha=None, **tensors):
        for block, name in itertools.product(blocks, names):
            self.draft.add(f"transformer_blocks.{block}.{name}", rank, alpha=alpha, **tensors)
        return self


def mixed_ranks(Draft, dtype):
    """Ranks that are no multiples of 16, others for each path."""
    one = Stack(Draft, 1, dtype).add(["attn.to_out.0"], 5).add(["img_mlp.net.0.proj"], 17)
    one.add(["txt_mlp.net.2"], 16).add(["img_mod.1"], 3, alpha=1.7).add(["txt_mod.1"], 32)
    return [(one, 0.7)]


def qkv_apart(Draft, dtype):
    """q, k and v with ranks and scales of their own; one stack lacks k."""
    one = Stack(Draft, 1, dtype)
    for name, rank, alpha in zip(QKV, (4, 16, 21), (4.0, 3.0, 50.0), strict=True):
        one.add([name], rank, alpha=alpha)
    one.add(ADDED_QKV[::2], 16, alpha=5.0)
    other = Stack(Draft, 2, dtype).add([QKV[1]], 9, alpha=2.0).add(ADDED_QKV, 16)
    return [(one, 1.1), (other, -0.4)]


def shared_downs(Draft, dtype):
    """One `down` for q, k and v; in the added ones for two of three."""
    one = Stack(Draft, 1, dtype)
    for block in range(BLOCKS):
        down = one.draft.random(8, 128)
        one.add(QKV, 8, blocks=[block], down=down, alpha=3.0)
        one.add(ADDED_QKV[:2], 8, blocks=[block], down=down.flip(0))
        one.add(ADDED_QKV[2:], 8, blocks=[block])
    return [(one, -1.3)]


def shared_downs_in_one_block(Draft, dtype):
    """Of one block alone: it takes fewer ranks than the others."""
    one = Stack(Draft, 1, dtype).add(QKV, 8, blocks=range(BLOCKS - 1))
    down = one.draft.random(8, 128)
    one.add(QKV, 8, blocks=[BLOCKS - 1], down=down)
    return [(one, 0.6)]


def apart_in_one_block(Draft, dtype):
    """All blocks but one share: it takes more ranks than the others."""
    one = Stack(Draft, 1, dtype)
    for block in range(BLOCKS - 1):
        one.add(QKV, 16, blocks=[block], down=one.draft.random(16, 128))
    one.add(QKV, 16, blocks=[BLOCKS - 1])
    return [(one, 0.6)]


def zero_blocks(Draft, dtype):
    """The last block's deltas are zero, as trainers leave those that get no gradient."""
    names = ["attn.to_q", "attn.to_out.0", "img_mod.1", "txt_mlp.net.0.proj"]
    one = Stack(Draft, 1, dtype).add(names, 12)
    for name in names:
        one.draft.tensors[one.draft.key(f"transformer_blocks.{BLOCKS - 1}.{name}", "up")].zero_()
    one.draft.tensors[one.draft.key("transformer_blocks.1.attn.to_q", "down")].fill_(-0.0)
    return [(one, 1.0)]


def some_blocks(Draft, dtype):
    """Blocks without a delta, and blocks with the other LoRA only."""
    one = Stack(Draft, 1, dtype).add(["attn.to_out.0", "img_mod.1"], 16, blocks=[0, 2])
    other = Stack(Draft, 2, dtype).add(["attn.to_out.0", "txt_mod.1"], 7, blocks=[1, 2])
    return [(one, 0.9), (other, -2.0)]


def top_level(Draft, dtype):
    """Plain linears and modulations."""
    one = Stack(Draft, 1, dtype).add(["img_mod.1", "txt_mod.1"], 20)
    for name, rank in (("img_in", 4), ("txt_in", 17), ("proj_out", 16), ("norm_out.linear", 3)):
        one.draft.add(name, rank, alpha=2.5)
    return [(one, -0.8)]


def several(Draft, dtype):
    """LoRAs of every linear, of several dtypes and ranks."""
    drafts = []
    for seed, (rank, of) in enumerate(((16, dtype), (5, torch.float32), (33, torch.bfloat16))):
        one = Stack(Draft, seed, of)
        one.draft = Draft.full(seed, rank, blocks=BLOCKS, dtype=of)
        drafts.append((one, (0.8, -0.5, 1.25)[seed]))
    return drafts


def tiny_and_huge_scales(Draft, dtype):
    """Products that are subnormal in float16, and some near its largest value."""
    one = Stack(Draft, 1, dtype).add(["attn.to_out.0", "img_mod.1"], 16, alpha=1e-5)
    other = Stack(Draft, 2, dtype).add(["img_mlp.net.2", "txt_mod.1"], 16, alpha=16 * 4e4)
    return [(one, 0.37), (other, 1.9)]


QUICK = (qkv_apart, shared_downs, top_level)
STACKS = (
    *QUICK,
    several,
    mixed_ranks,
    shared_downs_in_one_block,
    apart_in_one_block,
    zero_blocks,
    some_blocks,
    tiny_and_huge_scales,
)


def files_of(stack, Draft, dtype, folder):
    return [
        (one.draft.save(folder / f"{number}.safetensors"), strength)
        for number, (one, strength) in enumerate(stack(Draft, dtype))
    ]


def offloading(base, resident):
    model = copy.deepcopy(base)
    if resident is not None:
        model.set_offload(True, num_blocks_on_gpu=resident)
    return model


def held(model, probe):
    """Tensors of the model and, under offload, of the buffer blocks' layers."""
    blocks = model.offload_manager.buffer_blocks if model.offload else []
    shapes = [[(n, tuple(t.shape)) for n, t in probe.tensors(block)] for block in blocks]
    return probe.snapshot(model).tensors, shapes


def differing(found, expected):
    """Names of the tensors that differ: what a failing test shows."""
    tensors = {
        name for name in found[0] | expected[0] if found[0].get(name) != expected[0].get(name)
    }
    return sorted(tensors), found[1] == expected[1]


def alike(found, expected):
    """Equal, also where both overflow."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(), expected.nan_to_num()
    )


SAME: tuple[list[str], bool] = ([], True)


KINDS = ("rust", "lazy", "sleepy")
"""Of threads: see `workers`."""
RESIDENT = (None, 1, 2)
# Of stack, dtype of the files, dtype of the model, offload and threads, every two values meet. Each
# stack meets all values, and over the stacks the other four meet each other in every way.
ROWS = [
    pytest.param(
        stack,
        DTYPES[turn],
        DTYPES[(turn + number) % 3],
        RESIDENT[(turn + number // 3) % 3],
        kind := KINDS[(turn + number + number // 3) % 3],
        marks=() if stack in QUICK and kind == "rust" else pytest.mark.slow,
    )
    for number, stack in enumerate(STACKS)
    for turn in range(3)
]


@pytest.mark.parametrize(
    ("stack", "of_file", "dtype", "resident", "workers"), ROWS, indirect=["workers"]
)
def test_all_ways_leave_the_same_bits(
    stack, of_file, dtype, resident, workers, bases, alone, probe, Draft, tmp_path
):
    loras = files_of(stack, Draft, of_file, tmp_path)
    model = offloading(bases[dtype], resident)
    alone(model, loras)
    expected, answer = held(model, probe), probe.output(model)
    assert expected[0] != probe.snapshot(bases[dtype]).tensors
    for way, options in WAYS.items():
        qwenlora.clear_cache()
        model = offloading(bases[dtype], resident)
        qwenlora.compose_loras(model, loras, options=options)
        assert (way, differing(held(model, probe), expected)) == (way, SAME)
    # From the last way's stack to other strengths, and back.
    model = offloading(bases[dtype], resident)
    others = [(path, -0.61 * strength) for path, strength in loras]
    for wanted in (others, loras[:1], others, loras):
        qwenlora.compose_loras(model, wanted)
    assert differing(held(model, probe), expected) == SAME
    assert alike(probe.output(model), answer)
    qwenlora.reset_loras(model)
    bare = offloading(bases[dtype], resident)
    assert differing(held(model, probe), held(bare, probe)) == SAME
    assert alike(probe.output(model), probe.output(bare))


# Every way and every dtype meets every kind of threads.
IN_TURN = [
    pytest.param(
        options,
        dtype,
        kind := KINDS[(row + column) % 3],
        id=f"{way}-{dtype}-{kind}",
        marks=() if row < 3 and kind == "rust" else pytest.mark.slow,
    )
    for row, (way, options) in enumerate(WAYS.items())
    for column, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("options", "dtype", "workers"), IN_TURN, indirect=["workers"])
@pytest.mark.parametrize("device", DEVICES)
def test_strengths_written_in_place(
    device, options, dtype, workers, bases, alone, probe, Draft, tmp_path, rescalings
):
    """Where all slots were composed together; equal to slot by slot, over any changes."""
    loras = files_of(several, Draft, torch.float16, tmp_path)
    model, expected = (copy.deepcopy(bases[dtype]).to(device) for _ in range(2))
    qwenlora.compose_loras(model, loras, options=options)
    where = probe.addresses(model)
    for factors in ((0.5, 1, 1), (-3, 0.1, 1), (1e-3, 1, 7), (1, 1, 1)):
        wanted = [(path, by * s) for by, (path, s) in zip(factors, loras, strict=True)]
        qwenlora.compose_loras(model, wanted, options=options)
        alone(expected, wanted)
        assert differing(held(model, probe), held(expected, probe)) == SAME
        assert [lora.strength for lora in qwenlora.applied(model).loras] == [s for _, s in wanted]
    cached = options.cache_bytes > 0 or device == "cuda"
    in_place = options.placement is not Placement.BY_PATH and cached
    assert len(rescalings) == (4 if in_place else 0)
    assert (probe.addresses(model) == where) is in_place


@pytest.mark.slow
@given(data=st.data())
def test_any_stack(data, bases, Draft, tmp_path_factory, probe):
    """Any modules, ranks, dtypes, strengths; composed from any other stack, with any options."""
    folder = tmp_path_factory.mktemp("stack")
    dtype = data.draw(st.sampled_from(DTYPES))
    names = [*QKV, "attn.to_out.0", "img_mlp.net.2", "img_mod.1"]
    files = []
    for number in range(data.draw(st.integers(1, 3))):
        one = Stack(Draft, number, data.draw(st.sampled_from(DTYPES)))
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True)):
            rank = data.draw(st.sampled_from([1, 8, 16, 19, 32]))
            alpha = data.draw(st.sampled_from([None, 1.0, 7.3]))
            blocks = data.draw(
                st.sampled_from([range(BLOCKS), range(1, BLOCKS), [0, BLOCKS - 1], [2]])
            )
            one.add([name], rank, blocks=blocks, alpha=alpha)
        files.append(one.draft.save(folder / f"{number}.safetensors"))
    strengths = st.sampled_from([-2.0, -0.3, 0.0, 0.1, 1.0, 1.7])
    resident = data.draw(st.sampled_from([None, 1, 2, BLOCKS]))
    model = offloading(bases[dtype], resident)
    for _ in range(data.draw(st.integers(1, 4))):
        loras = [(path, data.draw(strengths)) for path in files]
        options = data.draw(st.sampled_from(list(WAYS.values())))
        qwenlora.compose_loras(model, loras, options=options)
    other = offloading(bases[dtype], resident)
    with apart():
        qwenlora.compose_loras(other, loras)
    assert differing(held(model, probe), held(other, probe)) == SAME
    qwenlora.reset_loras(model)
    bare = offloading(bases[dtype], resident)
    assert differing(held(model, probe), held(bare, probe)) == SAME


@pytest.mark.gpu
@pytest.mark.parametrize("step", [0, 1, 7])
def test_strengths_brought_from_host_memory_that_fail(step, bases, probe, Draft, tmp_path):
    """What was written with deltas that are not on the device is written back."""
    loras = files_of(several, Draft, torch.bfloat16, tmp_path)
    model = copy.deepcopy(bases[torch.bfloat16]).to("cuda")
    options = ComposeOptions(device_cache_bytes=0)
    qwenlora.compose_loras(model, loras, options=options)
    before, where = probe.snapshot(model), probe.addresses(model)

    def stop(phase, done, total):
        if done == step:
            raise Interrupted

    wanted = [(path, -1.3 * strength) for path, strength in loras]
    failing = ComposeOptions(device_cache_bytes=0, progress=stop)
    with pytest.raises(Interrupted):
        qwenlora.compose_loras(model, wanted, options=failing)
    assert probe.snapshot(model).tensors == before.tensors
    assert probe.addresses(model) == where
    qwenlora.compose_loras(model, wanted, options=options)
    assert probe.addresses(model) == where
    assert probe.snapshot(model).tensors != before.tensors


# ---- a change of strengths that fails ----


class Interrupted(BaseException):
    """As KeyboardInterrupt, which is no Exception."""


@pytest.fixture
def scene(bases, Draft, tmp_path, rescalings, probe):
    """A composed model, what it is to change to, and a check that nothing has changed."""
    loras = files_of(several, Draft, torch.bfloat16, tmp_path)
    model = copy.deepcopy(bases[torch.bfloat16])
    qwenlora.compose_loras(model, loras)
    before = probe.snapshot(model)
    where = probe.addresses(model)
    wanted = [(path, -1.3 * strength) for path, strength in loras]

    def check(report):
        assert len(rescalings) > 0
        assert probe.snapshot(model).tensors == before.tensors
        assert probe.addresses(model) == where
        assert qwenlora.applied(model) is report

    return model, loras, wanted, check


def steps_of(model, loras, wanted):
    """How many times a change of these strengths calls `progress`."""
    calls = []
    options = ComposeOptions(progress=lambda *step: calls.append(step))
    qwenlora.compose_loras(model, wanted, options=options)
    qwenlora.compose_loras(model, loras)
    assert {phase for phase, _, _ in calls} == {"write"}
    return len(calls)


@pytest.mark.slow
@pytest.mark.in_turn("error")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
def test_an_interruption_at_any_slot_leaves_the_old_strengths(error, scene):
    model, loras, wanted, check = scene
    total = steps_of(model, loras, wanted)
    # Going there and back has made a report of its own.
    report = qwenlora.applied(model)
    for at in range(0, total, 1 if error is RuntimeError else 7):
        left = iter(range(at))

        def progress(*_, left=left):
            if next(left, None) is None:
                raise error("now")

        with pytest.raises(error, match="now"):
            qwenlora.compose_loras(model, wanted, options=ComposeOptions(progress=progress))
        check(report)


@pytest.mark.slow
@pytest.mark.in_turn("writer", "halfway")
@pytest.mark.parametrize("writer", [faults.REWRITE_PACKED, faults.WRITE_BRANCH_UPS])
@pytest.mark.parametrize("halfway", [False, True])
def test_a_write_that_fails_leaves_the_old_strengths(writer, halfway, scene, monkeypatch):
    """Before any of it is written, or when it is."""
    model, loras, wanted, check = scene
    report = qwenlora.applied(model)
    calls = 0

    def count():
        nonlocal calls
        calls += 1

    with monkeypatch.context() as patch:
        faults.replace(patch, [writer], faults.before(count))
        qwenlora.compose_loras(model, wanted)
    qwenlora.compose_loras(model, loras)
    report = qwenlora.applied(model)
    assert calls > 3
    for at in range(calls):
        left = iter(range(at))
        failed = False

        def failing(write, left=left):
            def written(*args, **kwargs):
                nonlocal failed
                now = not failed and next(left, None) is None
                if halfway or not now:
                    write(*args, **kwargs)
                if now:
                    failed = True
                    raise torch.OutOfMemoryError("now")

            return written

        with monkeypatch.context() as patch:
            faults.replace(patch, [writer], failing)
            with pytest.raises(torch.OutOfMemoryError, match="now"):
                qwenlora.compose_loras(model, wanted)
        check(report)
    qwenlora.compose_loras(model, wanted)
    assert [lora.strength for lora in qwenlora.applied(model).loras] == [s for _, s in wanted]


def test_old_strengths_that_cannot_be_written_either(scene, monkeypatch, bases, probe):
    """Then nobody knows what the slots hold: the next call begins from the base."""
    model, loras, wanted, _ = scene

    def failing(*_, **__):
        raise torch.OutOfMemoryError("always")

    with monkeypatch.context() as patch:
        faults.replace(patch, [faults.REWRITE_PACKED], faults.instead(failing))
        with pytest.raises(torch.OutOfMemoryError, match="always"):
            qwenlora.compose_loras(model, wanted)
    assert "interrupted" in str(qwenlora.applied(model).failure)
    qwenlora.compose_loras(model, loras)
    fresh = copy.deepcopy(bases[torch.bfloat16])
    qwenlora.compose_loras(fresh, loras)
    assert probe.snapshot(model).tensors == probe.snapshot(fresh).tensors
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).tensors == probe.snapshot(bases[torch.bfloat16]).tensors
