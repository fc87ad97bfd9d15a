"""`qwenlora merge --base` on Z-Image: 16-bit and quantized bases by every name, every kind."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import LoraSpec, emulation, errors
from qwenlora.emulation import Precision, ZImageForm
from qwenlora.merge.job import merge_loras
from qwenlora.merge.known import KnownSlot, known_slots
from qwenlora.merge.plan import MergeOptions
from qwenlora.plan.documents import SlotKind

from .adapter_files import AdapterFile, Module, modules_of
from .test_merge import PREFIX, deltas_of, error

pytestmark = pytest.mark.slow

pytest.importorskip("diffusers.models.transformers.transformer_z_image")

BLOCK = "layers.0"
FLOAT32 = 3e-6
"""Relative error of a delta formed in float32; measured: 6.0e-7."""
COMPOSED = 5e-5
"""Of what a file changes in an output of the model, merged against composed; measured: 4.4e-6."""
PARTS = [*(f"{BLOCK}.attention.to_{name}" for name in "qkv"), f"{BLOCK}.attention.to_out.0"]
PARTS += [f"{BLOCK}.feed_forward.w{at}" for at in (1, 2, 3)]
LINEARS = [f"{BLOCK}.adaLN_modulation.0", "cap_embedder.1", "all_final_layer.2-1.linear"]
KINDS = [
    "dora of rows",
    "dora of columns",
    "dora by peft",
    "dora of rows, small lokr",
    "dora of columns, lokr",
    "dora of rows, loha",
    "ia3 of rows",
    "ia3 of columns",
    "ia3 of rows by peft",
    "ia3 of columns by peft",
    "glora",
    "glora, old",
    "hra",
    "diag-oft, rescaled and constrained",
    "boft",
    "oft by peft",
    "oft by peft, solved",
    "oft by onetrainer",
    "boft by peft",
]
FORMS = (ZImageForm.CALLED, ZImageForm.PASSED, ZImageForm.STOCK, ZImageForm.COMFYUI)
"""Forms whose state is a file's; Nunchaku folds `to_qkv` while it loads."""


@pytest.fixture(scope="module")
def dense():
    return emulation.tiny_z_image(layers=1)


@pytest.fixture(scope="module")
def slots(dense):
    """The slots of the tiny model, by path."""
    shapes = {
        name: module.weight.shape
        for name, module in dense.named_modules()
        if getattr(module, "weight", None) is not None
    }
    found = {}
    for path, slot in known_slots("z-image").items():
        if all(part in shapes for part in slot.parts):
            rows = sum(shapes[part][0] for part in slot.parts)
            columns = shapes[slot.parts[0]][1] if len(shapes[slot.parts[0]]) > 1 else 1
            row = slot.row._replace(out_features=rows, in_features=columns)
            found[path] = KnownSlot(row, slot.parts)
    return found


@pytest.fixture(scope="module")
def modules(dense, slots):
    """The dense model's modules, and its fused ones."""
    state, found = dense.state_dict(), {}
    for path, slot in slots.items():
        for part, (begin, _) in slot.rows.items():
            bias = state.get(f"{part}.bias")
            bias = None if bias is None else bias.double()
            kept = None if bias is None else torch.zeros_like(bias)
            own = (state[f"{part}.weight"].double(), bias, SlotKind(slot.row.kind))
            found[part] = Module(part, path, begin, *own, kept_bias=kept)
        if len(slot.parts) > 1:
            whole = torch.cat([found[part].weight for part in slot.parts])
            found[path] = Module(path, path, 0, whole, None, SlotKind(slot.row.kind))
    return found


@pytest.fixture(scope="module")
def quantized(dense):
    """Makes a model of a form; each is quantized once."""
    known = {}

    def make(form, *, refiners=True, precision=Precision.EXACT):
        key = (form, refiners, precision)
        if key not in known:
            known[key] = emulation.z_image_transformer(
                dense,
                form=form,
                rank=16,
                precision=precision,
                dtype=torch.float32 if precision is Precision.EXACT else torch.bfloat16,
                quantized_refiners=refiners,
            )
        return known[key]

    return make


@pytest.fixture
def merged(slots, tmp_path):
    """Merges a file onto a state; the report and the path."""
    made = iter(range(100))

    def merge(file, state, *, strength=1.0, prefix="", **options):
        source = file.save(tmp_path / f"source-{next(made)}")
        base = tmp_path / f"base-{next(made)}.safetensors"
        save_file({prefix + key: t.contiguous().clone() for key, t in state.items()}, base)
        path = tmp_path / f"merged-{next(made)}.safetensors"
        settings = MergeOptions(base=base, dtype=torch.float32, **options)
        return merge_loras([LoraSpec(source, strength)], path, settings, known=slots), path

    return merge


def assert_changes(path, file, modules, strength=1.0):
    """What is written is W' - W of every module of the file, and of nothing else."""
    found = deltas_of(path)
    expected = {
        diffusers_name(name): strength * (own.weight - modules[diffusers_name(name)].weight)
        for name, own in file.merged.items()
    }
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name]) for name in expected) < FLOAT32


def original(state):
    """The keys that Z-Image's own files have, with one query, key and value."""
    named = {}
    for key, tensor in state.items():
        path, _, name = key.rpartition(".")
        block, _, end = path.rpartition(".attention.")
        if end == "to_q":
            parts = [state[f"{block}.attention.to_{one}.{name}"] for one in "qkv"]
            named[f"{block}.attention.qkv.{name}"] = torch.cat(parts)
        elif end in ("to_out.0", "norm_q", "norm_k"):
            own = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}[end]
            named[f"{block}.attention.{own}.{name}"] = tensor
        elif end not in ("to_k", "to_v"):
            own = key.replace("all_x_embedder.2-1", "x_embedder")
            named[own.replace("all_final_layer.2-1", "final_layer")] = tensor
    return named


NAMINGS = {
    "diffusers": (dict, ""),
    "original": (original, ""),
    "ComfyUI": (original, "model.diffusion_model."),
}


# Names are read before anything is made of them: the kinds take turns.
IN_TURN = [
    pytest.param(naming, kind, id=f"{kind}-{naming}")
    for naming, kind in zip(itertools.cycle(NAMINGS), KINDS, strict=False)
]


@pytest.mark.parametrize(("naming", "kind"), IN_TURN)
def test_a_16_bit_base_by_every_name(naming, kind, dense, modules, merged):
    renamed, prefix = NAMINGS[naming]
    file = AdapterFile.of(kind, [modules[name] for name in (*PARTS, *LINEARS)])
    report, path = merged(file, renamed(dense.state_dict()), strength=-0.6, prefix=prefix)
    left_out = {skip.name for skip in report.loras[0].skipped}
    assert left_out == ({*LINEARS} if kind == "ia3 of rows by peft" else set())
    assert_changes(path, file, modules, -0.6)
    assert (report.base.form, report.base.estimated) == ("16-bit", 0)


@pytest.mark.parametrize("kind", ["dora of columns", "diag-oft, rescaled and constrained", "boft"])
@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_an_adapter_of_a_fused_layer_changes_each_part(naming, kind, dense, modules, slots, merged):
    fused = [path for path, slot in slots.items() if len(slot.parts) > 1 and BLOCK in path]
    file = AdapterFile.of(kind, [modules[path] for path in fused])
    report, path = merged(file, NAMINGS[naming][0](dense.state_dict()))
    assert report.complete
    found = deltas_of(path)
    for name in fused:
        whole = torch.cat([found[part] for part in slots[name].parts])
        assert error(whole, file.merged[name].weight - modules[name].weight) < FLOAT32


def named_by_diffusers(model):
    """A model's modules by the names that merged files have."""
    return {diffusers_name(name): own for name, own in modules_of(model).items()}


def diffusers_name(name):
    """Of a module of ComfyUI's."""
    for own, other in (
        (".attention.out", ".attention.to_out.0"),
        ("final_layer.linear", "all_final_layer.2-1.linear"),
    ):
        if name.endswith(own) and not name.endswith(other):
            return name.removesuffix(own) + other
    return name


@pytest.mark.parametrize("kind", KINDS[::3])
@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_base_by_every_name(form, kind, quantized, merged):
    model = quantized(form)
    modules = named_by_diffusers(model)
    file = AdapterFile.of(kind, [modules[name] for name in PARTS])
    report, path = merged(file, model.state_dict())
    assert report.complete
    assert_changes(path, file, modules)
    estimated = len(PARTS) if kind.startswith("dora") else 0
    assert (report.base.form, report.base.estimated) == ("quantized", estimated)


@pytest.mark.parametrize("form", [ZImageForm.CALLED, ZImageForm.COMFYUI])
def test_refiners_that_are_not_quantized(form, quantized, merged):
    model = quantized(form, refiners=False)
    modules = named_by_diffusers(model)
    names = [name.replace(BLOCK, "noise_refiner.0") for name in PARTS]
    file = AdapterFile.of("dora of rows", [modules[name] for name in (*names, PARTS[0])])
    report, path = merged(file, model.state_dict())
    assert_changes(path, file, modules)
    assert (report.base.modules, report.base.estimated) == (len(names) + 1, 1)


@pytest.mark.parametrize("form", [ZImageForm.CALLED, ZImageForm.COMFYUI])
def test_packed_4_bit_values_are_dequantized(form, quantized, merged):
    model = quantized(form, precision=Precision.W4A4)
    modules = named_by_diffusers(model)
    file = AdapterFile.of("oft by peft", [modules[name] for name in PARTS])
    report, path = merged(file, model.state_dict())
    assert report.complete
    assert_changes(path, file, modules)


def test_composed_a_merged_file_does_what_its_source_does(quantized, merged):
    model = quantized(ZImageForm.COMFYUI)
    modules = named_by_diffusers(model)
    file = AdapterFile.of("dora of columns", [modules[name] for name in (*PARTS[3:], *LINEARS)])
    _, path = merged(file, model.state_dict())
    by_source, by_merge = copy.deepcopy(model), copy.deepcopy(model)
    qwenlora.compose_loras(by_source, (file.tensors, 0.5), strict=True)
    qwenlora.compose_loras(by_merge, (path, 0.5), strict=True)
    base = outputs(model)
    assert error(outputs(by_merge) - base, outputs(by_source) - base) < COMPOSED


def outputs(model):
    generator = torch.Generator().manual_seed(5)
    latent, caption = (torch.randn(s, generator=generator) for s in ((16, 1, 8, 8), (20, 128)))
    with torch.no_grad():
        return model([latent], torch.tensor([0.4]), [caption]).sample[0].double()


def test_factors_on_a_bias(dense, modules, merged):
    kind = "ia3 of rows by peft"
    file = AdapterFile.of(kind, [modules[name] for name in (*PARTS, *LINEARS)])
    report, path = merged(file, dense.state_dict(), strength=0.5, diffs=True)
    assert report.complete
    assert report.zero == ()
    found = load_file(path)
    biased = {name for name in found if name.endswith(".diff_b")}
    assert biased == {f"{PREFIX}{name}.diff_b" for name in LINEARS}
    for name in LINEARS:
        expected = 0.5 * (file.merged[name].bias - modules[name].bias)
        assert error(found[f"{PREFIX}{name}.diff_b"].double(), expected) < FLOAT32


def test_a_weight_that_takes_the_place_of_the_base(dense, modules, merged):
    norms = [f"{BLOCK}.attention.norm_q", f"{BLOCK}.ffn_norm1"]
    file = AdapterFile.of("set_weight", [modules[name] for name in (*LINEARS, *norms)])
    state = original(dense.state_dict())
    report, _ = merged(file, state)
    assert {skip.name for skip in report.loras[0].skipped} == {
        f"diffusion_model.{name}.set_weight" for name in norms
    }
    report, path = merged(file, state, strength=0.5, diffs=True)
    assert report.complete
    found, deltas = load_file(path), deltas_of(path)
    for name in (*LINEARS, *norms):
        expected = 0.5 * (file.merged[name].weight - modules[name].weight)
        own = deltas[name] if name in LINEARS else found[f"{PREFIX}{name}.diff"].double()
        assert error(own, expected) < FLOAT32


def test_a_16_bit_weight_whose_order_of_rows_nobody_tells(dense, modules, merged):
    state = dict(dense.state_dict())
    names = [f"{BLOCK}.feed_forward.w{at}" for at in (1, 3)]
    state[f"{BLOCK}.feed_forward.w13.weight"] = torch.cat(
        [state.pop(f"{name}.weight") for name in names]
    )
    file = AdapterFile.of("hra", [modules[name] for name in names])
    with pytest.raises(errors.NothingToApplyError, match="has no weight of it"):
        merged(file, state)
