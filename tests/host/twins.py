"""One graph on two models: dense by ComfyUI alone, and its packed twin behind `QwenLoraEnable`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .comfy_host import Execution, Graph, Prompt

CLOSE = 1e-5
"""Largest error of the packed twin's latents against the dense one's; both are about 1."""
VISIBLE = 0.05
"""Least change of latents that LoRAs must make for a comparison to say something."""

Step = tuple[str, dict[str, Any]]
"""A node in the way of a MODEL: its class and what it takes besides the model."""
Link = list[Any]

ENABLE: Step = ("QwenLoraEnable", {})


def native(name: str, strength: float = 1.0) -> Step:
    """ComfyUI's own loader of a LoRA."""
    return "LoraLoaderModelOnly", {"lora_name": name, "strength_model": strength}


def native_with_clip(name: str, strength: float = 1.0) -> Step:
    """ComfyUI's loader for model and text encoder, where no text encoder is there."""
    inputs = {"lora_name": name, "strength_model": strength, "strength_clip": 1.0}
    return "LoraLoader", {**inputs, "clip": ["no clip", 0]}


def ours(name: str, strength: float = 1.0) -> Step:
    """Our loader of a LoRA; on the dense twin ComfyUI's own stands for it."""
    return "QwenLoraLoader", {"lora_name": name, "strength": strength}


class Twins:
    """Runs graphs on both models; what is kept from run to run is kept for each.

    Attributes:
        dense: A model of ComfyUI's own layers, patched by ComfyUI alone.
        packed: The same weights in emulated Nunchaku layers.
        seed: Noise of the next sampling.
    """

    def __init__(self, graph: Graph, small: Any, dense: ModelPatcher, packed: ModelPatcher) -> None:
        self.graph, self.dense, self.packed = graph, dense, packed
        self.seed = 5
        self.sources = {
            "dense": graph.source(dense),
            "packed": graph.source(packed),
            "positive": graph.source(small.conditioning(1)),
            "negative": graph.source(small.conditioning(2)),
            "other": graph.source(small.conditioning(3, tokens=7)),
            "latent": graph.source({"samples": torch.zeros(1, 16, 8, 8)}),
            "no clip": graph.source(None),
        }

    # ---- parts of a graph ----

    def hook(self, name: str, strength: float = 1.0, prev: Link | None = None) -> dict[str, Any]:
        """A LoRA as a hook, on top of the hooks of another."""
        chained = {} if prev is None else {"prev_hooks": prev}
        inputs = {"lora_name": name, "strength_model": strength}
        return self.graph.node("CreateHookLoraModelOnly", **inputs, **chained)

    def hooked(self, cond: str, hooks: Link, **inputs: Any) -> dict[str, Any]:
        """A prompt with hooks."""
        options = {"strength": 1.0, "set_cond_area": "default", **inputs}
        node = "ConditioningSetProperties"
        return self.graph.node(node, cond_NEW=[cond, 0], hooks=hooks, **options)

    def keyframes(self, name: str, *frames: tuple[float, float]) -> Prompt:
        """Nodes of keyframes `(begin, factor)`; the last one is called `name`."""
        made: Prompt = {}
        link = {}
        for index, (begin, factor) in enumerate(frames):
            node = name if index == len(frames) - 1 else f"{name} {index}"
            inputs = {"strength_mult": factor, "start_percent": begin}
            made[node] = self.graph.node("CreateHookKeyframe", **inputs, **link)
            link = {"prev_hook_kf": [node, 0]}
        return made

    def way(self, prefix: str, model: Link, chain: list[Step]) -> tuple[Prompt, Link]:
        """The nodes of a MODEL's way, and where it ends."""
        made: Prompt = {}
        for index, (node, inputs) in enumerate(chain):
            made[f"{prefix} {index}"] = self.graph.node(node, model=model, **inputs)
            model = [f"{prefix} {index}", 0]
        return made, model

    def ksampler(self, model: Link, **inputs: Any) -> dict[str, Any]:
        """ComfyUI's sampler: four steps of Euler with guidance."""
        given = {
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "latent_image": ["latent", 0],
            "seed": self.seed,
            "steps": 4,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        return self.graph.node("KSampler", model=model, **(given | inputs))

    # ---- runs ----

    def run(self, prompt: Prompt) -> Execution:
        """Run a graph that may link to the sources; every node must succeed."""
        done = self.graph.run(self.sources | prompt)
        assert done.success, done.error or done.node_errors
        return done

    def sample(
        self, source: str, chain: list[Step] = (), nodes: Prompt | None = None, **sampler: Any
    ) -> torch.Tensor:
        """Latents of one way through the executor; they are never those of an earlier run."""
        made, model = self.way(source, [source, 0], list(chain))
        prompt = {**(nodes or {}), **made, "sampler": self.ksampler(model, **sampler)}
        prompt["out"] = self.graph.sink("out", ["sampler", 0])
        # What the host has kept of the same sampling is not what a test is after.
        self.graph.executor.reset()
        return self.run(prompt).values["out"]["samples"]

    def dense_chain(self, chain: list[Step]) -> list[Step]:
        """What a way is on a dense model: ComfyUI's own loader for ours, nothing to enable."""
        made = []
        for node, inputs in chain:
            if node == "QwenLoraLoader":
                made.append(native(inputs["lora_name"], inputs["strength"]))
            elif node != ENABLE[0]:
                made.append((node, inputs))
        return made

    def agree(
        self, chain: list[Step] = (), nodes: Prompt | None = None, **sampler: Any
    ) -> torch.Tensor:
        """Assert that both twins give the same latents, not the base's; returns the packed one's.

        Args:
            chain: The MODEL's way behind `QwenLoraEnable`, unless it has that node itself.
            nodes: More nodes: hooks and prompts with them.
            **sampler: Inputs of `KSampler`.
        """
        chain = list(chain)
        enabled = chain if ENABLE in chain else [ENABLE, *chain]
        packed = self.sample("packed", enabled, nodes, **sampler)
        dense = self.sample("dense", self.dense_chain(chain), nodes, **sampler)
        plain = {k: v for k, v in sampler.items() if k not in ("positive", "negative")}
        base = self._base(**plain)
        assert error(dense, base) > VISIBLE
        assert error(packed, dense) <= CLOSE
        return packed

    def _base(self, **sampler: Any) -> torch.Tensor:
        """What the dense model gives without LoRAs; models of one kind and size are made alike."""
        config = self.dense.model.model_config
        key = (type(config).__name__, repr(config.unet_config), self.seed, repr(sampler))
        if key not in _BASES:
            _BASES[key] = self.sample("dense", **sampler)
        return _BASES[key]


_BASES: dict[tuple[Any, ...], torch.Tensor] = {}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
