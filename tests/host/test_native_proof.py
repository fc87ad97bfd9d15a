"""ComfyUI's own LoRA nodes behind `QwenLoraEnable`, in graphs as people make them.

Every graph runs twice through the host's executor: on a dense model, where ComfyUI alone does
everything, and on its packed twin.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from . import test_nodes, test_z_image
from .test_nodes import A, B, C
from .test_z_image import MODULES, anew, draft
from .twins import CLOSE, ENABLE, VISIBLE, Twins, error, native, native_with_clip, ours

# The fixtures of the nodes' own tests.
files, pack = test_nodes.files, test_nodes.pack
# Small models of Z-Image, made once.
untouched, made = test_z_image.untouched, test_z_image.made

HOOKED = {"positive": ["hooked", 0]}


@pytest.fixture
def twins(pack, files, graph, qwen, nunchaku):
    dense = qwen.small_qwen()
    return Twins(graph, qwen, dense, nunchaku.emulated_qwen(dense))


# ---- loaders ----


CHAINS = {
    "one": [native(A, 0.8)],
    "two": [native(A, 0.8), native(B, -0.5)],
    "with a text encoder's loader": [native_with_clip(A, 0.6), native(C, 0.5)],
    "the same file twice": [native(A, 0.75), native(A, -0.25)],
    "five": [native(A, 0.5), native(B, 0.3), native(C, -0.4), native(A, 0.1), native(B, 0.2)],
    "ours before": [ours(A, 0.8), native(B, 0.5)],
    "ours behind": [native(B, 0.5), ours(A, 0.8)],
    "ours between": [native(A, 0.5), ours(B, 0.5), native(C, 0.5)],
    "ours before the enabling node": [ours(A, 0.8), ENABLE, native(B, 0.5)],
    "enabled again": [ENABLE, native(A, 0.8), ENABLE, native(B, 0.5), ENABLE],
    "the same file by both": [native(A, 0.5), ours(A, 0.5)],
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_loaders(twins, chain):
    twins.agree(chain)


def test_our_loader_enables_what_is_behind_it(twins):
    packed = twins.sample("packed", [ours(A, 0.8), native(B, 0.5)])
    dense = twins.sample("dense", [native(A, 0.8), native(B, 0.5)])
    assert error(packed, dense) <= CLOSE


@pytest.mark.parametrize("chain", [[ENABLE], [ENABLE, native(A, 0.0)], [ENABLE, ENABLE]])
def test_nothing_to_load_is_the_base_bit_for_bit(twins, chain):
    assert torch.equal(twins.sample("packed", chain), twins.sample("packed"))


# ---- hooks ----


def test_a_hook_on_one_prompt(twins):
    nodes = {"hook": twins.hook(A, 0.8), "hooked": twins.hooked("positive", ["hook", 0])}
    twins.agree(nodes=nodes, **HOOKED)


@pytest.mark.parametrize("frames", [((0, 1), (0.5, 0.25)), ((0, 0), (0.25, 1), (0.75, 0))])
def test_keyframes(twins, frames):
    nodes = {
        "hook": twins.hook(A, 0.8),
        **twins.keyframes("frames", *frames),
        "scheduled": twins.graph.node("SetHookKeyframes", hooks=["hook", 0], hook_kf=["frames", 0]),
        "hooked": twins.hooked("positive", ["scheduled", 0]),
    }
    scheduled = twins.agree(nodes=nodes, **HOOKED)
    constant = nodes | {"hooked": twins.hooked("positive", ["hook", 0])}
    assert error(twins.sample("packed", [ENABLE], constant, **HOOKED), scheduled) > 0.01


def test_hooks_of_their_own_on_both_prompts(twins):
    nodes = {
        "hook": twins.hook(A, 0.8),
        "hooked": twins.hooked("positive", ["hook", 0]),
        "other hook": twins.hook(B, 0.6),
        "avoided": twins.hooked("negative", ["other hook", 0]),
    }
    twins.agree(nodes=nodes, **HOOKED, negative=["avoided", 0])


@pytest.mark.parametrize("chain", [[native(B, 0.5)], [ours(B, 0.5)], [ours(B, 0.5), native(C)]])
def test_a_hook_and_loaders(twins, chain):
    nodes = {"hook": twins.hook(A, 0.8), "hooked": twins.hooked("positive", ["hook", 0])}
    twins.agree(chain, nodes, **HOOKED)


def test_a_hook_of_a_file_that_is_loaded_too(twins):
    nodes = {"hook": twins.hook(A, -0.5), "hooked": twins.hooked("positive", ["hook", 0])}
    twins.agree([native(A, 0.5), ours(A, 0.25)], nodes, **HOOKED)


@pytest.mark.parametrize("node", ["chained", "combined"])
def test_hooks_together_on_one_prompt(twins, node):
    nodes = {"hook": twins.hook(A, 0.8), "more": twins.hook(B, 0.5)}
    if node == "chained":
        nodes["more"] = twins.hook(B, 0.5, ["hook", 0])
        nodes["both"] = nodes["more"]
        link = ["more", 0]
    else:
        hooks = {"hooks_A": ["hook", 0], "hooks_B": ["more", 0]}
        nodes["both"] = twins.graph.node("CombineHooks2", **hooks)
        link = ["both", 0]
    nodes["hooked"] = twins.hooked("positive", link)
    twins.agree(nodes=nodes, **HOOKED)


def test_prompts_with_and_without_hooks_in_one(twins):
    """Three prompts are one conditioning: two with hooks, the last where no other one is."""
    nodes = {
        "hook": twins.hook(A, 0.8),
        "other hook": twins.hook(B, 0.5),
        "first": twins.hooked("positive", ["hook", 0]),
        "second": twins.graph.node(
            "ConditioningSetPropertiesAndCombine",
            cond=["first", 0],
            cond_NEW=["other", 0],
            strength=0.7,
            set_cond_area="default",
            hooks=["other hook", 0],
        ),
        "hooked": twins.graph.node(
            "ConditioningCombine", conditioning_1=["second", 0], conditioning_2=["negative", 0]
        ),
    }
    twins.agree(nodes=nodes, **HOOKED)


def test_a_hook_for_a_part_of_the_steps(twins):
    nodes = {
        "hook": twins.hook(A, 0.8),
        "range": twins.graph.node("ConditioningTimestepsRange", start_percent=0.0, end_percent=0.5),
        "early": twins.hooked("positive", ["hook", 0], timesteps=["range", 0]),
        "late": twins.hooked("positive", None, timesteps=["range", 1]),
        "hooked": twins.graph.node(
            "ConditioningCombine", conditioning_1=["early", 0], conditioning_2=["late", 0]
        ),
    }
    del nodes["late"]["inputs"]["hooks"]
    twins.agree(nodes=nodes, **HOOKED)


def test_a_pair_of_prompts_with_one_hook(twins):
    nodes = {
        "hook": twins.hook(A, 0.8),
        "pair": twins.graph.node(
            "PairConditioningSetProperties",
            positive_NEW=["positive", 0],
            negative_NEW=["negative", 0],
            strength=1.0,
            set_cond_area="default",
            hooks=["hook", 0],
        ),
    }
    twins.agree(nodes=nodes, positive=["pair", 0], negative=["pair", 1])


# ---- samplers ----


def custom(twins, model, guider, **conds):
    """Nodes of `SamplerCustomAdvanced`, and where its latents come out."""
    node = twins.graph.node
    return {
        "guider": node(guider, model=model, **conds),
        "noise": node("RandomNoise", noise_seed=twins.seed),
        "solver": node("KSamplerSelect", sampler_name="dpmpp_2m"),
        "sigmas": node("BasicScheduler", model=model, scheduler="simple", steps=4, denoise=1.0),
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["solver", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }


GUIDERS = {
    "BasicGuider": {"conditioning": ["hooked", 0]},
    "CFGGuider": {"positive": ["hooked", 0], "negative": ["negative", 0], "cfg": 2.0},
    "DualCFGGuider": {
        "cond1": ["hooked", 0],
        "cond2": ["other", 0],
        "negative": ["negative", 0],
        "cfg_conds": 2.0,
        "cfg_cond2_negative": 1.5,
        "style": "regular",
    },
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_custom_samplers(twins, guider):
    nodes = {"hook": twins.hook(A, 0.8), "hooked": twins.hooked("positive", ["hook", 0])}
    chain = [ENABLE, native(B, 0.5), ours(C, -0.5)]
    found = {}
    for source, own in (("packed", chain), ("dense", twins.dense_chain(chain)), ("base", [])):
        made, model = twins.way(source, ["dense" if source == "base" else source, 0], own)
        prompt = {**nodes, **made, **custom(twins, model, guider, **GUIDERS[guider])}
        if source == "base":
            prompt["hooked"] = twins.sources["positive"]
        prompt["out"] = twins.graph.sink("out", ["sampler", 0])
        twins.graph.executor.reset()
        found[source] = twins.run(prompt).values["out"]["samples"]
    assert error(found["dense"], found["base"]) > VISIBLE
    assert error(found["packed"], found["dense"]) <= CLOSE


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "uni_pc", "heun"])
def test_samplers(twins, sampler):
    nodes = {"hook": twins.hook(A, 0.8), "hooked": twins.hooked("positive", ["hook", 0])}
    twins.agree([native(B, 0.5)], nodes, **HOOKED, sampler_name=sampler)


def test_two_stages_with_loras_of_their_own(twins):
    """The second stage of the same MODEL's way, one loader further."""

    def stages(source, first, second):
        made, early = twins.way(f"{source} first", [source, 0], first)
        more, late = twins.way(f"{source} second", early, second)
        conds = {"positive": ["positive", 0], "negative": ["negative", 0]}
        given = {"noise_seed": 5, "steps": 4, "cfg": 2.0, "sampler_name": "euler"}
        given |= {"scheduler": "simple"} | conds
        nodes = {
            "first": twins.graph.node(
                "KSamplerAdvanced",
                model=early,
                latent_image=["latent", 0],
                add_noise="enable",
                start_at_step=0,
                end_at_step=2,
                return_with_leftover_noise="enable",
                **given,
            ),
            "second": twins.graph.node(
                "KSamplerAdvanced",
                model=late,
                latent_image=["first", 0],
                add_noise="disable",
                start_at_step=2,
                end_at_step=100,
                return_with_leftover_noise="disable",
                **given,
            ),
        }
        prompt = made | more | nodes | {"out": twins.graph.sink("out", ["second", 0])}
        return twins.run(prompt).values["out"]["samples"]

    packed = stages("packed", [ENABLE, native(A, 0.8)], [native(B, 0.5)])
    dense = stages("dense", [native(A, 0.8)], [native(B, 0.5)])
    assert error(packed, dense) <= CLOSE
    assert error(dense, twins.sample("dense", [native(A, 0.8)])) > VISIBLE


SHIFT = ("ModelSamplingAuraFlow", {"shift": 3.1})
NORM = ("CFGNorm", {"strength": 0.9})


@pytest.mark.parametrize(
    "chain",
    [
        [SHIFT, NORM, ENABLE, native(A, 0.8)],
        [ENABLE, SHIFT, native(A, 0.8), NORM, native(B, 0.3)],
        [ours(A, 0.8), SHIFT, NORM, native(B, 0.3)],
    ],
)
def test_other_nodes_of_a_models_way(twins, chain):
    nodes = {"hook": twins.hook(C, 0.8), "hooked": twins.hooked("positive", ["hook", 0])}
    twins.agree(chain, nodes, **HOOKED)


def test_a_patcher_that_writes_patches_into_dense_layers(twins):
    """ComfyUI's own: what a loader gives is applied once there, too."""
    from comfy.model_patcher import ModelPatcher

    packed = twins.packed
    plain = ModelPatcher(packed.model, packed.load_device, packed.offload_device)
    twins.sources["packed"] = twins.graph.source(plain)
    base = twins.sample("packed")
    nodes = {"hook": twins.hook(C, 0.8), "hooked": twins.hooked("positive", ["hook", 0])}
    twins.agree([native(A, 0.8), ours(B, 0.5)], nodes, **HOOKED)
    assert torch.equal(twins.sample("packed"), base)


# ---- Z-Image ----

ALL, SOME = "z.safetensors", "some.safetensors"


@pytest.fixture
def z_twins(pack, graph, host, z_image, untouched, made):
    some = [name for name in MODULES if "to_k" in name or "w3" in name or "embedder" in name]
    for name, modules in ((ALL, MODULES), (SOME, some)):
        save_file(draft(modules, len(modules)), host.loras / name)
    # Dense layers beside packed ones: ComfyUI's loader and ours reach both.
    yield Twins(graph, z_image, anew(untouched), made(dense_refiners=True))
    for name in (ALL, SOME):
        (host.loras / name).unlink()


Z_CHAINS = {
    "one": [native(ALL, 0.4)],
    "two": [native(ALL, 0.4), native(SOME, -0.5)],
    "ours before": [ours(ALL, 0.4), native(SOME, 0.5)],
    "ours behind": [native(SOME, 0.5), ours(ALL, 0.4)],
    "before the enabling node": [native(SOME, 0.5), ENABLE, native(ALL, 0.4)],
    "on both sides": [native(SOME, 0.5), ours(ALL, 0.2), ENABLE, native(ALL, 0.4), ours(SOME, 0.1)],
}


@pytest.mark.parametrize("chain", Z_CHAINS.values(), ids=Z_CHAINS)
def test_loaders_on_z_image(z_twins, chain):
    base = z_twins.sample("packed")
    z_twins.agree(chain)
    assert torch.equal(z_twins.sample("packed"), base)
    assert torch.equal(z_twins.sample("packed", [ENABLE]), base)


def test_hooks_on_z_image(z_twins):
    base = z_twins.sample("packed")
    nodes = {
        "hook": z_twins.hook(ALL, 0.4),
        "hooked": z_twins.hooked("positive", ["hook", 0]),
        "other hook": z_twins.hook(SOME, 0.6),
        "avoided": z_twins.hooked("negative", ["other hook", 0]),
    }
    for chain in ([], [native(SOME, 0.5)], [ours(SOME, 0.5)], [native(SOME, 0.5), ENABLE]):
        z_twins.agree(chain, nodes, **HOOKED, negative=["avoided", 0])
        assert torch.equal(z_twins.sample("packed"), base)
