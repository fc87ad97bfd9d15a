"""ComfyUI's own LoRA nodes behind `QwenLoraEnable`, in graphs as people make them.

Every graph runs twice through the host's executor: on a dense model, where ComfyUI alone does
everything, and on its packed twin.
"""

from __future__ import annotations

import gc

import pytest
import torch

from . import test_nodes
from .test_nodes import A, B, C
from .twins import ENABLE, Twins, error, native, native_with_clip, ours

# The fixtures of the nodes' own tests.
files, pack = test_nodes.files, test_nodes.pack

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
    assert error(packed, dense) <= 1e-5


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
        "scheduled": twins.graph.node(
            "SetHookKeyframes", hooks=["hook", 0], hook_kf=["frames", 0]
        ),
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
        "range": twins.graph.node(
            "ConditioningTimestepsRange", start_percent=0.0, end_percent=0.5
        ),
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
