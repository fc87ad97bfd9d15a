"""ComfyUI's own LoRA loaders and merging nodes before ours: said, never silent.

What they do behind ours is in `test_native.py`.
"""

from __future__ import annotations

import pytest
import torch

from . import test_nodes
from .test_nodes import A, B, load

# The fixtures of the nodes' own tests.
bench, files, pack = test_nodes.bench, test_nodes.files, test_nodes.pack


def warned(caplog):
    """Our warnings since the last call."""
    texts = [r.getMessage() for r in caplog.records if r.name == "qwenlora"]
    caplog.clear()
    return texts


class Runs:
    """Samples one MODEL through ComfyUI's own nodes for hooks."""

    def __init__(self, bench, graph):
        self.bench, self.graph, self.seed = bench, graph, 0

    def run(self, nodes, model, **links):
        graph = self.graph
        self.seed += 1
        conds = {"positive": ["positive", 0], "negative": ["negative", 0]} | links
        prompt = self.bench.sources | nodes
        prompt["sampler"] = graph.node(
            "KSampler",
            model=model,
            latent_image=["latent", 0],
            seed=self.seed,
            steps=3,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
            **conds,
        )
        prompt["out"] = graph.sink("out", ["sampler", 0])
        done = graph.run(prompt)
        assert done.success, done.error
        return done.values["out"]["samples"]

    def hook(self, name=A, **inputs):
        inputs = {"lora_name": name, "strength_model": 1.0, "strength_clip": 1.0, **inputs}
        return self.graph.node("CreateHookLora", **inputs)

    def cond(self, cond, hooks):
        return self.graph.node(
            "ConditioningSetProperties",
            cond_NEW=[cond, 0],
            strength=1.0,
            set_cond_area="default",
            hooks=[hooks, 0],
        )

    def ours(self, name=B):
        return self.graph.node("QwenLoraLoader", model=["model", 0], lora_name=name, strength=1.0)


@pytest.fixture
def runs(bench, graph):
    return Runs(bench, graph)


# ---- hooks ----


@pytest.mark.parametrize(
    "case", ["clip only", "plain layers alone", "text encoder", "none", "no node of ours"]
)
def test_what_is_no_loss_is_not_warned_of(runs, host, Draft, caplog, case):
    nodes = {"hook": runs.hook(), "hooked": runs.cond("positive", "hook"), "lora": runs.ours()}
    model = ["lora", 0]
    if case == "clip only":
        nodes["hook"]["inputs"]["strength_model"] = 0.0
    elif case == "plain layers alone":
        Draft(4).add("img_in", 4).add("proj_out", 4).save(host.loras / "plain.safetensors")
        nodes["hook"]["inputs"]["lora_name"] = "plain.safetensors"
    elif case == "text encoder":
        from safetensors.torch import save_file

        key = "text_encoder.model.layers.0.self_attn.q_proj.lora_{}.weight"
        tensors = {key.format(part): torch.ones(4, 4) for part in "AB"}
        save_file(tensors, str(host.loras / "encoder.safetensors"))
        nodes["hook"]["inputs"]["lora_name"] = "encoder.safetensors"
    elif case == "none":
        nodes["hooked"]["inputs"].pop("hooks")
    else:
        model = ["model", 0]
    runs.run(nodes, model, positive=["hooked", 0])
    assert warned(caplog) == []


def test_hooks_on_a_dense_model_are_none_of_ours(runs, graph, small_qwen, caplog):
    runs.run({"lora": runs.ours()}, ["lora", 0])
    nodes = {"hook": runs.hook(), "hooked": runs.cond("positive", "hook")}
    nodes["dense"] = graph.source(small_qwen)
    runs.run(nodes, ["dense", 0], positive=["hooked", 0])
    assert warned(caplog) == []


def test_our_loras_and_the_base_are_exact_after_a_hook(runs, bench, files):
    transformer = bench.model.model.diffusion_model
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    nodes = {"hook": runs.hook(), "hooked": runs.cond("positive", "hook"), "lora": runs.ours()}
    hooked = runs.run(nodes, ["lora", 0], positive=["hooked", 0])
    (model,) = bench.models(one=[load(B)])
    assert not torch.equal(hooked, bench.qwen.ksample(model, seed=1, steps=3))
    assert torch.equal(bench.qwen.ksample(model, seed=5, steps=2), bench.expected(files[B]))
    assert torch.equal(bench.qwen.ksample(bench.model, seed=5, steps=2), bench.expected())
    after = transformer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# ---- patches ----


def test_a_stock_loader_before_ours_is_in_the_report(bench, graph, caplog):
    prompt = bench.prompt(sample=False, one=[load(B)])
    prompt["stock"] = graph.node(
        "LoraLoaderModelOnly", model=["model", 0], lora_name=A, strength_model=1.0
    )
    prompt["one 0"]["inputs"]["model"] = ["stock", 0]
    prompt["report"] = graph.sink("report", ["one 0", 1])
    done = graph.run(prompt)
    assert done.success, done.error
    assert "have no effect on it" in done.values["report"].splitlines()[-1]
    assert len(warned(caplog)) == 1


@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "LoraLoader", "ModelMergeSimple"])
def test_stock_patches_before_ours_are_warned_of_once_for_each_change(
    runs, graph, emulated_qwen, caplog, node
):
    inputs = {"lora_name": A, "strength_model": 1.0, "strength_clip": 1.0, "clip": ["no clip", 0]}
    nodes = {"no clip": graph.source(None)}
    if node == "LoraLoaderModelOnly":
        inputs = {"lora_name": A, "strength_model": 1.0}
    elif node == "ModelMergeSimple":
        inputs = {"model2": ["other", 0], "ratio": 0.5}
        nodes = {"other": graph.source(emulated_qwen)}
    field = "model1" if node == "ModelMergeSimple" else "model"
    nodes |= {"stock": graph.node(node, **inputs), "lora": runs.ours()}
    nodes["stock"]["inputs"][field] = ["model", 0]
    nodes["lora"]["inputs"]["model"] = ["stock", 0]
    for again in (False, False, True):
        if again and node != "ModelMergeSimple":
            nodes["stock"]["inputs"]["strength_model"] = 0.5
        elif again:
            nodes["stock"]["inputs"]["ratio"] = 0.25
        runs.run(nodes, ["lora", 0])
    texts = warned(caplog)
    assert len(texts) == 2
    assert all("have no effect on it" in text for text in texts)
    assert all("put `Enable LoRA nodes (Nunchaku)` between" in text for text in texts)


def test_a_patcher_that_applies_patches_reaches_the_plain_layers(bench, graph, caplog):
    from comfy.model_patcher import ModelPatcher

    given = bench.model
    plain = ModelPatcher(given.model, given.load_device, given.offload_device)
    plain.add_patches({"diffusion_model.img_in.weight": (torch.zeros(1),)})
    bench.sources["model"] = graph.source(plain)
    bench.models(one=[load(B)])
    (text,) = warned(caplog)
    assert "reach its plain layers alone" in text


def test_a_stock_loader_of_strength_0_is_not_warned_of(runs, caplog):
    stock = {"model": ["model", 0], "lora_name": A, "strength_model": 0.0}
    nodes = {"stock": runs.graph.node("LoraLoaderModelOnly", **stock), "lora": runs.ours()}
    nodes["lora"]["inputs"]["model"] = ["stock", 0]
    runs.run(nodes, ["lora", 0])
    assert warned(caplog) == []


def test_of_a_file_of_blocks_alone_comfyui_says_itself_that_it_keeps_nothing(
    runs, host, Draft, caplog
):
    draft = Draft(4)
    draft.add("transformer_blocks.0.attn.to_q", 4).save(host.loras / "blocks.safetensors")
    stock = {"model": ["model", 0], "lora_name": "blocks.safetensors", "strength_model": 1.0}
    nodes = {"stock": runs.graph.node("LoraLoaderModelOnly", **stock), "lora": runs.ours()}
    nodes["lora"]["inputs"]["model"] = ["stock", 0]
    runs.run(nodes, ["lora", 0])
    assert "lora key not loaded" in caplog.text
