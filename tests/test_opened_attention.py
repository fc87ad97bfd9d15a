"""Z-Image's query, key and value, which a kernel norms and rotates, with something beside them."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from qwenlora import emulation
from qwenlora.delta.parts import PartKind
from qwenlora.delta.slot_deltas import SlotDeltas
from qwenlora.emulation import Precision, ZImageForm
from qwenlora.emulation.z_image_layers import CalledProcessor, PassedProcessor
from qwenlora.errors import UnsupportedModelError
from qwenlora.model.opened import OpenedForm
from qwenlora.model.subclass import is_marked, mark_hooked
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide
from qwenlora.packing.rotation import pack_rotations
from qwenlora.plan.documents import Route
from qwenlora.slots import branch
from qwenlora.slots.find import find_targets
from qwenlora.slots.rotary import norm_and_rotate
from qwenlora.slots.whole import slot_of

from .parts import Dense, install, random_part, shape_of, sum_of
from .z_image_attention import attended, call, rotation, turned

pytestmark = pytest.mark.slow

pytest.importorskip("diffusers.models.transformers.transformer_z_image")

WIDTH = 384
HEAD = 128
TOKENS = 40
BLOCK = "layers.0"
ATTENTION = f"{BLOCK}.attention"
LAYERS = {
    ZImageForm.FUSED: f"{ATTENTION}.fused_module.qkv",
    ZImageForm.PASSED: f"{ATTENTION}.to_qkv",
    ZImageForm.COMFYUI: f"{ATTENTION}.qkv",
}
FORMS = {
    ZImageForm.FUSED: OpenedForm.PROJECTION,
    ZImageForm.PASSED: OpenedForm.PROCESSOR,
    ZImageForm.COMFYUI: OpenedForm.ATTENTION,
}
KINDS = list(PartKind)
CLOSE = 1e-5
NEAR = {torch.float32: 4e-6, torch.bfloat16: 4e-3}
"""How far what is opened may be from the kernel, of its output."""


def named(value):
    return value.name.lower() if isinstance(value, PartKind) else value.value


@pytest.fixture(scope="module")
def dense():
    return emulation.tiny_z_image(layers=1)


@pytest.fixture(scope="module")
def made(dense):
    known = {}

    def make(form, precision=Precision.EXACT, dtype=torch.float32):
        key = (form, precision, dtype)
        if key not in known:
            known[key] = emulation.z_image_transformer(
                dense, form=form, rank=16, precision=precision, dtype=dtype
            )
        return copy.deepcopy(known[key])

    return make


def qkv_of(model, form):
    return find_targets(model, {})[LAYERS[form]]


def inputs(dtype=torch.float32, tokens=TOKENS):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, tokens, WIDTH, generator=generator).to(dtype)


def layers_of(target, attention, form):
    """Weights of the layer and of the last linear, and both norms, in float64."""
    module, prefix = target.module, target.prefix
    own = {
        name: getattr(module, prefix + name).detach().double()
        for name in ("qweight", "smooth_factor", "proj_down", "proj_up")
    }
    if prefix:
        norms = (module.norm_q_weight, module.norm_k_weight)
        residual = own["qweight"]
        if own["qweight"].shape[1] != WIDTH:
            values = pack.unpack_svdq_qweight(module.qkv_qweight).double()
            scales = pack.unpack_svdq_wscales(module.qkv_wscales).double()
            residual = (values.view(len(values), -1, 64) * scales[..., None]).flatten(1)
    else:
        names = ("q_norm", "k_norm") if form is ZImageForm.COMFYUI else ("norm_q", "norm_k")
        norms = [getattr(attention, name).weight for name in names]
        residual = module.residual().double()
    residual = residual / pack.unpack_vector(own["smooth_factor"])
    down = pack.unpack_lowrank(own["proj_down"], LowRankSide.DOWN)
    weight = residual + pack.unpack_lowrank(own["proj_up"], LowRankSide.UP) @ down
    out = attention.out if form is ZImageForm.COMFYUI else attention.to_out[0]
    base = Dense(weight.detach(), torch.zeros(3 * WIDTH).double())
    return base, [norm.detach().double() for norm in norms], out


def expected(weights, norms, out, x):
    """The attention in float64, but for its last linear."""
    with torch.no_grad():
        return out(attended(weights.output(x), norms).to(x.dtype))


def part(target, kind, begin=0, count=3 * WIDTH, seed=0):
    dense = Dense(torch.zeros(3 * WIDTH, WIDTH), torch.zeros(3 * WIDTH))
    size = 1.0 if kind in (PartKind.KRON, PartKind.DENSE) else 0.1
    shape = shape_of(kind, WIDTH, begin, count)
    return random_part(shape, dense, target.dtype, seed=seed, size=size)


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("form", LAYERS, ids=named)
def test_it_is_known_by_its_code(form, made):
    target = qkv_of(made(form), form)
    assert target.opened is not None
    assert target.opened.form is FORMS[form]
    assert target.row.opens


@pytest.mark.parametrize("form", [f for f in ZImageForm if f not in LAYERS], ids=named)
def test_what_is_called_is_not_opened(form, made):
    assert not any(target.row.opens for target in find_targets(made(form), {}).values())


@pytest.mark.parametrize("form", LAYERS, ids=named)
@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_a_part_adds_what_it_says(kind, form, made):
    model, x = made(form), inputs()
    attention, target = model.get_submodule(ATTENTION), qkv_of(model, form)
    before = call(attention, x)
    base, norms, out = layers_of(target, attention, form)
    assert error(before, expected(base, norms, out, x)) < CLOSE
    one = part(target, kind, WIDTH, WIDTH)
    install(target, [one])
    found = call(attention, x)
    assert error(found, before) > 100 * CLOSE
    assert error(found, expected(sum_of([one], base), norms, out, x)) < CLOSE
    slot_of(target).restore()
    assert slot_of(target).is_base()
    assert torch.equal(call(attention, x), before)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_on_quantized_layers_the_delta_arrives(kind, made):
    """Of the projection itself, which is what attention gets."""
    form, dtype = ZImageForm.FUSED, torch.bfloat16
    model, x = made(form, Precision.W4A4, dtype), inputs(dtype, 512)
    attention, target = model.get_submodule(ATTENTION), qkv_of(model, form)
    module = attention.fused_module
    base, norms, _ = layers_of(target, attention, form)
    one = part(target, kind)
    wanted, old = (
        torch.cat([own.flatten(2) for own in turned(weights.output(x), norms)], dim=-1)
        for weights in (sum_of([one], base), base)
    )
    with torch.no_grad():
        before = module(x, rotation(512)).double()
        install(target, [one])
        found = module(x, rotation(512)).double()
    share = float(((found - before) * (wanted - old)).sum() / (wanted - old).square().sum())
    assert 0.97 < share < 1.03
    assert error(found, wanted) < 1.1 * error(before, old) + 2e-3


@pytest.mark.parametrize("form", LAYERS, ids=named)
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(Precision.EXACT, torch.float32), (Precision.W4A4, torch.bfloat16)],
    ids=["exact", "int4"],
)
def test_opened_is_fused(precision, dtype, form, made):
    """With zeros beside the layer it gives what the kernel gave."""
    model, x = made(form, precision, dtype), inputs(dtype, 300)
    attention, target = model.get_submodule(ATTENTION), qkv_of(model, form)
    fused = call(attention, x)
    install(target, [], room=[shape_of(PartKind.KRON, WIDTH, 0, WIDTH)])
    assert is_marked(target.opened.module)
    assert error(call(attention, x), fused) < NEAR[dtype]


@pytest.mark.parametrize("form", LAYERS, ids=named)
@pytest.mark.parametrize("kind", [PartKind.KRON, PartKind.INPUT_FACTOR], ids=named)
def test_copies_and_pickles_are_opened(kind, form, made):
    model, x = made(form), inputs()
    attention, target = model.get_submodule(ATTENTION), qkv_of(model, form)
    before = call(attention, x)
    install(target, [part(target, kind)])
    found = call(attention, x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    others = [copy.deepcopy(model), torch.load(saved, weights_only=False)]
    slot_of(target).restore()
    for other in others:
        own = other.get_submodule(ATTENTION)
        assert torch.equal(call(own, x), found)

        slot_of(qkv_of(other, form)).restore()
        assert torch.equal(call(own, x), before)


@pytest.mark.parametrize("form", LAYERS, ids=named)
def test_compiled_models_run_what_is_there(form, made):
    model, x = made(form), inputs()
    attention, target = model.get_submodule(ATTENTION), qkv_of(model, form)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager")
    before = call(attention, x)
    assert torch.equal(call(compiled, x), before)
    for kind in (PartKind.KRON, PartKind.INPUT_FACTOR):
        install(target, [part(target, kind)])
        found = call(attention, x)
        assert not torch.equal(found, before)
        assert error(call(compiled, x), found) < CLOSE
        slot_of(target).restore()
        assert torch.equal(call(compiled, x), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", LAYERS, ids=named)
@pytest.mark.parametrize("stage", ["set_branch", "set_as_needed"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_an_interrupt_leaves_is_put_right(when, stage, form, made, monkeypatch):
    model, x = made(form), inputs()
    attention, target = model.get_submodule(ATTENTION), qkv_of(model, form)
    before, original = call(attention, x), getattr(branch, stage)

    def interrupted(*args):
        if when == "after":
            original(*args)
        raise KeyboardInterrupt

    one = part(target, PartKind.KRON)
    deltas = SlotDeltas(target, parts=(one,), room=(one.shape,), route=Route.BESIDE)
    change = slot_of(target).prepare(deltas)
    with monkeypatch.context() as patch:
        patch.setattr(branch, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            change.make()
    is_begun = stage == "set_as_needed" or when == "after"
    assert slot_of(target).is_base() is not is_begun
    change.unmake()
    assert slot_of(target).is_base()
    assert torch.equal(call(attention, x), before)


def offloaded(model, how):
    cpu = torch.device("cpu")
    if how == "model":
        pytest.importorskip("accelerate").cpu_offload_with_hook(model, execution_device="cpu")
        return
    hooks = pytest.importorskip("diffusers.hooks")
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    hooks.apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **options)


@pytest.mark.parametrize("form", LAYERS, ids=named)
@pytest.mark.parametrize("how", ["model", "group"])
def test_offload_that_moves_blocks_runs_what_is_opened(how, form, made):
    model, twin = made(form), made(form)
    offloaded(model, how)
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(16, 1, 8, 8, generator=generator)
    caption = torch.randn(20, 128, generator=generator)

    def run(own):
        with torch.no_grad():
            return own([image], torch.tensor([0.4]), [caption]).sample[0]

    before = run(twin)
    for kind in (PartKind.KRON, PartKind.INPUT_FACTOR):
        targets = [qkv_of(own, form) for own in (model, twin)]
        for target in targets:
            install(target, [part(target, kind)])
        found = run(model)
        assert not torch.equal(found, before)
        assert torch.equal(found, run(twin))
        for target in targets:
            slot_of(target).restore()
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("form", LAYERS, ids=named)
def test_with_a_forward_of_its_own_it_stays_fused(form, made):
    model = made(form)
    module = qkv_of(model, form).opened.module
    module.forward = module.forward
    target = qkv_of(model, form)
    assert not target.row.opens
    with pytest.raises(UnsupportedModelError, match="has a forward of its own"):
        install(target, [part(target, PartKind.KRON)])
    assert slot_of(target).is_base()


def test_a_processor_that_changed_meanwhile_is_refused(made):
    form = ZImageForm.PASSED
    model, x = made(form), inputs()
    attention, target = model.get_submodule(ATTENTION), qkv_of(model, form)
    install(target, [part(target, PartKind.KRON)])
    attention.processor = CalledProcessor()
    with pytest.raises(UnsupportedModelError, match="CalledProcessor changed"):
        call(attention, x)
    attention.processor = PassedProcessor()
    call(attention, x)


def test_packed_rotations_are_those_of_the_tokens():
    tokens = 50
    qkv = torch.randn(2, tokens, 3 * WIDTH, generator=torch.Generator().manual_seed(2))
    weights = torch.full((HEAD,), 0.5), torch.ones(HEAD)
    turn = rotation(64)
    packed = pack_rotations(torch.stack([turn.imag, turn.real], dim=-1))
    found = norm_and_rotate(qkv.clone(), *weights, packed)
    assert torch.equal(found, norm_and_rotate(qkv.clone(), *weights, turn))
    assert torch.equal(found[..., 2 * WIDTH :], qkv[..., 2 * WIDTH :])
    with pytest.raises(ValueError, match="rotations must be"):
        norm_and_rotate(qkv, *weights, turn[..., :3])


def test_an_opened_module_keeps_its_branch_out_of_the_last_output(made):
    """The hook of a called layer would add to what is normed already."""
    form = ZImageForm.FUSED
    target = qkv_of(made(form), form)
    install(target, [part(target, PartKind.KRON)])
    assert not target.module._forward_hooks
    assert branch.is_whole(target.module)
    mark_hooked(target.module, None)
    assert not branch.is_whole(target.module)
