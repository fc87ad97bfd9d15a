"""Parts beside a layer: what each adds, on every kind of layer, against dense float64 matrices."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from qwenlora.delta.parts import PartKind
from qwenlora.delta.scale import ScaledPair
from qwenlora.delta.slot_deltas import BuiltSlot, SlotDeltas, uniform
from qwenlora.emulation import Precision
from qwenlora.errors import UnsupportedModelError
from qwenlora.model.subclass import forward_of, is_marked
from qwenlora.packing.layout import RowOrder
from qwenlora.plan.documents import Route
from qwenlora.slots import beside
from qwenlora.slots.beside import run_layer
from qwenlora.slots.branch import Branch, BranchLayout, is_whole, set_branch
from qwenlora.slots.branch_layout import part_name
from qwenlora.slots.cut import can_cut, rows_output
from qwenlora.slots.find import find_targets
from qwenlora.slots.parts.part import Held
from qwenlora.slots.parts.table import OF_OUTPUT
from qwenlora.slots.whole import slot_of

from .parts import Dense, delta_of, install, logical, random_part, shape_of, sum_of

BLOCK = "transformer_blocks.0"
ATTENTION = f"{BLOCK}.attn.to_out.0"
FUSED = f"{BLOCK}.attn.to_qkv"
MODULATION = f"{BLOCK}.img_mod.1"
PLAIN = "img_in"
SLOTS = (ATTENTION, FUSED, MODULATION, PLAIN)
KINDS = list(PartKind)
INPUT_KINDS = [kind for kind in KINDS if kind.is_input or kind is PartKind.PASS]
CLOSE = 1e-5
TOKENS = 4


def named(kind):
    return kind.name.lower() if isinstance(kind, PartKind) else str(kind)


@pytest.fixture
def targets(make_model):
    return find_targets(make_model(), {})


@pytest.fixture
def coarse(make_model):
    """Slots of a model whose layers quantize."""
    model = make_model(precision=Precision.W4A4, dtype=torch.bfloat16)
    return find_targets(model, {})


def inputs(target, *, rows=TOKENS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, target.row.in_features, generator=generator).to(target.dtype)


def run(target, x):
    with torch.no_grad():
        return logical(target, target.module(x))


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def part(target, kind, *, begin=0, count=None, seed=0):
    count = target.row.out_features if count is None else count
    shape = shape_of(kind, target.row.in_features, begin, count)
    # Smaller ones would be of the size of what 16 bits of the output round.
    size = 1.0 if kind in (PartKind.KRON, PartKind.DENSE) else 0.1
    return random_part(shape, Dense.of(target), target.dtype, seed=seed, size=size)


def require_base(target, before, x):
    slot = slot_of(target)
    assert not slot.is_base()
    slot.restore()
    assert slot.is_base()
    assert torch.equal(run(target, x), before)


@pytest.mark.parametrize("path", SLOTS)
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_part_adds_what_it_says(kind, path, targets):
    target, x = targets[path], inputs(targets[path])
    before, dense = run(target, x), Dense.of(target)
    one = part(target, kind)
    install(target, [one])
    assert is_whole(target.module)
    assert error(run(target, x), sum_of([one], dense).output(x)) < CLOSE
    require_base(target, before, x)


@pytest.mark.parametrize("path", [FUSED, MODULATION])
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_rows_of_a_part_are_the_files(kind, path, targets):
    """The other rows stay as they are, bit for bit, but for those that join another run."""
    target, x = targets[path], inputs(targets[path])
    before, dense = run(target, x), Dense.of(target)
    count = target.row.out_features // 3
    one = part(target, kind, begin=count, count=count)
    install(target, [one])
    found = run(target, x)
    assert error(found, sum_of([one], dense).output(x)) < CLOSE
    others = [slice(0, count), slice(2 * count, 3 * count)]
    assert all(torch.equal(found[:, rows], before[:, rows]) for rows in others)
    require_base(target, before, x)


def test_rows_of_a_layer_that_is_not_interleaved(targets):
    target = targets[PLAIN]
    for kind in KINDS:
        one = part(target, kind, begin=32, count=64)
        dense, x = Dense.of(target), inputs(target)
        install(target, [one])
        assert error(run(target, x), sum_of([one], dense).output(x)) < CLOSE
        slot_of(target).restore()


@pytest.mark.parametrize("path", SLOTS)
def test_all_parts_at_once(path, targets):
    """Inputs that differ by rows, parts that read the output on the raw input, pairs beside."""
    target, x = targets[path], inputs(targets[path])
    before, dense = run(target, x), Dense.of(target)
    rows = target.row.out_features
    many = [part(target, kind, seed=seed) for seed, kind in enumerate(KINDS)]
    half = rows // 2 // 64 * 64
    many += [part(target, kind, begin=half, count=64, seed=9) for kind in KINDS]
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(5, target.row.in_features, generator=generator)
    up = 0.1 * torch.randn(rows, 5, generator=generator)
    install(target, many, pairs=(ScaledPair(down, up),), rank_added=5)
    wanted = sum_of(many, dense)
    expected = wanted.output(x) + logical(target, x.double() @ (up.double() @ down.double()).mT)
    assert error(run(target, x), expected) < CLOSE
    require_base(target, before, x)


def test_factors_of_products_are_optional(targets):
    target, x = targets[ATTENTION], inputs(targets[ATTENTION])
    dense = Dense.of(target)
    for has_rows, has_columns in ((0, 0), (0, 1), (1, 0)):
        shape = shape_of(PartKind.KRON, target.row.in_features, 0, target.row.out_features)
        shape = shape._replace(sizes=(*shape.sizes[:4], has_rows, has_columns))
        one = random_part(shape, dense, target.dtype)
        install(target, [one])
        assert error(run(target, x), sum_of([one], dense).output(x)) < CLOSE


@pytest.mark.parametrize("path", [ATTENTION, FUSED, MODULATION])
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_on_quantized_layers_the_delta_arrives(kind, path, coarse):
    """Output error is the base's, and the share of the wanted delta that arrives is all of it."""
    target = coarse[path]
    x = torch.cat([inputs(target, rows=8, seed=seed) for seed in range(1 if "mod" in path else 16)])
    before, dense = run(target, x).double(), Dense.of(target)
    one = part(target, kind)
    install(target, [one])
    found = run(target, x).double()
    delta = delta_of(one, dense)
    wanted = x.double() @ delta.weight.mT + delta.bias
    share = float(((found - before) * wanted).sum() / wanted.square().sum())
    assert 0.98 < share < 1.02
    base_error = error(before, dense.output(x))
    assert error(found, dense.output(x) + wanted) < 1.1 * base_error + 2e-3


@pytest.mark.parametrize("path", SLOTS)
def test_zeros_are_neutral(path, targets):
    """What a block of an offloaded model does not use changes no bit."""
    target, x = targets[path], inputs(targets[path])
    before = run(target, x)
    rows, columns = target.row.out_features, target.row.in_features
    room = [shape_of(kind, columns, 0, rows) for kind in KINDS]
    room += [shape_of(kind, columns, 64, 64) for kind in KINDS]
    install(target, [], room=room, rank_added=16)
    assert torch.equal(run(target, x), before)
    require_base(target, before, x)


def test_rooms_are_filled_in_order(targets):
    """A part lies in the room of its shape, whatever lies before it; one without room is told."""
    target, x = targets[ATTENTION], inputs(targets[ATTENTION])
    dense = Dense.of(target)
    one, two = part(target, PartKind.FACTOR), part(target, PartKind.ROTATION)
    rows, columns = target.row.out_features, target.row.in_features
    room = [shape_of(kind, columns, 0, rows) for kind in KINDS for _ in range(2)]
    install(target, [one, two], room=room)
    assert error(run(target, x), sum_of([one, two], dense).output(x)) < CLOSE
    with pytest.raises(ValueError, match="has no room"):
        install(target, [one, two], room=[one.shape])


def test_slots_of_one_buffer_hold_the_same(targets):
    """The route is shared, too: where one carries its ranks beside the layer, all do."""
    one, two = (targets[f"{BLOCK}.attn.{name}"] for name in ("to_out.0", "to_add_out"))
    factor = part(one, PartKind.FACTOR)
    own = SlotDeltas(one, rank_added=3, parts=(factor,), room=(factor.shape,), route=Route.BESIDE)
    built = BuiltSlot(own, BuiltSlot.of_zeros(one, 3).outcome)
    for slot in uniform([built, BuiltSlot.of_zeros(two, 0)]):
        slot_of(slot.deltas.target).prepare(slot.deltas).make()
    assert slot_of(one).room() == slot_of(two).room()
    assert slot_of(one).rank_added() == slot_of(two).rank_added() == 3
    assert one.module.proj_down.shape[1] == one.row.base_rank


def test_a_route_may_change(targets):
    """Ranks move from the packed branch to the side branch, and back."""
    target, x = targets[ATTENTION], inputs(targets[ATTENTION])
    before = run(target, x)
    generator = torch.Generator().manual_seed(1)
    pair = ScaledPair(
        torch.randn(16, target.row.in_features, generator=generator),
        torch.randn(target.row.out_features, 16, generator=generator),
    )
    outputs = []
    for route in (Route.INSIDE, Route.BESIDE, Route.INSIDE):
        install(target, [], route=route, pairs=(pair,), rank_added=16)
        outputs.append(run(target, x))
        assert slot_of(target).rank_added() == 16
        packed = target.module.proj_down.shape[1] - target.row.base_rank
        assert packed == (16 if route is Route.INSIDE else 0)
    assert torch.equal(outputs[0], outputs[2])
    assert error(outputs[1], outputs[0].double()) < CLOSE
    require_base(target, before, x)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_copies_and_pickles_carry_their_own(kind, targets):
    target, x = targets[ATTENTION], inputs(targets[ATTENTION])
    before, one = run(target, x), part(target, kind)
    install(target, [one])
    found = run(target, x)
    copied = copy.deepcopy(target.module)
    saved = io.BytesIO()
    torch.save(target.module, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    slot_of(target).restore()
    with torch.no_grad():
        for other in (copied, loaded):
            assert is_whole(other)
            assert torch.equal(other(x), found)
            set_branch(other, None)
            assert torch.equal(other(x), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_compiled_layers_run_what_is_there(kind, targets):
    target, x = targets[ATTENTION], inputs(targets[ATTENTION])
    before, one = run(target, x), part(target, kind)
    torch._dynamo.reset()
    layer = torch.compile(target.module, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(layer(x), before)
        install(target, [one])
        assert torch.equal(layer(x), target.module(x))
        assert not torch.equal(layer(x), before)
        slot_of(target).restore()
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", INPUT_KINDS, ids=named)
def test_a_forward_that_a_host_kept_passes_through(kind, targets):
    target, x = targets[ATTENTION], inputs(targets[ATTENTION])
    before = run(target, x)
    install(target, [part(target, kind)])
    assert forward_of(target.module) is run_layer
    kept = target.module.forward
    slot_of(target).restore()
    assert not is_marked(target.module)
    with torch.no_grad():
        assert torch.equal(kept(x), before)


@pytest.mark.parametrize("kind", INPUT_KINDS, ids=named)
def test_layers_with_a_forward_of_their_own_are_refused(kind, targets):
    target = targets[ATTENTION]
    module = target.module
    module.forward = module.forward
    with pytest.raises(UnsupportedModelError, match=f"`{ATTENTION}` has a forward of its own"):
        install(target, [part(target, kind)])
    assert slot_of(target).is_base()
    install(target, [part(target, PartKind.FACTOR)])
    assert is_whole(module)


@pytest.mark.parametrize("kind", INPUT_KINDS, ids=named)
def test_inputs_by_keyword_and_outputs_that_are_given(kind):
    class Given(nn.Linear):
        def forward(self, input, output=None):
            found = super().forward(input)
            return found if output is None else output.copy_(found)

    torch.manual_seed(0)
    model = nn.Module()
    model.layer = Given(64, 96)
    layer = model.layer
    dense = Dense(layer.weight.detach().double(), layer.bias.detach().double())
    one = random_part(shape_of(kind, 64, 32, 32), dense, torch.float32)
    layout = BranchLayout((one.shape,), RowOrder.PLANAR, 96)
    own = {part_name(0, name): tensor for name, tensor in one.tensors.items()}
    set_branch(layer, Branch(layout, own))
    x, expected = torch.randn(2, 64), sum_of([one], dense)
    with torch.no_grad():
        assert error(layer(x), expected.output(x)) < CLOSE
        assert error(layer(input=x), expected.output(x)) < CLOSE
        assert error(layer(x, torch.empty(2, 96)), expected.output(x)) < CLOSE


TAKEN = [(way, kind) for way in ("buffer", "hook") for kind in KINDS]
TAKEN += [("class", kind) for kind in INPUT_KINDS]


@pytest.mark.parametrize(("missing", "kind"), TAKEN, ids=named)
def test_what_something_else_took_away_is_seen(missing, kind, targets):
    target = targets[ATTENTION]
    install(target, [part(target, kind)])
    module = target.module
    if missing == "buffer":
        del module._buffers[next(name for name in module._buffers if name.startswith("qwenlora_"))]
    elif missing == "hook":
        module._forward_hooks.clear()
    else:
        module.__class__ = type(module).__mro__[1]
    assert not is_whole(module)
    slot_of(target).restore()
    assert slot_of(target).is_base()


def test_small_changes_survive_16_bits(coarse):
    """Factors and blocks less one: a change of 1e-4 arrives, which 16 bits of 1 + it would lose."""
    target = coarse[MODULATION]
    x, dense = inputs(target, rows=8), Dense.of(target)
    rows = target.row.out_features
    for kind in (PartKind.FACTOR, PartKind.ROTATION, PartKind.BUTTERFLY):
        shape = shape_of(kind, target.row.in_features, 0, rows)
        one = random_part(shape, dense, target.dtype, size=1e-4)
        output = dense.output(x)
        found = OF_OUTPUT[kind](Held(shape, one.tensors), output.to(target.dtype))
        delta = delta_of(one, dense)
        # The bias of the part is rounded, as the output that it is taken from.
        assert error(found, x.double() @ delta.weight.mT) < 2e-2


@pytest.mark.parametrize("precision", [Precision.W4A4, Precision.NVFP4])
@pytest.mark.parametrize("rows", [1, 300])
def test_rows_of_a_quantized_layer_run_by_themselves(rows, precision, make_model):
    """They give the bits of the whole layer, whose input is quantized once for each input."""
    model = make_model(precision=precision, dtype=torch.bfloat16)
    target = find_targets(model, {})[FUSED]
    layer, x = target.module, inputs(target, rows=rows)
    whole = run(target, x)
    ranges = ((0, 128), (256, 384))
    with torch.no_grad():
        found = rows_output(layer, x, ranges)
    assert [
        torch.equal(own, whole[:, slice(*own_rows)])
        for own, own_rows in zip(found, ranges, strict=True)
    ] == [True, True]


@pytest.mark.parametrize("others", [(), (PartKind.FACTOR,)], ids=["alone", "with a reader"])
def test_inputs_that_differ_by_rows_run_those_rows(others, coarse, monkeypatch):
    target = coarse[FUSED]
    x, dense = inputs(target, rows=64), Dense.of(target)
    before = run(target, x)
    count = target.row.out_features // 3
    kind = PartKind.INPUT_FACTOR
    parts = [part(target, kind, begin=0, count=count, seed=1)]
    parts += [part(target, kind, begin=2 * count, count=count, seed=2)]
    parts += [part(target, own, begin=count, count=count) for own in others]
    install(target, parts)
    found = run(target, x)
    monkeypatch.setattr(beside, "can_cut", lambda *_: False)
    assert error(found, run(target, x).double()) < 1e-3
    assert error(found, sum_of(parts, dense).output(x)) < 1.1 * error(before, dense.output(x))
    if not others:
        assert torch.equal(found[:, count : 2 * count], before[:, count : 2 * count])


def test_rows_that_are_no_whole_tiles_run_with_the_layer(coarse):
    target = coarse[FUSED]
    x, dense = inputs(target, rows=64), Dense.of(target)
    before = run(target, x)
    one = part(target, PartKind.INPUT_FACTOR, begin=64, count=128)
    install(target, [one])
    assert not can_cut(target.module, target.module._qwenlora_branch)
    assert error(run(target, x), sum_of([one], dense).output(x)) < 1.1 * error(
        before, dense.output(x)
    )
