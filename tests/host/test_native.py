"""ComfyUI's own LoRA nodes and hooks on an enabled Nunchaku model, against the dense model."""

from __future__ import annotations

import pytest
import torch

from . import test_nodes
from .test_nodes import A, B

# The fixtures of the nodes' own tests.
bench, files, pack = test_nodes.bench, test_nodes.files, test_nodes.pack

CLOSE = 1e-5
"""Between the emulated model in exact precision and the dense one, relative, float32."""


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Runs:
    """Samples one graph on the enabled model and on its dense twin."""

    def __init__(self, bench, graph, dense):
        self.bench, self.graph, self.seed = bench, graph, 0
        self.sources = bench.sources | {"no clip": graph.source(None)}
        self.dense = graph.source(dense)
        self.enable = graph.node("QwenLoraEnable", model=["loaded", 0])

    def sampler(self, model, **links):
        conds = {"positive": ["positive", 0], "negative": ["negative", 0]} | links
        return self.graph.node(
            "KSampler",
            model=model,
            latent_image=["latent", 0],
            seed=5,
            steps=3,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
            **conds,
        )

    def latent(self, nodes, model=("model", 0), *, dense=False, **links):
        """The result; `model` is what nodes link to as `["model", 0]`."""
        prompt = self.sources | nodes
        if dense:
            prompt["model"] = self.dense
        else:
            prompt |= {"loaded": self.bench.sources["model"], "model": self.enable}
        prompt["sampler"] = self.sampler(list(model), **links)
        prompt["out"] = self.graph.sink("out", ["sampler", 0])
        done = self.graph.run(prompt)
        assert done.success, done.error
        return done.values["out"]["samples"]

    def both(self, nodes, model=("model", 0), **links):
        return tuple(self.latent(nodes, model, dense=dense, **links) for dense in (False, True))

    def load(self, name, strength=1.0, model=("model", 0)):
        return self.graph.node(
            "LoraLoaderModelOnly", model=list(model), lora_name=name, strength_model=strength
        )


@pytest.fixture
def runs(bench, graph, small_qwen):
    return Runs(bench, graph, small_qwen)


def test_two_loaders_equal_the_dense_model(runs):
    base, dense_base = runs.both({})
    assert error(base, dense_base) < CLOSE
    nodes = {"one": runs.load(A, 0.7), "two": runs.load(B, -0.4, ("one", 0))}
    found, expected = runs.both(nodes, ("two", 0))
    assert error(found, expected) < CLOSE
    assert error(found, base) > 0.01
    assert torch.equal(runs.latent({}), base)
