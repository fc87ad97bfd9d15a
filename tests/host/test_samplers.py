"""Samplers and stages of a real ComfyUI: every stage gets the set of its own clone."""

from __future__ import annotations

import pytest
import torch

import qwenlora
from qwenlora import ComfyQwenImageWrapper, LoraSet
from qwenlora.runtime import OPTIONS_KEY

BLOCKS = 2
STEPS = 4
SWITCH = 2
SAMPLERS = ["euler", "heun", "dpmpp_2m", "lcm", "uni_pc"]


@pytest.fixture
def two(Draft, tmp_path):
    """Two LoRAs that overlap."""
    files = []
    for seed, own in ((1, "attn.to_k"), (2, "txt_mod.1")):
        draft = Draft(seed).add("proj_out", 4)
        for block in range(BLOCKS):
            for name in ("attn.to_q", "img_mlp.net.0.proj", own):
                draft.add(f"transformer_blocks.{block}.{name}", 4 * seed)
        files.append(draft.save(tmp_path / f"{seed}.safetensors"))
    return files


@pytest.fixture
def loaded(emulated_qwen):
    """A loaded model whose transformer has a runtime."""
    ComfyQwenImageWrapper.of(emulated_qwen.model.diffusion_model)
    return emulated_qwen


@pytest.fixture
def stage(host, qwen):
    """Do what KSampler (Advanced) does with steps `begin` to `end`."""
    import nodes

    def run(model, latent, begin, end, sampler):
        with torch.inference_mode():
            (result,) = nodes.KSamplerAdvanced().sample(
                model,
                "enable" if begin == 0 else "disable",
                3,
                STEPS,
                2.0,
                sampler,
                "simple",
                qwen.conditioning(1),
                qwen.conditioning(2, tokens=3),
                latent,
                begin,
                end,
                "enable" if end < STEPS else "disable",
            )
        return result

    return run


@pytest.fixture
def staged(stage, qwen):
    """Sample in two stages, the first by one model and the last by another."""

    def run(first, last, sampler="euler"):
        half = stage(first, qwen.empty_latent(), 0, SWITCH, sampler)
        return stage(last, half, SWITCH, STEPS, sampler)["samples"]

    return run


def branch(patcher, loras=()):
    """A clone that asks for a stack, as a node makes it."""
    clone = patcher.clone()
    clone.model_options["transformer_options"][OPTIONS_KEY] = LoraSet.of(loras)
    return clone


@pytest.fixture
def fresh(small_qwen, nunchaku):
    """A model that never saw anything else; its stack is composed beforehand."""
    models = {}

    def make(loras=()):
        if str(loras) not in models:
            models[str(loras)] = model = nunchaku.emulated_qwen(small_qwen)
            qwenlora.compose_loras(model.model.diffusion_model, loras)
        return models[str(loras)]

    return make


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_set_for_the_first_steps_and_another_for_the_last(
    loaded, two, fresh, staged, composed, sampler
):
    first, last = two
    expected = staged(fresh(first), fresh(last), sampler)
    assert not torch.equal(expected, staged(fresh(last), fresh(last), sampler))
    assert not torch.equal(expected, staged(fresh(first), fresh(first), sampler))
    branches = [branch(loaded, path) for path in two]
    for runs in (1, 2):
        assert torch.equal(staged(*branches, sampler), expected)
        assert len(composed) == 2 * runs  # once a stage, however often a step calls the model
    bare = staged(fresh(), fresh(last), sampler)
    assert torch.equal(staged(loaded, branches[1], sampler), bare)
    bare = staged(fresh(first), fresh(), sampler)
    assert torch.equal(staged(branches[0], loaded, sampler), bare)


def test_a_set_of_its_own_for_every_step(loaded, qwen, two, fresh, stage):
    stacks = [two[0], two[1], (), two]
    outcomes = []
    for models in (
        [branch(loaded, stack) for stack in stacks],
        [fresh(stack) for stack in stacks],
    ):
        latent = qwen.empty_latent()
        for step, model in enumerate(models):
            latent = stage(model, latent, step, step + 1, "euler")
        outcomes.append(latent["samples"])
    assert torch.equal(*outcomes)


def test_an_image_refined_by_another_set(loaded, qwen, two, fresh):
    # The second stage of an upscaling graph: a new size, another set, part of the noise.
    outcomes = []
    for first, last in (
        [branch(loaded, path) for path in two],
        [fresh(path) for path in two],
    ):
        image = qwen.ksample(first, sampler="dpmpp_2m")
        larger = torch.nn.functional.interpolate(image[:, :, 0], size=(12, 10))
        outcomes.append(qwen.ksample(last, latent={"samples": larger}, denoise=0.5, seed=4))
    assert torch.equal(*outcomes)


def test_two_stages_in_one_graph(graph, loaded, qwen, two, fresh, staged):
    def advanced(model, latent, begin, end, last):
        return graph.node(
            "KSamplerAdvanced",
            model=[model, 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=[latent, 0],
            add_noise="disable" if last else "enable",
            noise_seed=3,
            steps=STEPS,
            cfg=2.0,
            sampler_name="dpmpp_2m",
            scheduler="simple",
            start_at_step=begin,
            end_at_step=end,
            return_with_leftover_noise="disable" if last else "enable",
        )

    prompt = {
        "first": graph.source(branch(loaded, two[0])),
        "last": graph.source(branch(loaded, two[1])),
        "positive": graph.source(qwen.conditioning(1)),
        "negative": graph.source(qwen.conditioning(2, tokens=3)),
        "empty": graph.source(qwen.empty_latent()),
        "half": advanced("first", "empty", 0, SWITCH, False),
        "whole": advanced("last", "half", SWITCH, STEPS, True),
        "out": graph.sink("latent", ["whole", 0]),
    }
    expected = staged(fresh(two[0]), fresh(two[1]), "dpmpp_2m")
    done = graph.run(prompt)
    assert done.success, done.error
    assert torch.equal(done.values["latent"]["samples"], expected)
    # The first stage is kept by the host: only the last one runs, on a model that has its set.
    bypassed = staged(fresh(two[0]), fresh(), "dpmpp_2m")
    prompt["last"] = graph.source(loaded)
    again = graph.run(prompt)
    assert again.success, again.error
    assert "half" in again.cached
    assert torch.equal(again.values["latent"]["samples"], bypassed)
