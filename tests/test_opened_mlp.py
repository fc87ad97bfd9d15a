"""Fused MLPs that are run as their two linears, where something runs beside one of them."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import qwenlora
from qwenlora.compose.structure import forget_structure, structure_of
from qwenlora.delta.parts import PartKind
from qwenlora.delta.scale import ScaledPair
from qwenlora.delta.slot_deltas import SlotDeltas
from qwenlora.emulation import (
    EmulatedConfig,
    KernelContractError,
    Precision,
    random_transformer,
)
from qwenlora.emulation.block import EmulatedFeedForward
from qwenlora.emulation.quantize import IntegerRange, quantize_activation
from qwenlora.errors import ModelStateError, UnsupportedModelError
from qwenlora.model.state import read_state
from qwenlora.model.subclass import forward_of, is_marked, unmark_hooked
from qwenlora.packing import activation, pack
from qwenlora.packing.layout import UNSIGNED_SHIFT
from qwenlora.plan.documents import Route
from qwenlora.slots import branch
from qwenlora.slots.find import find_targets
from qwenlora.slots.opened_mlp import run_mlp
from qwenlora.slots.unsigned import quantize_unsigned
from qwenlora.slots.whole import slot_of

from .parts import Dense, install, random_part, shape_of, sum_of

BLOCK = "transformer_blocks.0"
MLP = f"{BLOCK}.img_mlp"
FIRST, SECOND = f"{MLP}.net.0.proj", f"{MLP}.net.2"
KINDS = list(PartKind)
INPUT_KINDS = [kind for kind in KINDS if kind.is_input or kind is PartKind.PASS]
CLOSE = 1e-5
NEAR = 2e-4
"""A tenth of what bfloat16 rounds: few values are rounded the other way. Measured: 4.8e-5."""
FINE = {"precision": Precision.EXACT, "dtype": torch.float32}
COARSE = {"precision": Precision.W4A4, "dtype": torch.bfloat16}
MICRO = {"precision": Precision.NVFP4, "dtype": torch.bfloat16}


def named(value):
    return value.name.lower() if isinstance(value, PartKind) else str(value).rpartition(".")[2]


def slots(model):
    found = find_targets(model, {})
    return found[FIRST], found[SECOND]


def inputs(target, rows=300, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, rows, target.row.in_features, generator=generator)
    return x.to(target.dtype)


def run(mlp, x):
    with torch.no_grad():
        return mlp(x)


def part(target, kind, seed=0):
    shape = shape_of(kind, target.row.in_features, 0, target.row.out_features)
    size = 1.0 if kind in (PartKind.KRON, PartKind.DENSE) else 0.1
    return random_part(shape, Dense.of(target), target.dtype, seed=seed, size=size)


def expected(x, first, second):
    hidden = torch.nn.functional.gelu(first.output(x), approximate="tanh")
    return second.output(hidden)


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_an_mlp_is_known_by_its_code(make_model):
    model = make_model()
    found = find_targets(model, {})
    mlp = model.get_submodule(MLP)
    assert {path for path, own in found.items() if own.opened and own.opened.module is mlp} == {
        FIRST,
        SECOND,
    }
    assert {path for path, own in found.items() if own.row.opens} == {
        path for path in found if ".net." in path
    }


def test_an_mlp_whose_activation_is_another_is_not_opened(make_model):
    model = make_model()
    model.get_submodule(f"{MLP}.net.0").approximate = "none"
    assert slots(model)[0].opened is None


def test_an_mlp_whose_code_is_another_is_not_opened(make_model):
    class Other(EmulatedFeedForward):
        def forward(self, hidden_states):
            return hidden_states

    model = make_model()
    model.get_submodule(MLP).__class__ = Other
    assert slots(model)[1].opened is None


def test_an_mlp_with_a_forward_of_its_own_stays_fused(make_model):
    model = make_model()
    mlp = model.get_submodule(MLP)
    first, _ = slots(model)
    mlp.forward = mlp.forward
    assert not slots(model)[0].row.opens
    with pytest.raises(UnsupportedModelError, match="has a forward of its own"):
        install(first, [part(first, PartKind.FACTOR)])
    assert slot_of(first).is_base()


@pytest.mark.parametrize("side", ["first", "second"])
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_part_adds_what_it_says(kind, side, make_model):
    model = make_model(**FINE)
    mlp, targets = model.get_submodule(MLP), slots(model)
    x = inputs(targets[0])
    before, dense = run(mlp, x), [Dense.of(target) for target in targets]
    place = ("first", "second").index(side)
    one = part(targets[place], kind)
    dense[place] = sum_of([one], dense[place])
    install(targets[place], [one])
    assert error(run(mlp, x), expected(x, *dense)) < CLOSE
    slot_of(targets[place]).restore()
    assert not is_marked(mlp)
    assert torch.equal(run(mlp, x), before)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["first", "second"])
@pytest.mark.parametrize("kind", KINDS, ids=named)
@pytest.mark.parametrize("precision", [COARSE, MICRO], ids=["int4", "nvfp4"])
def test_on_quantized_layers_the_delta_arrives(precision, kind, side, make_model):
    model = make_model(**precision)
    mlp, targets = model.get_submodule(MLP), slots(model)
    x = inputs(targets[0], rows=600)
    before, dense = run(mlp, x).double(), [Dense.of(target) for target in targets]
    old = expected(x, *dense)
    place = ("first", "second").index(side)
    one = part(targets[place], kind)
    dense[place] = sum_of([one], dense[place])
    new = expected(x, *dense)
    install(targets[place], [one])
    found = run(mlp, x).double()
    wanted = new - old
    share = float(((found - before) * wanted).sum() / wanted.square().sum())
    assert 0.98 < share < 1.02
    assert error(found, new) < 1.1 * error(before, old) + 2e-3


@pytest.mark.parametrize("precision", [FINE, COARSE, MICRO], ids=["exact", "int4", "nvfp4"])
@pytest.mark.parametrize("rows", [1, 256, 300, 700])
def test_opened_is_fused(rows, precision, make_model):
    """With zeros beside the layers: what is opened gives what the kernel gave."""
    model = make_model(**precision)
    mlp, targets = model.get_submodule(MLP), slots(model)
    x = inputs(targets[0], rows=rows)
    fused = run(mlp, x)
    for target in targets:
        room = [shape_of(PartKind.FACTOR, target.row.in_features, 0, target.row.out_features)]
        install(target, [], room=room)
        assert forward_of(mlp) is run_mlp
        assert error(run(mlp, x), fused) < NEAR
    for target in targets:
        assert forward_of(mlp) is run_mlp
        slot_of(target).restore()
    assert type(mlp) is EmulatedFeedForward
    assert torch.equal(run(mlp, x), fused)


def test_a_branch_inside_and_parts_beside(make_model):
    """The other layer's packed ranks are read by the opened path, too."""
    model = make_model(**COARSE)
    mlp, (first, second) = model.get_submodule(MLP), slots(model)
    x = inputs(first)
    generator = torch.Generator().manual_seed(2)
    pair = ScaledPair(
        torch.randn(16, second.row.in_features, generator=generator).bfloat16(),
        (0.1 * torch.randn(second.row.out_features, 16, generator=generator)).bfloat16(),
    )
    install(second, [], pairs=(pair,), rank_added=16, route=Route.INSIDE)
    assert not is_marked(mlp)
    fused = run(mlp, x)
    install(first, [], room=[shape_of(PartKind.FACTOR, 128, 0, first.row.out_features)])
    assert error(run(mlp, x), fused) < NEAR


def test_our_quantizer_is_the_kernels(make_model):
    """What PyTorch hands to the second layer is, bit for bit, what the fused kernel would."""
    _, second = slots(make_model(**COARSE))
    layer = second.module
    hidden = torch.nn.functional.gelu(inputs(second, rows=512)[0], approximate="tanh")
    smooth = pack.unpack_vector(layer.smooth_factor)
    values, scales = quantize_activation((hidden + UNSIGNED_SHIFT) / smooth, IntegerRange.UNSIGNED)
    found = quantize_unsigned(hidden, smooth.detach())
    assert torch.equal(activation.unpack_activation(found[0]).to(torch.int8), values)
    assert torch.equal(activation.unpack_scales(found[1]), scales)


def test_outside_of_its_mlp_the_layer_is_refused(make_model):
    """A layer that takes unsigned activations gives nonsense where it is called as a module."""
    _, second = slots(make_model(**COARSE))
    with pytest.raises(KernelContractError, match="cannot be called by itself"):
        second.module(inputs(second))


@pytest.mark.parametrize("side", ["first", "second"])
@pytest.mark.parametrize("kind", [PartKind.KRON, PartKind.INPUT_FACTOR], ids=named)
@pytest.mark.parametrize("precision", [FINE, COARSE], ids=["exact", "int4"])
def test_copies_and_pickles_are_opened(precision, kind, side, make_model):
    model = make_model(**precision)
    mlp, targets = model.get_submodule(MLP), slots(model)
    x, target = inputs(targets[0]), targets[("first", "second").index(side)]
    before = run(mlp, x)
    install(target, [part(target, kind)])
    found = run(mlp, x)
    saved = io.BytesIO()
    torch.save(mlp, saved)
    saved.seek(0)
    others = [copy.deepcopy(mlp), torch.load(saved, weights_only=False)]
    slot_of(target).restore()
    for other in others:
        assert torch.equal(run(other, x), found)
    # Kept by a host, bound.
    kept = others[0].forward
    other = slots_of(others[0], targets)[("first", "second").index(side)]
    slot_of(other).restore()
    with torch.no_grad():
        assert torch.equal(kept(x), before)
    assert torch.equal(run(others[0], x), before)


def slots_of(mlp, targets):
    """The same slots of another MLP."""
    layers = (mlp.net[0].proj, mlp.net[2])
    return [
        target.twin(layer, target.path, opened=target.opened._replace(module=mlp))
        for target, layer in zip(targets, layers, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        pytest.param(PartKind.KRON, FINE, id="kron-exact"),
        pytest.param(PartKind.KRON, COARSE, id="kron-int4"),
        pytest.param(PartKind.FACTOR, FINE, id="factor-exact"),
        pytest.param(PartKind.INPUT_FACTOR, FINE, id="input_factor-exact"),
    ],
)
def test_compiled_models_run_what_is_there(kind, precision, make_model):
    """Each kind; what makes a layer's product in int4 knows nothing of them, and meets one."""
    model = make_model(**precision)
    mlp, targets = model.get_submodule(MLP), slots(model)
    x = inputs(targets[0])
    near = 0.0 if precision is FINE else NEAR
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="eager")
    before = run(mlp, x)
    assert error(run(compiled, x), before) <= near
    for target in targets:
        install(target, [part(target, kind)])
        found = run(mlp, x)
        assert error(found, before) > 10 * NEAR
        assert error(run(compiled, x), found) <= near
        slot_of(target).restore()
        assert error(run(compiled, x), before) <= near


@pytest.mark.parametrize("stage", ["set_branch", "set_as_needed"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", ["in", "out"])
def test_what_an_interrupt_leaves_is_seen_and_put_right(way, when, stage, make_model, monkeypatch):
    model = make_model()
    mlp, (first, second) = model.get_submodule(MLP), slots(model)
    x = inputs(first)
    before = run(mlp, x)
    if way == "out":
        install(first, [part(first, PartKind.KRON)])
    original = getattr(branch, stage)

    def interrupted(*args):
        if when == "after":
            original(*args)
        raise KeyboardInterrupt

    deltas = SlotDeltas(first)
    if way == "in":
        one = part(first, PartKind.KRON)
        deltas = SlotDeltas(first, parts=(one,), room=(one.shape,), route=Route.BESIDE)
    change = slot_of(first).prepare(deltas)
    with monkeypatch.context() as patch:
        patch.setattr(branch, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            change.make()
    done = when == "after" and stage == "set_as_needed"
    begun = when == "after" or stage == "set_as_needed"
    assert slot_of(first).is_base() is (done if way == "out" else not begun)
    for target in (first, second):
        slot = slot_of(target)
        if not slot.is_base():
            slot.restore()
    assert slot_of(first).is_base()
    assert slot_of(second).is_base()
    assert torch.equal(run(mlp, x), before)


def test_a_change_that_fails_is_unmade(make_model):
    model = make_model()
    mlp, (first, second) = model.get_submodule(MLP), slots(model)
    x, before = inputs(first), run(mlp, inputs(first))
    for target in (first, second):
        one = part(target, PartKind.KRON)
        own = SlotDeltas(target, parts=(one,), room=(one.shape,), route=Route.BESIDE)
        change = slot_of(target).prepare(own)
        change.make()
        assert forward_of(mlp) is run_mlp
        change.unmake()
        assert slot_of(target).is_base()
        assert torch.equal(run(mlp, x), before)


KRONS = {"net.0.proj": ((16, 16), (64, 16)), "net.2": ((16, 16), (16, 64))}


def lokr(Draft, blocks, *, names=tuple(KRONS)):
    draft = Draft(4)
    for block in blocks:
        for name in names:
            for role, sizes in zip(("w1", "w2"), KRONS[name], strict=True):
                draft.put(f"transformer_blocks.{block}.img_mlp.{name}", f"lokr_{role}", *sizes)
    return draft.tensors


@pytest.fixture
def wide():
    """A model of blocks wide enough for products that are no rank."""
    config = EmulatedConfig(
        num_layers=3,
        heads=4,
        head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=96,
        precision=Precision.EXACT,
        dtype=torch.float32,
    )
    return random_transformer(config, seed=0)


def opened(model):
    return [forward_of(block.img_mlp) is run_mlp for block in model.transformer_blocks]


@pytest.mark.parametrize("name", KRONS)
def test_products_open_the_mlps_that_they_are_in(name, wide, probe, Draft):
    base = copy.deepcopy(wide)
    report = qwenlora.compose_loras(wide, lokr(Draft, [1], names=[name]), strict=True)
    assert opened(wide) == [False, True, False]
    assert (report.complete, [slot.krons for slot in report.slots]) == (True, [1])
    assert not report.slots[0].energy_lost
    structure = structure_of(wide, read_state(wide))
    assert structure.is_current(wide)
    qwenlora.reset_loras(wide)
    assert not any(opened(wide))
    assert probe.snapshot(wide).differences(probe.snapshot(base)) == []


def test_a_fused_mlp_is_what_was_asked_for(wide, Draft):
    options = qwenlora.ComposeOptions(mlp="rank")
    qwenlora.compose_loras(wide, lokr(Draft, [0]), options=options)
    assert not any(opened(wide))


def test_under_offload_all_blocks_are_opened(wide, probe, Draft):
    """A block without a delta runs opened with zeros: the buffers' blocks are opened for all."""
    plain = probe.output(wide)
    loras = lokr(Draft, [1])
    resident = copy.deepcopy(wide)
    qwenlora.compose_loras(resident, loras, strict=True)
    wide.set_offload(True)
    qwenlora.compose_loras(wide, loras, strict=True)
    buffers = [block.img_mlp for block in wide.offload_manager.buffer_blocks]
    assert all(forward_of(mlp) is run_mlp for mlp in buffers)
    # The first block stays on the device, and has no delta.
    assert opened(wide) == [False, True, True]
    assert error(probe.output(wide), probe.output(resident)) < 1e-6
    qwenlora.reset_loras(wide)
    assert not any(opened(wide))
    assert not any(is_marked(mlp) for mlp in buffers)
    assert torch.equal(probe.output(wide), plain)


def test_an_mlp_that_something_else_closed_is_told(wide, Draft):
    qwenlora.compose_loras(wide, lokr(Draft, [0]), strict=True)
    unmark_hooked(wide.transformer_blocks[0].img_mlp)
    forget_structure(wide)
    with pytest.raises(ModelStateError, match="lacks a part of the branch"):
        qwenlora.compose_loras(wide, lokr(Draft, [1]))
