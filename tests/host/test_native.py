"""ComfyUI's own LoRA nodes and hooks on an enabled Nunchaku model, against the dense model."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import qwenlora
from qwenlora.errors import UnsupportedAdapterError, UnsupportedModelError
from qwenlora.model.state import EMPTY, read_state
from qwenlora.runtime import OPTIONS_KEY

from . import test_nodes
from .comfy_host import tensors_of
from .test_nodes import A, B, C

# The fixtures of the nodes' own tests.
bench, files, pack = test_nodes.bench, test_nodes.files, test_nodes.pack

CLOSE = 1e-5
"""Between the emulated model in exact precision and the dense one, relative, float32."""
EFFECT = 0.01
"""A change that is no rounding."""
BLOCK = "transformer_blocks.0"


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Runs:
    """Samples a graph on the enabled model and on its dense twin.

    In a graph the model is at `["model", 0]`.
    """

    def __init__(self, bench, graph, dense):
        self.bench, self.graph = bench, graph
        self.given, self.dense = bench.model, graph.source(dense)
        self.sources = bench.sources | {"no clip": graph.source(None)}

    def prompt(self, nodes, *, dense=False):
        if dense:
            return self.sources | {"model": self.dense} | nodes
        loaded = {"loaded": self.bench.sources["model"]}
        return self.sources | loaded | {"model": self.enable(["loaded", 0])} | nodes

    def done(self, nodes, model=("model", 0), *, dense=False, **links):
        prompt = self.prompt(nodes, dense=dense)
        prompt["sampler"] = self.sampler(model, **links)
        prompt["out"] = self.graph.sink("out", ["sampler", 0])
        return self.graph.run(prompt)

    def latent(self, nodes, model=("model", 0), **options):
        done = self.done(nodes, model, **options)
        assert done.success, done.error
        return done.values["out"]["samples"]

    def both(self, nodes, model=("model", 0), **links):
        return tuple(self.latent(nodes, model, dense=dense, **links) for dense in (False, True))

    def value(self, nodes, link):
        """What a node gives; nothing is sampled."""
        done = self.graph.run(self.prompt(nodes) | {"out": self.graph.sink("out", list(link))})
        assert done.success, done.error
        return done.values["out"]

    # ---- nodes ----

    def enable(self, model):
        return self.graph.node("QwenLoraEnable", model=list(model))

    def sampler(self, model=("model", 0), **links):
        conds = {"positive": ["positive", 0], "negative": ["negative", 0]} | links
        return self.graph.node(
            "KSampler",
            model=list(model),
            latent_image=["latent", 0],
            seed=5,
            steps=4,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
            **conds,
        )

    def load(self, name, strength=1.0, model=("model", 0)):
        return self.graph.node(
            "LoraLoaderModelOnly", model=list(model), lora_name=name, strength_model=strength
        )

    def ours(self, name, strength=1.0, model=("model", 0)):
        return self.graph.node(
            "QwenLoraLoader", model=list(model), lora_name=name, strength=strength
        )

    def hook(self, name=A, strength=1.0, **links):
        return self.graph.node(
            "CreateHookLora",
            lora_name=name,
            strength_model=strength,
            strength_clip=1.0,
            **links,
        )

    def hooked(self, hooks, cond="positive"):
        return self.graph.node(
            "ConditioningSetProperties",
            cond_NEW=[cond, 0],
            strength=1.0,
            set_cond_area="default",
            hooks=[hooks, 0],
        )


@pytest.fixture
def runs(bench, graph, small_qwen):
    return Runs(bench, graph, small_qwen)


@pytest.fixture
def enabled(pack, emulated_qwen):
    return native().enable(emulated_qwen)


def native():
    return node_module("native")


def node_module(name):
    return sys.modules[f"{test_nodes.PACK}.{name}"]


# ---- loaders ----


def test_two_loaders_equal_the_dense_model(runs):
    base, dense_base = runs.both({})
    assert error(base, dense_base) < CLOSE
    nodes = {"one": runs.load(A, 0.7), "two": runs.load(B, -0.4, ("one", 0))}
    found, expected = runs.both(nodes, ("two", 0))
    assert error(found, expected) < CLOSE
    assert error(found, base) > EFFECT
    assert torch.equal(runs.latent({}), base)


def test_enabled_without_a_lora_is_the_base_to_the_bit(runs):
    enabled = runs.latent({})
    assert torch.equal(enabled, runs.latent({}, ("loaded", 0)))


def test_a_loader_with_a_text_encoder(runs):
    inputs = {"lora_name": A, "strength_model": 0.7, "strength_clip": 1.0, "clip": ["no clip", 0]}
    nodes = {"lora": runs.graph.node("LoraLoader", model=["model", 0], **inputs)}
    found, expected = runs.both(nodes, ("lora", 0))
    assert error(found, expected) < CLOSE
    nodes["lora"]["inputs"]["strength_model"] = 0.0
    assert torch.equal(runs.latent(nodes, ("lora", 0)), runs.latent({}))


@pytest.mark.parametrize("order", ["ours last", "ours first", "ours between"])
def test_in_any_order_with_our_loaders(runs, order):
    """All in one stack, in the order of the nodes."""
    kinds = {
        "ours last": (runs.load, runs.load, runs.ours),
        "ours first": (runs.ours, runs.load, runs.load),
        "ours between": (runs.load, runs.ours, runs.load),
    }[order]
    strengths = {A: 0.7, B: -0.4, C: 0.2}
    nodes, stock, link = {}, {}, ("model", 0)
    for make, (name, strength) in zip(kinds, strengths.items(), strict=True):
        nodes[name] = make(name, strength, link)
        stock[name] = runs.load(name, strength, link)
        link = (name, 0)
    found, expected = runs.latent(nodes, link), runs.latent(stock, link, dense=True)
    assert error(found, expected) < CLOSE
    model = runs.value(nodes, link)
    assert native().wanted_set(model).names == ("a", "b", "c")
    assert [spec.strength for spec in native().wanted_set(model).specs] == [0.7, -0.4, 0.2]


def test_our_loaders_enable_what_is_behind_them(runs):
    nodes = {"one": runs.ours(A, 0.7, ("loaded", 0)), "two": runs.load(B, -0.4, ("one", 0))}
    stock = {"one": runs.load(A, 0.7), "two": runs.load(B, -0.4, ("one", 0))}
    assert error(runs.latent(nodes, ("two", 0)), runs.latent(stock, ("two", 0), dense=True)) < CLOSE


def test_block_factors_of_ours_stay_with_native_loras(runs, enabled):
    host = node_module("host")
    spec = qwenlora.LoraSpec(host.lora_path(A), 0.5, blocks="0:0.25; mod:0")
    wanted = qwenlora.LoraSet.of([spec], options=host.compose_options())
    model = host.with_set(enabled, wanted, host.transformer_of(enabled), 0)
    behind = load_directly(model, B)
    mixed = native().wanted_set(behind)
    assert mixed.specs[0] is spec
    assert mixed.specs[1].blocks is None


def test_bypassed_and_in_two_branches(runs):
    """Two samplers in one graph, and the base in turns with them: nothing leaks."""
    base = runs.latent({}, ("loaded", 0))
    nodes = {
        "one": runs.load(A, 0.7),
        "two": runs.load(B, -0.4),
        "of one": runs.sampler(("one", 0)),
        "of two": runs.sampler(("two", 0)),
        "of base": runs.sampler(("loaded", 0)),
    }
    for own in ("of one", "of two", "of base"):
        nodes[f"{own} out"] = runs.graph.sink(own, [own, 0])
    done = runs.graph.run(runs.prompt(nodes))
    assert done.success, done.error
    alone = [runs.latent({"lora": runs.load(*own)}, ("lora", 0)) for own in ((A, 0.7), (B, -0.4))]
    for own, expected in zip(("of one", "of two", "of base"), (*alone, base), strict=True):
        assert torch.equal(done.values[own]["samples"], expected)


def test_custom_samplers(runs):
    graph = runs.graph
    nodes = {
        "lora": runs.load(A, 0.7),
        "guider": graph.node(
            "CFGGuider",
            model=["lora", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            cfg=2.0,
        ),
        "noise": graph.node("RandomNoise", noise_seed=5),
        "euler": graph.node("KSamplerSelect", sampler_name="euler"),
        "sigmas": graph.node(
            "BasicScheduler", model=["lora", 0], scheduler="simple", steps=4, denoise=1.0
        ),
        "custom": graph.node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }
    found = runs.value(nodes, ("custom", 0))["samples"]
    assert error(found, runs.latent({"lora": runs.load(A, 0.7)}, ("lora", 0), dense=True)) < CLOSE


# ---- every kind of adapter ----


def linears(dense):
    """Names and shapes of the dense model's weights of two axes."""
    weights = dense.model.diffusion_model.state_dict().items()
    return {n.removesuffix(".weight"): w for n, w in weights if w.ndim == 2}


def normal(generator, *shape, size=1.0):
    return size * torch.randn(shape, generator=generator)


def lora_pair(generator, weight):
    out, columns = weight.shape
    up = normal(generator, out, 4, size=0.3)
    return {"lora_up.weight": up, "lora_down.weight": normal(generator, 4, columns) / columns**0.5}


def dora(generator, weight, axis):
    pair = lora_pair(generator, weight)
    merged = weight + 0.5 * pair["lora_up.weight"] @ pair["lora_down.weight"]
    lengths = (weight if axis == 1 else merged).norm(dim=axis, keepdim=True)
    scale = 1 + 0.05 * torch.randn(lengths.shape, generator=generator)
    return {**pair, "alpha": torch.tensor(2.0), "dora_scale": lengths * scale}


def loha(generator, weight):
    (out, columns), size = weight.shape, 0.2
    return {
        **{f"hada_w{n}_a": normal(generator, out, 3, size=size) for n in "12"},
        **{f"hada_w{n}_b": normal(generator, 3, columns, size=size) for n in "12"},
        "alpha": torch.tensor(2.0),
    }


def lokr(generator, weight, *, whole):
    out, columns = weight.shape
    tensors = {"lokr_w1": normal(generator, 4, 4, size=0.2), "alpha": torch.tensor(2.0)}
    if whole:
        return tensors | {"lokr_w2": normal(generator, out // 4, columns // 4, size=0.05)}
    return tensors | {
        "lokr_w2_a": normal(generator, out // 4, 3, size=0.2),
        "lokr_w2_b": normal(generator, 3, columns // 4, size=0.2),
    }


def glora(generator, weight):
    out, columns = weight.shape
    shapes = {"a1": (columns, 3), "a2": (3, columns), "b1": (out, 3), "b2": (3, columns)}
    tensors = {f"{n}.weight": normal(generator, *s, size=0.05) for n, s in shapes.items()}
    return tensors | {"alpha": torch.tensor(1.5)}


def blocks(generator, weight, *stages):
    return {"oft_blocks": normal(generator, *stages, weight.shape[0] // 8, 8, 8, size=0.05)}


KINDS = {
    "lora": lambda g, w: lora_pair(g, w) | {"alpha": torch.tensor(2.0)},
    "lora without alpha": lora_pair,
    "dora of columns": lambda g, w: dora(g, w, 0),
    "loha": loha,
    "lokr": lambda g, w: lokr(g, w, whole=True),
    "lokr in halves": lambda g, w: lokr(g, w, whole=False),
    "glora": glora,
    "oft": blocks,
    "boft": lambda g, w: {**blocks(g, w, 2), "alpha": torch.tensor(0.0)},
    "diff": lambda g, w: {"diff": normal(g, *w.shape, size=0.02)},
}
EXACT_AT = {"oft": 1.0, "boft": 1.0}
"""ComfyUI applies these with the square of their strength, or blends them: the same at 1 alone."""
IN_KERNELS = {"dora of columns", "oft", "boft"}
"""The MLP of this model is one kernel, which takes ranks alone."""


def put(host, kind, dense, modules):
    """A file of one kind for many modules, as `lora.safetensors`."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, weight in linears(dense).items():
        if name in modules:
            made = KINDS[kind](generator, weight)
            tensors |= {f"diffusion_model.{name}.{end}": own for end, own in made.items()}
    save_file({key: own.contiguous() for key, own in tensors.items()}, host.loras / A)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(runs, host, small_qwen, kind):
    modules = set(linears(small_qwen))
    if kind in IN_KERNELS:
        modules = {name for name in modules if "_mlp." not in name}
    if kind == "diff":
        # What a full delta may take on quantized layers is bounded.
        modules = {f"{BLOCK}.attn.to_q", f"{BLOCK}.img_mod.1", "img_in", "proj_out"}
    put(host, kind, small_qwen, modules)
    nodes = {"lora": runs.load(A, EXACT_AT.get(kind, 0.7))}
    base = runs.latent({})
    found, expected = runs.both(nodes, ("lora", 0))
    assert error(found, base) > EFFECT
    assert error(found, expected) < CLOSE


def test_values_of_norms_and_biases(runs, host, small_qwen):
    generator = torch.Generator().manual_seed(8)
    state = small_qwen.model.diffusion_model.state_dict()
    tensors = {}
    for name, values in state.items():
        module, _, leaf = name.rpartition(".")
        if values.ndim == 1 and (leaf == "bias" or "norm" in module):
            end = "diff_b" if leaf == "bias" else "w_norm"
            drawn = normal(generator, *values.shape, size=0.05)
            tensors[f"diffusion_model.{module}.{end}"] = drawn
    save_file(tensors, host.loras / A)
    base = runs.latent({})
    found, expected = runs.both({"lora": runs.load(A, 0.7)}, ("lora", 0))
    assert error(found, base) > EFFECT
    assert error(found, expected) < CLOSE


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_the_strength_of_a_rotation_is_linear(runs, host, small_qwen, kind):
    """As everywhere here: half of the change of the whole, which ComfyUI's merge does not do."""
    put(host, kind, small_qwen, {"proj_out"})
    half = runs.latent({"lora": runs.load(A, 0.5)}, ("lora", 0))
    ours = runs.latent({"lora": runs.ours(A, 0.5)}, ("lora", 0))
    assert error(half, ours) < CLOSE
    assert error(half, runs.latent({"lora": runs.load(A, 0.5)}, ("lora", 0), dense=True)) > CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_same_through_our_loader(runs, host, small_qwen, kind):
    put(host, kind, small_qwen, {"proj_out", f"{BLOCK}.attn.to_v", f"{BLOCK}.img_mod.1"})
    through = [runs.latent({"lora": make(A, 0.7)}, ("lora", 0)) for make in (runs.load, runs.ours)]
    assert torch.equal(*through)


# ---- calls ----


def load_directly(model, name, strength=1.0):
    nodes = importlib.import_module("nodes")
    with torch.inference_mode():
        return nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, strength)[0]


def patches_of(model, path):
    """What a pack gets that reads a file itself."""
    lora = importlib.import_module("comfy.lora")
    return lora.load_lora(tensors_of(path), lora.model_lora_keys_unet(model.model, {}))


def test_calls_for_each_weight_are_one_lora_for_each_strength(runs, files, enabled, monkeypatch):
    """As LoRA Block Weight makes them; ComfyUI reads the state dict at each."""
    patches = patches_of(enabled, files[A])
    model = enabled.clone()
    assert model.add_patches({"no such weight": None}) == []
    counts = {"state dicts": 0, "plans": 0}
    view = type(model.model)
    whole, planned = view.state_dict, node_module("native.patcher").plan_report

    def counted(key, call):
        def counting(*args, **kwargs):
            counts[key] += 1
            return call(*args, **kwargs)

        return counting

    monkeypatch.setattr(view, "state_dict", counted("state dicts", whole))
    monkeypatch.setattr(node_module("native.patcher"), "plan_report", counted("plans", planned))
    for index, (key, value) in enumerate(patches.items()):
        assert model.add_patches({key: value}, 0.25 * (1 + index % 3)) == [key]
    # The first alone might be all of a file.
    assert counts == {"state dicts": 0, "plans": 1}
    wanted = native().wanted_set(model)
    assert [spec.strength for spec in wanted.specs] == [0.25, 0.5, 0.75]
    assert counts == {"state dicts": 0, "plans": 2}
    model.clone().model_size()
    assert counts == {"state dicts": 0, "plans": 2}


def test_calls_for_each_weight_equal_the_dense_model(runs, files, bench, enabled, small_qwen):
    latents = []
    for model in (enabled.clone(), small_qwen.clone()):
        for index, (key, value) in enumerate(sorted(patches_of(model, files[A]).items())):
            model.add_patches({key: value}, 0.25 * (1 + index % 3))
            # A second time, as two of that node do.
            model.add_patches({key: value}, 0.25)
        latents.append(bench.qwen.ksample(model))
    assert error(*latents) < CLOSE


def test_keys_that_the_model_lacks_are_not_taken(enabled, files):
    tensor = torch.ones(4)
    known = "diffusion_model.img_in.bias"
    given = {"diffusion_model.no.such.weight": ("diff", (tensor,)), "clip.weight": object()}
    model = enabled.clone()
    assert model.add_patches(given) == []
    assert native().wanted_set(model) is None
    values = ("diff", (torch.ones(128),))
    assert model.add_patches(given | {known: values}) == [known]


def test_the_same_lora_again_composes_nothing(runs, composed, files, enabled, bench):
    nodes = importlib.import_module("nodes")
    loader = nodes.LoraLoaderModelOnly()
    latents = []
    for strength in (0.7, 0.7, 0.2, 0.7):
        with torch.inference_mode():
            model = loader.load_lora_model_only(enabled, A, strength)[0]
        latents.append(bench.qwen.ksample(model))
    assert [wanted.specs[0].strength for wanted in composed] == [0.7, 0.2, 0.7]
    assert torch.equal(latents[0], latents[3])
    sources = {wanted.sources[0].identity for wanted in composed}
    assert len(sources) == 1


def test_tensors_of_a_lora_are_let_go_with_the_models(enabled, files):
    gc, weakref = importlib.import_module("gc"), importlib.import_module("weakref")
    model = load_directly(enabled, A)
    held = weakref.ref(native().wanted_set(model).specs[0].source)
    del model
    gc.collect()
    assert held() is None


# ---- hooks ----


def keyframes(runs, hooks, *strengths):
    """Nodes that give hooks a strength from each third of the course on, as `frames`."""
    nodes, link = {}, {}
    for index, strength in enumerate(strengths):
        begin = index / len(strengths)
        frame = f"frame {index}"
        inputs = {"strength_mult": strength, "start_percent": begin}
        nodes[frame] = runs.graph.node("CreateHookKeyframe", **inputs, **link)
        link = {"prev_hook_kf": [frame, 0]}
    nodes["frames"] = runs.graph.node(
        "SetHookKeyframes", hooks=[hooks, 0], hook_kf=link["prev_hook_kf"]
    )
    return nodes


HOOKS = {
    "on one prompt": lambda runs: (
        {"hook": runs.hook(A, 0.8), "hooked": runs.hooked("hook")},
        {"positive": ["hooked", 0]},
    ),
    "on both prompts": lambda runs: (
        {
            "hook": runs.hook(A, 0.8),
            "hooked": runs.hooked("hook"),
            "other": runs.hooked("hook", "negative"),
        },
        {"positive": ["hooked", 0], "negative": ["other", 0]},
    ),
    "two different": lambda runs: (
        {
            "hook": runs.hook(A, 0.8),
            "second": runs.hook(B, -0.5),
            "hooked": runs.hooked("hook"),
            "other": runs.hooked("second", "negative"),
        },
        {"positive": ["hooked", 0], "negative": ["other", 0]},
    ),
    "combined": lambda runs: (
        {
            "hook": runs.hook(A, 0.8),
            "second": runs.hook(B, -0.5, prev_hooks=["hook", 0]),
            "hooked": runs.hooked("second"),
        },
        {"positive": ["hooked", 0]},
    ),
    "keyframes": lambda runs: (
        {
            "hook": runs.hook(A, 0.8),
            **keyframes(runs, "hook", 1.0, 0.25),
            "hooked": runs.hooked("frames"),
        },
        {"positive": ["hooked", 0]},
    ),
    "keyframes from none": lambda runs: (
        {
            "hook": runs.hook(A, 0.8),
            **keyframes(runs, "hook", 0.0, 1.0, 0.0),
            "hooked": runs.hooked("frames"),
        },
        {"positive": ["hooked", 0]},
    ),
    "model only": lambda runs: (
        {
            "hook": runs.graph.node("CreateHookLoraModelOnly", lora_name=A, strength_model=0.8),
            "hooked": runs.hooked("hook"),
        },
        {"positive": ["hooked", 0]},
    ),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["alone", "and a loader"])
@pytest.mark.parametrize("case", HOOKS)
def test_hooks_equal_the_dense_model(runs, case, loaded, caplog):
    nodes, links = HOOKS[case](runs)
    model = ("model", 0)
    if loaded:
        nodes["lora"], model = runs.load(C, 0.6), ("lora", 0)
    base = runs.latent({})
    without = runs.latent({"lora": runs.load(C, 0.6)}, ("lora", 0)) if loaded else base
    found, expected = runs.both(nodes, model, **links)
    assert error(found, expected) < CLOSE
    assert error(found, without) > EFFECT
    assert torch.equal(runs.latent({}), base)
    assert [r.getMessage() for r in caplog.records if r.name == "qwenlora"] == []


def test_a_hook_is_gone_in_the_next_run(runs):
    base = runs.latent({})
    nodes, links = HOOKS["two different"](runs)
    hooked = runs.latent(nodes, **links)
    transformer = runs.given.model.diffusion_model
    assert torch.equal(runs.latent({}), base)
    assert read_state(transformer) is EMPTY
    assert torch.equal(runs.latent(nodes, **links), hooked)


def test_two_hooks_in_turns_compose_each_set_once_a_step(runs, composed):
    nodes, links = HOOKS["two different"](runs)
    runs.latent(nodes, **links)
    # Four steps of two prompts each.
    assert [wanted.names for wanted in composed] == [("a",), ("b",)] * 4
    assert len({wanted.key for wanted in composed}) == 2


def test_a_hook_is_the_same_lora_in_each_run(runs):
    """Nothing more is kept after the last run than after the second."""
    nodes, links = HOOKS["two different"](runs)
    kept = []
    for _ in range(4):
        runs.sources["latent"] = runs.graph.source(runs.bench.qwen.empty_latent())
        runs.latent(nodes, **links)
        kept.append(qwenlora.cache.pieces.nbytes)
    assert len(set(kept[1:])) == 1


# ---- saving ----


def test_a_model_is_saved_as_its_base(runs, host, caplog):
    """Whatever is composed at that moment, and without the names that are not there."""
    runs.latent({"lora": runs.load(A, 0.7)}, ("lora", 0))
    nodes = {
        "lora": runs.load(A, 0.7),
        "save": runs.graph.node("ModelSave", model=["lora", 0], filename_prefix="saved"),
    }
    done = runs.graph.run(runs.prompt(nodes))
    assert done.success, done.error
    (path,) = (host.base / "output").glob("saved*.safetensors")
    saved = tensors_of(path)
    path.unlink()
    runs.latent({})
    base = runs.given.model.state_dict_for_saving()
    assert saved.keys() == base.keys()
    assert all(torch.equal(saved[name], base[name]) for name in base)
    assert "saved without its LoRAs" in caplog.text


# ---- sizes ----


def test_sizes_are_the_model_and_what_its_stack_adds(enabled, emulated_qwen, files):
    bare = emulated_qwen.model_size()
    assert enabled.model_size() == bare
    model = load_directly(load_directly(enabled, A), B)
    wanted = native().wanted_set(model)
    added = qwenlora.compose.planning.plan_report(
        emulated_qwen.model.diffusion_model, wanted
    ).added_bytes
    assert added > 0
    for own in (model, model.clone(), model.clone().clone()):
        assert own.model_size() == bare + added
    assert enabled.model_size() == emulated_qwen.model_size() == bare


def test_the_size_of_hooks_is_announced_while_they_run(runs, monkeypatch):
    sizes = []
    patcher = node_module("native.patcher").NativeLoras
    prepared = importlib.import_module("comfy.model_management").load_models_gpu
    helpers = importlib.import_module("comfy.sampler_helpers")

    def seeing(models, *args, **kwargs):
        sizes.append(next(m for m in models if isinstance(m, patcher)).model_size())
        return prepared(models, *args, **kwargs)

    monkeypatch.setattr(helpers.comfy.model_management, "load_models_gpu", seeing)
    base = runs.latent({})
    nodes, links = HOOKS["combined"](runs)
    runs.latent(nodes, **links)
    stock = {"one": runs.load(A, 0.8), "two": runs.load(B, -0.5, ("one", 0))}
    runs.latent(stock, ("two", 0))
    assert torch.equal(runs.latent({"again": runs.ours(A, 0.0)}, ("again", 0)), base)
    assert sizes[1] == sizes[2] > sizes[0]


# ---- what cannot work ----


MERGES = {
    "ModelMergeSimple": {"ratio": 0.5},
    "ModelMergeAdd": {},
    "ModelMergeSubtract": {"multiplier": 1.0},
    "ModelMergeBlocks": {"input": 1.0, "middle": 1.0, "out": 1.0},
}


@pytest.mark.parametrize("node", MERGES)
@pytest.mark.parametrize("place", [1, 2])
def test_merging_is_refused_at_its_node(runs, node, place):
    links = {1: ["loaded", 0], 2: ["loaded", 0], place: ["model", 0]}
    models = {f"model{number}": link for number, link in links.items()}
    nodes = {"merge": runs.graph.node(node, **models, **MERGES[node])}
    done = runs.done(nodes, ("merge", 0))
    assert not done.success
    assert done.error["node_id"] == "merge"
    assert "models cannot be merged" in done.error["exception_message"]


def test_extraction_is_refused_at_its_node(runs):
    inputs = {"filename_prefix": "x", "rank": 8, "lora_type": "standard", "bias_diff": False}
    nodes = {"save": runs.graph.node("LoraSave", model_diff=["model", 0], **inputs)}
    done = runs.graph.run(runs.prompt(nodes))
    assert not done.success
    assert done.error["node_id"] == "save"
    assert "extracted" in done.error["exception_message"]


def test_a_model_as_a_hook_is_refused(runs, enabled):
    hooks = importlib.import_module("comfy.hooks")
    group = hooks.create_hook_model_as_lora(runs.given.model.state_dict(), None, 1.0, 1.0)
    target = hooks.create_target_dict(hooks.EnumWeightTarget.Model)
    with pytest.raises(UnsupportedModelError, match="models cannot be merged"):
        enabled.clone().register_all_hook_patches(group, target, {})


def test_the_bypass_loader_is_refused(enabled):
    """As ComfyUI from 0.11 on hands over what it puts into the model."""
    with pytest.raises(UnsupportedAdapterError, match="use `Load LoRA` instead"):
        enabled.clone().set_injections("bypass_lora", [])
    enabled.clone().set_injections("of another pack", [])


def test_another_packs_wrapper_behind_the_node_is_named(runs, enabled, files):
    """Its loader puts it into the model that all clones share."""
    model = load_directly(enabled, A)
    inner = model.model.diffusion_model
    wrapper = type("ComfyQwenImageWrapperLM", (torch.nn.Module,), {"forward": inner.forward})()
    wrapper.model, wrapper.dtype, wrapper.to_safely = inner, inner.dtype, inner.to_safely
    runs.given.model.diffusion_model = wrapper
    try:
        with pytest.raises(UnsupportedModelError, match="wrapped by another LoRA loader"):
            runs.bench.qwen.ksample(model)
    finally:
        runs.given.model.diffusion_model = inner


NAME = f"diffusion_model.{BLOCK}.attn.to_q.weight"
REFUSED = {
    "set": (NAME, ("set", (torch.ones(128, 128),))),
    "part of a weight": ((NAME, (0, 0, 64)), ("diff", (torch.ones(64, 128),))),
    "function of its own": ((NAME, None, abs), ("diff", (torch.ones(128, 128),))),
    "weight of another size": (NAME, ("diff", (torch.ones(9, 9), {"pad_weight": True}))),
    "patch without a tensor": (NAME, (None,)),
    "neither weight nor bias": (NAME.replace("to_q.weight", "to_qkv.qweight"), ("diff", (1,))),
    "form that is not known": (NAME, types.SimpleNamespace(name="oft", weights=(None,) * 4 + (1,))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_patches_that_cannot_be_applied_are_refused(enabled, what):
    key, value = REFUSED[what]
    model = enabled.clone()
    with pytest.raises(UnsupportedAdapterError, match=what) as caught:
        model.add_patches({key: value})
    assert "\n" not in str(caught.value)
    assert native().wanted_set(model) is None


def test_a_set_weight_in_a_file_is_refused_at_its_node(runs, host):
    save_file(
        {f"diffusion_model.{BLOCK}.attn.to_q.set_weight": torch.ones(128, 128)}, host.loras / A
    )
    done = runs.done({"lora": runs.load(A)}, ("lora", 0))
    assert not done.success
    assert done.error["node_id"] == "lora"
    assert "a patch of kind 'set' cannot be applied" in done.error["exception_message"]


# ---- the node ----


def test_enabling_again_gives_the_same_model(enabled):
    node = node_module("enable_node").QwenLoraEnable()
    again, report = node.enable(enabled)["result"]
    assert again is enabled
    assert report == "LoRA nodes of ComfyUI and of other packs work on this model"


def test_the_model_that_comes_in_is_unchanged(emulated_qwen, pack):
    before = dict(vars(emulated_qwen))
    names = list(emulated_qwen.model.state_dict())
    kind = type(emulated_qwen.model)
    model = native().enable(emulated_qwen)
    assert {k: v for k, v in vars(emulated_qwen).items() if k != "size"} == {
        k: v for k, v in before.items() if k != "size"
    }
    assert type(emulated_qwen.model) is kind
    assert list(emulated_qwen.model.state_dict()) == names
    assert isinstance(model, type(emulated_qwen))
    assert model.model.diffusion_model is emulated_qwen.model.diffusion_model


def test_the_report_names_files_that_other_nodes_loaded(runs):
    nodes = {
        "one": runs.load(A, 0.7),
        "two": runs.load(C, -0.4, ("one", 0)),
        "report": runs.enable(("two", 0)),
    }
    text = runs.value(nodes, ("report", 1))
    assert "a " in text
    assert "c " in text
    assert "native loader" not in text


def test_tensors_of_no_file_are_called_by_where_they_came_from(enabled, files):
    model = load_directly(load_directly(enabled, A), B)
    assert native().wanted_set(model).names == ("native loader (1)", "native loader (2)")


def test_a_loader_before_the_node_is_told_of(runs, caplog):
    nodes = {
        "early": runs.load(A, 1.0, ("loaded", 0)),
        "late": runs.enable(("early", 0)),
    }
    text = runs.value(nodes, ("late", 1))
    assert "put `Enable LoRA nodes (Nunchaku)` between" in text
    assert torch.equal(runs.latent(nodes, ("late", 0)), runs.latent({}))
    warnings = [r.getMessage() for r in caplog.records if r.name == "qwenlora"]
    assert len(warnings) == 1


def test_another_model_is_refused(pack, small_qwen):
    with pytest.raises(UnsupportedModelError, match="Nunchaku"):
        native().enable(small_qwen)


# ---- other patchers ----


def test_a_patcher_that_applies_patches_applies_none_twice(runs, bench, graph, emulated_qwen):
    """ComfyUI's own patcher over the same model: its `load` writes patches into plain layers."""
    patcher = importlib.import_module("comfy.model_patcher").ModelPatcher
    plain = patcher(emulated_qwen.model, emulated_qwen.load_device, emulated_qwen.offload_device)
    bench.sources["model"] = graph.source(plain)
    found, expected = runs.both({"lora": runs.load(A, 0.7)}, ("lora", 0))
    assert error(found, expected) < CLOSE
    nodes, links = HOOKS["two different"](runs)
    found, expected = runs.both(nodes, **links)
    assert error(found, expected) < CLOSE
    assert plain.patches == {}


def test_the_set_is_where_our_nodes_look_for_it(enabled, files):
    model = load_directly(enabled, A)
    assert model.model_options["transformer_options"][OPTIONS_KEY] is native().wanted_set(model)
    assert model.patches == {}
