"""LoRAs on Z-Image: every form of the 4-bit model does what the dense one does with them."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import warnings
from types import MethodType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qwenlora
from qwenlora import emulation, errors
from qwenlora.emulation import Precision, ZImageForm, fused_qkv
from qwenlora.emulation.z_image_layers import PassedProcessor, ZImageProcessor, split
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide

from .lora_files import File

pytest.importorskip("diffusers.models.transformers.transformer_z_image")

WIDTH = 384
MLP = 1024
DELTA_BOUND = 2e-5
"""Relative error of a delta taken as a difference of float32 outputs; measured: 7.1e-6."""
LISTS = ("noise_refiner.0", "context_refiner.0", "layers.0", "layers.1")
QUICK = (ZImageForm.FUSED, ZImageForm.STOCK)
MODELS = [
    *((form, True) for form in QUICK),
    *(
        pytest.param((form, True), marks=pytest.mark.slow)
        for form in ZImageForm
        if form not in QUICK
    ),
    pytest.param((ZImageForm.FUSED, False), marks=pytest.mark.slow),
    pytest.param((ZImageForm.COMFYUI, False), marks=pytest.mark.slow),
]
"""Each form with its refiners quantized; dense, they are diffusers' or ComfyUI's."""
QKV = ("to_q", "to_k", "to_v")
FUSED_QKV = {
    ZImageForm.CALLED: "attention.to_qkv",
    ZImageForm.FUSED: "attention.fused_module.qkv",
    ZImageForm.PASSED: "attention.to_qkv",
    ZImageForm.COMFYUI: "attention.qkv",
    ZImageForm.COMFYUI_CALLED: "attention.qkv",
}
"""The slot of query, key and value in a block."""
GATED = {
    ZImageForm.COMFYUI: ("w13",),
    ZImageForm.COMFYUI_CALLED: ("w13",),
    ZImageForm.STOCK: ("w3", "w1"),
}
"""The linears of value and gate, where these are not `net.0.proj`."""
UNSEEN = (ZImageForm.FUSED, ZImageForm.PASSED, ZImageForm.COMFYUI)
"""Forms in which no hook sees query, key and value."""


def named(model) -> str:
    form, quantized = model
    return form.value if quantized else f"{form.value}-dense-refiners"


@pytest.fixture(scope="module")
def dense():
    return emulation.tiny_z_image()


@pytest.fixture(scope="module")
def made(dense):
    """Makes a model of a form; each is quantized once."""
    known = {}

    def make(form, quantized_refiners=True):
        key = (form, quantized_refiners)
        if key not in known:
            known[key] = emulation.z_image_transformer(
                dense,
                form=form,
                rank=16,
                precision=Precision.EXACT,
                dtype=torch.float32,
                quantized_refiners=quantized_refiners,
            )
        return copy.deepcopy(known[key])

    return make


@pytest.fixture(scope="module")
def untouched(made, run, probe):
    """Lends a model, its output and its snapshot; who leaves it as it was gives it back."""
    known = {}

    @contextlib.contextmanager
    def lend(*key):
        if key not in known:
            model = made(*key)
            known[key] = (model, run(model), probe.snapshot(model))
        lent = known.pop(key)
        yield lent
        # Not after an error: the next one then gets a fresh model.
        known[key] = lent

    return lend


@pytest.fixture(scope="module")
def run():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 1, 8, 8, generator=generator)
    caption = torch.randn(20, 128, generator=generator)

    def run(model):
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            return model(
                [x.to(dtype)], torch.tensor([0.4], dtype=dtype), [caption.to(dtype)]
            ).sample[0]

    return run


@pytest.fixture(scope="module")
def changes(dense, run):
    """What a file changes in the dense model's output; each is computed once."""
    base, known = run(dense), {}

    def change(file):
        if id(file) not in known:
            known[id(file)] = (file, run(file.merged(dense)) - base)
        return known[id(file)][1]

    return change


def error_of(model, run, base, expected):
    """The relative error of the change of a model's output."""
    return float((run(model) - base - expected).norm() / expected.norm())


def in_blocks(add) -> File:
    """A file to which `add(file, block's path)` adds each block's modules."""
    file = File()
    for block in LISTS:
        add(file, block)
    return file


def has_modulation(block):
    return not block.startswith("context_refiner")


ADAPTERS = {
    "apart": lambda f, b: [f.pair(f"{b}.attention.{name}", WIDTH, WIDTH) for name in QKV],
    "fused": lambda f, b: f.pair(f"{b}.attention.to_qkv", 3 * WIDTH, WIDTH),
    "key alone": lambda f, b: f.pair(f"{b}.attention.to_k", WIDTH, WIDTH),
    "tucker": lambda f, b: f.tucker(f"{b}.attention.to_v", WIDTH, WIDTH),
    "loha": lambda f, b: f.loha(f"{b}.attention.to_qkv", 3 * WIDTH, WIDTH),
    "out": lambda f, b: f.pair(f"{b}.attention.to_out.0", WIDTH, WIDTH),
    "gate alone": lambda f, b: f.pair(f"{b}.feed_forward.w1", MLP, WIDTH),
    "value alone": lambda f, b: f.pair(f"{b}.feed_forward.w3", MLP, WIDTH),
    "gate and value": lambda f, b: f.pair(f"{b}.feed_forward.w1", MLP, WIDTH).pair(
        f"{b}.feed_forward.w3", MLP, WIDTH
    ),
    "fused mlp": lambda f, b: f.pair(f"{b}.feed_forward.net.0.proj", 2 * MLP, WIDTH),
    "down": lambda f, b: f.pair(f"{b}.feed_forward.w2", WIDTH, MLP),
    "full": lambda f, b: f.full(f"{b}.feed_forward.w1", MLP, WIDTH).full(
        f"{b}.attention.to_v", WIDTH, WIDTH
    ),
    "lokr": lambda f, b: f.lokr(f"{b}.feed_forward.w1", (16, 16), (64, 24)).lokr(
        f"{b}.feed_forward.w2", (16, 16), (24, 64)
    ),
    "lokr of the attention": lambda f, b: f.lokr(f"{b}.attention.to_q", (4, 4), (96, 96)).lokr(
        f"{b}.attention.to_out.0", (16, 16), (24, 24)
    ),
    "norms": lambda f, b: [
        f.norm(f"{b}.attention.norm_q", 128),
        f.norm(f"{b}.attention.norm_k", 128),
        f.norm(f"{b}.ffn_norm1", WIDTH),
    ],
    "key's norm alone": lambda f, b: f.norm(f"{b}.attention.norm_k", 128),
    "modulation": lambda f, b: (
        f.pair(f"{b}.adaLN_modulation.0", 4 * WIDTH, 256).bias(f"{b}.adaLN_modulation.0", 4 * WIDTH)
        if has_modulation(b)
        else None
    ),
}


@pytest.fixture(scope="module")
def files():
    return {name: in_blocks(add) for name, add in ADAPTERS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=named)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_is_exact(adapter, model, untouched, files, changes, run, probe):
    file = files[adapter]
    with untouched(*model) as (subject, base, before):
        report = qwenlora.compose_loras(subject, file.tensors)
        assert report.complete
        assert not any(lora.notes for lora in report.loras)
        assert error_of(subject, run, base, changes(file)) < DELTA_BOUND
        qwenlora.reset_loras(subject)
        assert not before.differences(probe.snapshot(subject))
        assert torch.equal(run(subject), base)


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_every_linear_as_peft_does_it(model, made, dense, run):
    file, model = File(1).every_linear(dense), made(*model)
    theirs = copy.deepcopy(dense)
    theirs.load_lora_adapter(dict(file.tensors), prefix="transformer", adapter_name="one")
    theirs.set_adapters("one", 0.7)
    base = run(model)
    report = qwenlora.compose_loras(model, [(file.tensors, 0.7)])
    assert report.complete
    assert error_of(model, run, base, run(theirs) - run(dense)) < DELTA_BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "dtype"), list(zip(ZImageForm, [torch.bfloat16, torch.float16] * 3, strict=True))
)
def test_slots_hold_the_delta_of_the_file(form, dtype, dense):
    """Rounded weights and activations hide a delta, so the slots themselves are looked at.

    A form is how layers are joined and named, a dtype what they hold: each is met, not each pair.
    """
    model = emulation.z_image_transformer(
        dense, form=form, rank=16, precision=Precision.W4A4, dtype=dtype
    )
    file = in_blocks(ADAPTERS["gate and value"])
    qwenlora.compose_loras(model, file.tensors)
    for block in LISTS:
        held = []
        for name in GATED.get(form, ("net.0.proj",)):
            layer = model.get_submodule(f"{block}.feed_forward.{name}")
            down = pack.unpack_lowrank(layer.proj_down, LowRankSide.DOWN)[16:].double()
            up = pack.unpack_lowrank(layer.proj_up, LowRankSide.UP)[:, 16:].double()
            held.append(up @ down)
        expected = torch.cat([file.deltas[f"{block}.feed_forward.{name}"] for name in ("w3", "w1")])
        assert float((torch.cat(held) - expected).norm() / expected.norm()) < 4e-3


# ---- spellings ----


def spelled(file, rename):
    return {
        rename(key.removeprefix("transformer.")): tensor for key, tensor in file.tensors.items()
    }


def musubi(key):
    path, _, role = key.rpartition(".lora_")
    ending = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[role]
    return f"lora_unet_{path.replace('.', '_')}.{ending}"


def comfyui(key):
    for old, new in (("to_qkv", "qkv"), ("to_out.0", "out")):
        key = key.replace(f"attention.{old}", f"attention.{new}")
    return f"diffusion_model.{key}"


SPELLINGS = {
    "ai-toolkit": lambda key: f"diffusion_model.{key}",
    "bare": lambda key: key,
    "musubi-tuner": musubi,
    "ComfyUI": comfyui,
    "DiffSynth": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("form", [ZImageForm.FUSED, ZImageForm.STOCK, ZImageForm.COMFYUI])
def test_every_spelling_leaves_the_same_bits(spelling, form, made, probe):
    file = in_blocks(
        lambda f, b: [ADAPTERS[name](f, b) for name in ("fused", "out", "gate and value", "down")]
    )
    model, other = made(form), made(form)
    qwenlora.compose_loras(model, file.tensors)
    report = qwenlora.compose_loras(other, spelled(file, SPELLINGS[spelling]))
    assert report.complete
    assert probe.values(model) == probe.values(other)


# ---- who calls a layer ----


@pytest.mark.slow
@pytest.mark.parametrize("form", ZImageForm)
def test_a_whole_lokr_runs_beside_every_layer(form, made):
    file = in_blocks(
        lambda f, b: [
            f.lokr(f"{b}.attention.to_q", (16, 16), (24, 24)),
            f.lokr(f"{b}.feed_forward.w1", (16, 16), (64, 24)),
        ]
    )
    report = qwenlora.compose_loras(made(form), file.tensors)
    for slot in report.slots:
        assert slot.krons, slot.path
        assert not slot.rank_added, slot.path


@pytest.mark.slow
@pytest.mark.parametrize("form", UNSEEN)
def test_the_kernel_is_kept_where_that_is_asked_for(form, made, files):
    model = made(form)
    options = qwenlora.ComposeOptions(mlp="rank")
    qwenlora.compose_loras(model, files["lokr of the attention"].tensors, options=options)
    path = FUSED_QKV[form].removesuffix(".qkv") if form is ZImageForm.FUSED else FUSED_QKV[form]
    layer = model.get_submodule(f"layers.0.{path}")
    assert not layer._forward_hooks
    assert not [name for name in layer._buffers if name.startswith("qwenlora")]


class Around:
    """A processor around another."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class ByModule(ZImageProcessor):
    """One that reaches the kernel through its module."""

    def project(self, attn, x, freqs_cis):
        norms = (attn.norm_q.weight, attn.norm_k.weight)
        return split(fused_qkv.fused_qkv_norm_rotary(x, attn.to_qkv, *norms, freqs_cis), attn.heads)


AROUND = {
    "object": Around,
    "closure": lambda inner: lambda *args, **kwargs: inner(*args, **kwargs),
    "bound method": lambda inner: inner.__call__,
    "module's function": lambda inner: ByModule(),
}


@pytest.mark.parametrize("around", AROUND)
def test_a_processor_that_does_not_tell_carries_ranks_alone(around, made, files, changes, run):
    model = made(ZImageForm.PASSED)
    for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
        block.attention.processor = AROUND[around](block.attention.processor)
    base = run(model)
    file = files["lokr of the attention"]
    report = qwenlora.compose_loras(model, file.tensors)
    assert not any(slot.krons for slot in report.slots if slot.path.endswith("to_qkv"))
    assert error_of(model, run, base, changes(file)) < 10 * DELTA_BOUND


def test_a_processor_in_the_place_of_another_is_noticed(made, files, changes, run):
    model, file = made(ZImageForm.CALLED), files["lokr of the attention"]
    qwenlora.compose_loras(model, file.tensors)
    qwenlora.reset_loras(model)
    for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
        block.attention.processor = PassedProcessor()
    base = run(model)
    qwenlora.compose_loras(model, file.tensors)
    assert error_of(model, run, base, changes(file)) < DELTA_BOUND


def test_a_forward_in_the_place_of_another_is_noticed(made, files):
    model, file = made(ZImageForm.COMFYUI), files["gate alone"]
    qwenlora.compose_loras(model, file.tensors)
    qwenlora.reset_loras(model)
    mlp = model.layers[0].feed_forward
    mlp.forward = MethodType(GateFirst.forward, mlp)
    with pytest.raises(errors.UnsupportedModelError, match=r"layers\.0\.feed_forward"):
        qwenlora.compose_loras(model, file.tensors)


# ---- the order of the rows ----


class GateFirst(nn.Module):
    """A gated MLP whose fused linear has the gate first."""

    def __init__(self, mlp):
        super().__init__()
        self.w13, self.w2 = mlp.w13, mlp.w2

    def forward(self, x):
        gate, value = self.w13(x).chunk(2, dim=-1)
        return self.w2(nn.functional.silu(gate) * value)


class Told(GateFirst):
    """One whose order an attribute says."""

    def __init__(self, mlp, *, gate_first):
        super().__init__(mlp)
        self.gate_first = gate_first

    def forward(self, x):
        first, second = self.w13(x).chunk(2, dim=-1)
        silu = nn.functional.silu
        return self.w2(silu(first) * second if self.gate_first else first * silu(second))


def test_one_class_of_mlp_may_have_both_orders(made, files, changes, run):
    known, odd = made(ZImageForm.COMFYUI), made(ZImageForm.COMFYUI)
    for model, gate_first in ((known, False), (odd, True)):
        block = model.layers[0]
        block.feed_forward = Told(block.feed_forward, gate_first=gate_first)
    base = run(known)
    qwenlora.compose_loras(known, files["gate alone"].tensors)
    assert error_of(known, run, base, changes(files["gate alone"])) < DELTA_BOUND
    with pytest.raises(errors.UnsupportedModelError, match=r"layers\.0\.feed_forward"):
        qwenlora.compose_loras(odd, files["gate alone"].tensors)


def test_an_mlp_that_is_refused_leaves_others_of_its_class(made, files):
    odd = made(ZImageForm.CALLED)
    odd.layers[0].feed_forward.net[0].activation = nn.GELU()
    for model, is_known in ((odd, False), (made(ZImageForm.CALLED), True), (odd, False)):
        if is_known:
            assert qwenlora.compose_loras(model, files["gate alone"].tensors).complete
            continue
        with pytest.raises(errors.UnsupportedModelError, match=r"layers\.0\.feed_forward"):
            qwenlora.compose_loras(model, files["gate alone"].tensors)


class Unseen(nn.Module):
    """An MLP of linears apart that reads one's tensors."""

    def __init__(self, mlp):
        super().__init__()
        self.w1, self.w2, self.w3 = mlp.w1, mlp.w2, mlp.w3

    def forward(self, x):
        assert self.w1.qweight is not None
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def test_an_mlp_of_linears_apart_must_call_them(made, files):
    model = made(ZImageForm.STOCK)
    block = model.layers[1]
    block.feed_forward = Unseen(block.feed_forward)
    with pytest.raises(errors.UnsupportedModelError, match=r"layers\.1\.feed_forward.*call"):
        qwenlora.compose_loras(model, files["lokr"].tensors)


class ValueFirst(GateFirst):
    """The same with the value first."""

    def forward(self, x):
        value, gate = self.w13(x).chunk(2, dim=-1)
        return self.w2(nn.functional.silu(gate) * value)


class Uncalled(GateFirst):
    """A gated MLP that computes its linear without calling it."""

    def forward(self, x):
        value, gate = self.w13.product(*self.w13.rounded(x)).chunk(2, dim=-1)
        return self.w2(value * nn.functional.silu(gate))


class Other(GateFirst):
    """An MLP of another activation."""

    def forward(self, x):
        value, gate = self.w13(x).chunk(2, dim=-1)
        return self.w2(value * nn.functional.gelu(gate))


@pytest.mark.parametrize("kind", [GateFirst, Uncalled, Other])
def test_an_mlp_whose_order_is_not_known_is_refused(kind, made, files):
    model = made(ZImageForm.COMFYUI)
    block = model.layers[1]
    block.feed_forward = kind(block.feed_forward)
    with pytest.raises(errors.UnsupportedModelError, match=r"layers\.1\.feed_forward"):
        qwenlora.compose_loras(model, files["out"].tensors)


def test_an_mlp_with_a_forward_of_its_own_is_run_as_it_is(made, files, changes, run):
    model = made(ZImageForm.COMFYUI)
    known = model.layers[0].feed_forward
    known.forward = MethodType(GateFirst.forward, known)
    with pytest.raises(errors.UnsupportedModelError, match=r"layers\.0\.feed_forward"):
        qwenlora.compose_loras(model, files["gate alone"].tensors)
    known.forward = MethodType(ValueFirst.forward, known)
    base = run(model)
    qwenlora.compose_loras(model, files["gate alone"].tensors)
    assert error_of(model, run, base, changes(files["gate alone"])) < DELTA_BOUND


def test_the_order_is_found_without_running_anybodys_hooks(made, files):
    model, seen = made(ZImageForm.CALLED), []
    mlp = model.layers[0].feed_forward
    for module in (mlp, mlp.net[0], mlp.net[0].activation, mlp.net[1]):
        module.register_forward_hook(lambda *_: seen.append("after"))
        module.register_forward_pre_hook(lambda *_: seen.append("before"))
    qwenlora.compose_loras(model, files["gate alone"].tensors)
    assert not seen


@pytest.mark.parametrize("form", [ZImageForm.CALLED, ZImageForm.COMFYUI])
def test_a_compiled_mlp_is_looked_through(form, made, files, changes, run):
    model = made(form)
    base = run(model)
    block = model.layers[0]
    block.feed_forward = torch.compile(block.feed_forward, backend="eager")
    qwenlora.compose_loras(model, files["gate alone"].tensors)
    assert error_of(model, run, base, changes(files["gate alone"])) < DELTA_BOUND


# ---- values that one module holds of several layers ----


def test_norms_of_a_fused_module_change_one_by_one(made, files, changes, run, probe):
    model = made(ZImageForm.FUSED)
    base, before = run(model), probe.snapshot(model)
    both, one = files["norms"], files["key's norm alone"]
    for file in (both, one, both):
        qwenlora.compose_loras(model, file.tensors)
        assert error_of(model, run, base, changes(file)) < DELTA_BOUND
    report = qwenlora.compose_loras(model, [(both.tensors, 0.0)])
    assert torch.equal(run(model), base)
    assert {path.rpartition(".")[2] for path in (slot.path for slot in report.slots)} <= {
        "norm_q",
        "norm_k",
        "ffn_norm1",
    }
    qwenlora.reset_loras(model)
    assert not before.differences(probe.snapshot(model))


def test_a_norm_that_overflows_leaves_its_neighbour(dense, probe):
    model = emulation.z_image_transformer(
        dense,
        form=ZImageForm.FUSED,
        rank=16,
        precision=Precision.W4A4,
        dtype=torch.float16,
    )
    before = probe.snapshot(model)
    file = File().norm("layers.0.attention.norm_q", 128).norm("layers.0.attention.norm_k", 128)
    file.tensors["transformer.layers.0.attention.norm_k.diff"].fill_(1e6)
    with pytest.raises(errors.NonFiniteError, match=r"fused_module\.norm_k\.weight"):
        qwenlora.compose_loras(model, file.tensors)
    assert not before.differences(probe.snapshot(model))


# ---- whose file ----


@pytest.mark.parametrize("name", ["x_pad_token", "cap_pad_token"])
def test_a_parameter_that_takes_no_delta_is_named(name, made, files):
    tensors = {**files["out"].tensors, f"transformer.{name}.diff": torch.ones(1, WIDTH)}
    report = qwenlora.compose_loras(made(ZImageForm.FUSED), tensors)
    assert not report.complete
    assert name in report.text()
    with pytest.raises(errors.UnsupportedAdapterError, match=name):
        qwenlora.compose_loras(made(ZImageForm.FUSED), tensors, strict=True)


def qwen_image_file():
    return File().pair("transformer_blocks.0.attn.to_q", 3072, 3072)


def test_a_file_of_the_other_model_is_refused_by_name(made):
    model = made(ZImageForm.FUSED)
    with pytest.raises(errors.OtherModelError, match="a Qwen-Image LoRA, and the model is Z-Image"):
        qwenlora.compose_loras(model, qwen_image_file().tensors)


def test_a_quantized_layer_of_another_model_is_refused(made, files):
    model = made(ZImageForm.CALLED)
    # As Lumina-Image has it: an activation before the linear.
    modulation = model.layers[0].adaLN_modulation
    modulation.insert(0, nn.SiLU())
    with pytest.raises(errors.UnsupportedModelError, match=r"layers\.0\."):
        qwenlora.compose_loras(model, files["out"].tensors)


def test_what_is_no_number_and_no_set_is_told(made, files, run):
    model = made(ZImageForm.COMFYUI)
    with pytest.raises(ValueError, match="inf"):
        qwenlora.compose_loras(model, (files["out"].tensors, 10**400))
    qwenlora.ComfyQwenImageWrapper.of(model)
    with pytest.raises(TypeError, match="LoraSet"):
        model([], torch.ones(1), [], transformer_options={"qwenlora": "style"})


# ---- all that Qwen-Image has ----


@pytest.mark.slow
@pytest.mark.parametrize("form", ZImageForm)
def test_strengths_sets_and_copies(form, made, files, changes, run, probe):
    model = made(form)
    base, before = run(model), probe.snapshot(model)
    first, second = files["gate and value"], files["apart"]

    options = qwenlora.ComposeOptions(cache_bytes=2**28)
    for strength in (1.0, -0.7):
        qwenlora.compose_loras(model, [(first.tensors, strength)], options=options)
        alone = made(form)
        qwenlora.compose_loras(alone, [(first.tensors, strength)])
        assert probe.values(model) == probe.values(alone)
    qwenlora.compose_loras(model, [second.tensors], options=options)
    assert error_of(model, run, base, changes(second)) < DELTA_BOUND
    qwenlora.compose_loras(model, [first.tensors], options=options)
    assert error_of(model, run, base, changes(first)) < DELTA_BOUND
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(twin))
    qwenlora.reset_loras(model)
    assert not before.differences(probe.snapshot(model))
    for own in (twin, again):
        assert error_of(own, run, base, changes(first)) < DELTA_BOUND
        qwenlora.reset_loras(own)
        assert torch.equal(run(own), base)


@pytest.mark.parametrize("form", [ZImageForm.FUSED, ZImageForm.STOCK])
def test_strength_per_block(form, made, dense, run):
    file, model = File(3).every_linear(dense), made(form)
    base = run(model)
    spec = qwenlora.LoraSpec(file.tensors, 1.0, blocks="0:0.5, 1:0; mod:2, rest:0")
    qwenlora.compose_loras(model, [spec])
    weighted = copy.deepcopy(dense)
    for path, delta in file.deltas.items():
        factor = {"layers.0": 0.5}.get(path.rpartition(".")[0][:8], 0.0)
        factor *= 2 if "adaLN" in path else 1
        weighted.get_submodule(path).weight += factor * delta
    assert error_of(model, run, base, run(weighted) - run(dense)) < DELTA_BOUND


@pytest.mark.parametrize("form", [ZImageForm.FUSED, ZImageForm.COMFYUI])
def test_ranks_are_capped_and_told(form, made, dense):
    file, model = File(4).every_linear(dense, rank=32), made(form)
    report = qwenlora.compose_loras(model, file.tensors, max_rank=16)
    cut = [slot for slot in report.slots if slot.energy_lost]
    assert {slot.rank_added for slot in cut} == {16}
    assert any(slot.path.endswith(FUSED_QKV[form]) for slot in cut)


@pytest.mark.slow
@pytest.mark.parametrize("form", ZImageForm)
def test_a_group_and_single_slots_leave_the_same_bits(form, made, dense, probe, tmp_path):
    from qwenlora.group.partition import apart

    file = File(2).every_linear(dense)
    save_file(file.tensors, tmp_path / "lora.safetensors")
    model, other = made(form), made(form)
    qwenlora.compose_loras(model, tmp_path / "lora.safetensors")
    with apart():
        qwenlora.compose_loras(other, tmp_path / "lora.safetensors")
    assert probe.values(model) == probe.values(other)


@pytest.mark.slow
@pytest.mark.parametrize("form", [ZImageForm.FUSED, ZImageForm.STOCK])
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offload_that_moves_what_is_there(offload, form, made, files, changes, run):
    model = made(form)
    base = run(model)
    if offload == "model":
        pytest.importorskip("accelerate").cpu_offload_with_hook(model, execution_device="cpu")
    else:
        from diffusers.hooks import apply_group_offloading

        cpu = torch.device("cpu")
        apply_group_offloading(
            model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
        )
    for name in ("gate and value", "norms"):
        qwenlora.compose_loras(model, files[name].tensors)
        assert error_of(model, run, base, changes(files[name])) < DELTA_BOUND
    qwenlora.reset_loras(model)
    assert torch.equal(run(model), base)


PIPELINED = [form for form in ZImageForm if not form.value.startswith("comfyui")]


def pipeline_of(transformer):
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(
        **blocks, block_out_channels=(8,), latent_channels=16, norm_num_groups=4, shift_factor=0.1
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline):
    """The latent that two steps make."""
    return pipeline(
        prompt_embeds=[torch.randn(20, 128, generator=torch.Generator().manual_seed(0))],
        num_inference_steps=2,
        height=16,
        width=16,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images


@pytest.fixture(scope="module")
def pictures(dense):
    """What PEFT makes of the same calls on the dense pipeline."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        return after_each_call(pipeline_of(copy.deepcopy(dense)), dense)


def after_each_call(pipeline, dense):
    first, second = File(6).every_linear(dense), File(7).every_linear(dense)
    pipeline.load_lora_weights(dict(first.tensors), adapter_name="first")
    pipeline.load_lora_weights(dict(second.tensors), adapter_name="second")
    pipeline.set_adapters(["first", "second"], [0.7, -0.3])
    made = [picture(pipeline)]
    pipeline.disable_lora()
    made.append(picture(pipeline))
    pipeline.enable_lora()
    pipeline.delete_adapters("first")
    made.append(picture(pipeline))
    pipeline.unload_lora_weights()
    return [*made, picture(pipeline)]


@pytest.mark.slow
@pytest.mark.parametrize("form", PIPELINED)
def test_the_pipelines_methods_do_what_peft_does(form, made, dense, pictures):
    pipeline = pipeline_of(made(form))
    qwenlora.attach(pipeline)
    ours = after_each_call(pipeline, dense)
    assert not torch.equal(pictures[0], pictures[1])
    for own, theirs in zip(ours, pictures, strict=True):
        assert float((own - theirs).norm() / theirs.norm()) < 1e-5
    qwenlora.detach(pipeline)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    [
        {"context_refiner": 0.5},
        {"noise_refiner": 0.0},
        {"layers.0.feed_forward": 0.0},
        {"layers.1": 2.0, "refiner": -1.0},
        {"attention": 0.25},
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [False, True])
def test_weights_by_layers_names_are_exact_or_refused(whole, weights, made, dense, run):
    """Factors by block and kind cannot tell all layers apart; what they cannot is an error."""
    file, model = File(1), made(ZImageForm.STOCK)
    for path, module in dense.named_modules():
        if isinstance(module, nn.Linear) and (whole or path.startswith(LISTS)):
            file.pair(path, module.out_features, module.in_features)
    pipeline, base = pipeline_of(model), run(model)
    qwenlora.attach(pipeline)
    pipeline.load_lora_weights(dict(file.tensors), adapter_name="one")
    weighted = copy.deepcopy(dense)
    for path, delta in file.deltas.items():
        factor = next((own for name, own in weights.items() if name in path), 1.0)
        weighted.get_submodule(path).weight += factor * delta
    try:
        pipeline.set_adapters("one", {"transformer": weights})
        found = run(model)
    except errors.AdapterWeightError:
        assert whole or weights == {"attention": 0.25}
        return
    change = run(weighted) - run(dense)
    assert float((found - base - change).norm() / change.norm()) < DELTA_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("form", [ZImageForm.FUSED, ZImageForm.COMFYUI])
def test_a_step_cache_keeps_no_residual_of_other_loras(form, made, files, run, monkeypatch):
    monkeypatch.setenv("CACHE_DIT_LOG_LEVEL", "error")
    cache_dit = pytest.importorskip("cache_dit")
    logging.getLogger("cache_dit").setLevel(logging.ERROR)
    model = made(form)
    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=model.layers,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        check_forward_pattern=False,
    )
    # Every step after the first one takes what the first block left.
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=0,
        residual_diff_threshold=100.0,
        enable_separate_cfg=False,
    )
    cache_dit.enable_cache(adapter, cache_config=config)
    qwenlora.ComfyQwenImageWrapper.of(model)
    for name in ("gate and value", "apart", "norms"):
        fresh = made(form)
        qwenlora.compose_loras(fresh, files[name].tensors)
        qwenlora.compose_loras(model, files[name].tensors)
        for _ in range(2):
            assert torch.allclose(run(model), run(fresh), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", [ZImageForm.FUSED, ZImageForm.STOCK, ZImageForm.COMFYUI])
def test_compiled_by_blocks(form, made, files, changes, run):
    model = made(form)
    base = run(model)
    # One with modulation and one without: the other blocks run the same code.
    for block in (model.context_refiner[0], model.layers[0]):
        block.compile(backend="eager")
    run(model)
    for name in ("gate and value", "lokr", "norms", "modulation"):
        qwenlora.compose_loras(model, files[name].tensors)
        assert error_of(model, run, base, changes(files[name])) < DELTA_BOUND
    qwenlora.reset_loras(model)
    assert float((run(model) - base).norm() / base.norm()) < 1e-5
