"""Step caches beside the runtime: residuals of one stack never reach another's steps."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

import qwenlora
from qwenlora import ComfyQwenImageWrapper, LoraSet
from qwenlora.runtime import OPTIONS_KEY

BLOCKS = 4
ALWAYS = 100.0
"""A threshold under which every step after the first one takes the cached residuals."""


@pytest.fixture
def two(Draft, tmp_path):
    """Two LoRAs on the same slots of every block."""
    return [
        Draft.full(seed, rank=4, blocks=BLOCKS).save(tmp_path / f"{seed}.safetensors")
        for seed in (1, 2)
    ]


@pytest.fixture
def make(make_model):
    """Make the model that the tests compare: the same weights each time."""

    def made(loras=()):
        model = make_model(num_layers=BLOCKS)
        qwenlora.compose_loras(model, loras)
        return model

    return made


@pytest.fixture
def lazy(make):
    """A model with a runtime."""
    model = make()
    ComfyQwenImageWrapper.of(model)
    return model


@pytest.fixture
def forward(probe):
    """Call a model as a host does, its set in the options."""

    def run(model, loras=()):
        return probe.output(model, transformer_options={OPTIONS_KEY: LoraSet.of(loras)})

    return run


def close(found, wanted):
    """Whether two outputs differ by rounding only: a residual is added back to what it was of."""
    return (found - wanted).norm() <= 1e-6 * wanted.norm()


# ---- contexts on the transformer ----


class Contexts:
    """What step caches keep on a transformer."""

    def __init__(self, model):
        self.model = model
        model._cache_context, model._prev_timestep = object(), 3.0

    def kept(self):
        return (self.model._cache_context, self.model._prev_timestep) != (None, None)


def test_contexts_are_kept_while_the_set_stays(lazy, forward, two):
    forward(lazy, two)
    contexts = Contexts(lazy)
    forward(lazy, two)
    assert contexts.kept()


@pytest.mark.parametrize("to", ["another", "strength", "order", "base"])
def test_contexts_are_forgotten_on_every_change(lazy, forward, two, to):
    forward(lazy, two)
    contexts = Contexts(lazy)
    forward(
        lazy,
        {
            "another": two[0],
            "strength": [two[0], (two[1], 0.5)],
            "order": two[::-1],
            "base": (),
        }[to],
    )
    assert not contexts.kept()


def test_contexts_are_forgotten_after_a_failed_change(lazy, forward, two):
    forward(lazy, two[0])
    contexts = Contexts(lazy)
    changed = LoraSet.of(two[1])
    two[1].write_bytes(two[1].read_bytes() + b" ")
    with pytest.raises(qwenlora.QwenLoraError):
        ComfyQwenImageWrapper.of(lazy).reconcile({OPTIONS_KEY: changed})
    # The stack that made them is still in place: they may stay, but only for its own steps.
    forward(lazy, two[0])
    assert contexts.kept()
    forward(lazy, ())
    assert not contexts.kept()


@pytest.mark.parametrize("runtime", [True, False])
def test_contexts_are_forgotten_on_an_eager_change(make, probe, two, runtime):
    model = make()
    if runtime:
        ComfyQwenImageWrapper.of(model)
    for loras in (two[0], two[1], []):
        contexts = Contexts(model)
        qwenlora.compose_loras(model, loras)
        probe.output(model)
        assert not contexts.kept()


# ---- cache-dit ----


@pytest.fixture
def cached(monkeypatch):
    """Let cache-dit run a model's blocks, without a pipeline: its contexts then live on."""
    if importlib.util.find_spec("cache_dit") is None:
        pytest.skip("needs cache-dit, not installed: uv pip install cache-dit")
    monkeypatch.setenv("CACHE_DIT_LOG_LEVEL", "error")
    import cache_dit
    from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern

    logging.getLogger("cache_dit").setLevel(logging.ERROR)

    def wrap(model, *, calibrator=None, **config):
        settings = {
            "Fn_compute_blocks": 1,
            "Bn_compute_blocks": 0,
            "max_warmup_steps": 0,
            "residual_diff_threshold": ALWAYS,
            "enable_separate_cfg": False,
        }
        adapter = BlockAdapter(
            transformer=model,
            blocks=model.transformer_blocks,
            forward_pattern=ForwardPattern.Pattern_1,
        )
        calibrated = {"calibrator_config": calibrator} if calibrator else {}
        cache_dit.enable_cache(
            adapter, cache_config=DBCacheConfig(**settings | config), **calibrated
        )
        return model

    return wrap


def cached_steps(model):
    """Steps of the present context that took cached residuals."""
    (name,) = model._context_names
    return model._context_manager.get_context(name).get_cached_steps()


def test_cache_dit_keeps_its_contexts_between_calls(lazy, forward, cached, two):
    # What the tests below need, and that the runtime leaves it alone while nothing changes.
    cached(lazy)
    for _ in range(3):
        forward(lazy, two)
    assert cached_steps(lazy) == [1, 2]


def test_a_runtime_after_cache_dit(make, forward, cached, two, probe):
    expected = probe.output(make(two[0]))
    model = cached(make())
    ComfyQwenImageWrapper.of(model)
    assert close(forward(model, two[0]), expected)


@pytest.mark.slow
def test_a_then_b_equals_fresh_b_with_cache_dit(lazy, make, forward, cached, two, probe):
    cached(lazy)
    for loras in (two[0], two[1], (), [two[0], (two[1], -0.5)], two[0]):
        expected = probe.output(make(loras))
        for _ in range(3):
            assert close(forward(lazy, loras), expected)
        assert cached_steps(lazy)[-1] == 2  # it does cache, from the change on


def test_stages_of_several_steps_with_cache_dit(make, forward, cached, two):
    def steps(model, loras, count):
        return [forward(model, loras) for _ in range(count)]

    staged = cached(make(), max_warmup_steps=1, num_inference_steps=8)
    ComfyQwenImageWrapper.of(staged)
    for _ in range(2):
        steps(staged, two[0], 4)
        found = steps(staged, two[1], 4)
        fresh = cached(make(), max_warmup_steps=1, num_inference_steps=8)
        ComfyQwenImageWrapper.of(fresh)
        for a, b in zip(found, steps(fresh, two[1], 4), strict=True):
            assert torch.equal(a, b)


def test_cache_dit_extrapolates_over_no_change(make, forward, cached, two, probe):
    from_steps = pytest.importorskip("cache_dit").TaylorSeerCalibratorConfig
    model = cached(make(), max_warmup_steps=2, calibrator=from_steps(taylorseer_order=1))
    ComfyQwenImageWrapper.of(model)
    for loras in (*two, ()):
        expected = probe.output(make(loras))
        for _ in range(4):
            assert close(forward(model, loras), expected)


def test_cache_dit_with_fixed_steps(make, forward, cached, two, probe):
    mask = {
        "steps_computation_mask": [1, 0, 0, 1, 0, 0],
        "steps_computation_policy": "static",
        "num_inference_steps": 6,
    }
    model = cached(make(), **mask)
    ComfyQwenImageWrapper.of(model)
    for loras in (*two, ()):
        expected = probe.output(make(loras))
        for _ in range(2):
            assert close(forward(model, loras), expected)


@pytest.mark.slow
def test_within_the_call_of_a_pipeline_with_cache_dit(make, forward, cached, two, probe):
    cached_by = pytest.importorskip("cache_dit")
    diffusers = pytest.importorskip("diffusers")

    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, transformer):
            super().__init__()
            self.transformer = transformer

        def __call__(self, stacks):
            return [forward(self.transformer, loras) for loras in stacks]

    model = make()
    ComfyQwenImageWrapper.of(model)
    pipeline = Pipeline(model)
    adapter = cached_by.BlockAdapter(
        pipe=pipeline,
        transformer=model,
        blocks=model.transformer_blocks,
        forward_pattern=cached_by.ForwardPattern.Pattern_1,
    )
    config = cached_by.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=0,
        residual_diff_threshold=ALWAYS,
        enable_separate_cfg=False,
    )
    cached_by.enable_cache(adapter, cache_config=config)
    stacks = [two[0], two[0], two[1], two[1], (), ()]
    for _ in range(2):
        for found, loras in zip(pipeline(stacks), stacks, strict=True):
            assert close(found, probe.output(make(loras)))
