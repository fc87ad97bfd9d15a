"""The demo's last step: LoRAs by name, through a pipeline's own methods, on diffusers' layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwenlora.demo.expected import weighted_sum
from qwenlora.demo.extra import require
from qwenlora.demo.model import BASE_RANK
from qwenlora.emulation import Precision, lite_transformer
from qwenlora.pipeline.attach import attach

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.demo.expected import Deltas
    from qwenlora.demo.files import LoraFile

__all__ = ["PICTURE_BOUND", "Picture", "measure_pipeline"]

PICTURE_BOUND = 1e-5
"""Largest error of a picture's change that float32 explains: two steps of a whole model."""
_TEXT_TOKENS = 6


@dataclass(frozen=True)
class Picture:
    """What a pipeline made with LoRAs by name.

    Attributes:
        calls: The calls, as a script writes them.
        report: One line on what was composed.
        error: |measured - expected| / |expected - base| of the latents.
        is_base_again: Whether the latents are the base's bit for bit after the LoRAs are unloaded.
    """

    calls: Sequence[str]
    report: str
    error: float
    is_base_again: bool


def measure_pipeline(dense: Any, stack: Sequence[tuple[LoraFile, float]]) -> Picture:
    """Load LoRAs by name into a real `QwenImagePipeline`, and compare its latents.

    The transformer is diffusers' own, with its own classes of 4-bit layers. What is expected is the
    same pipeline's latents with the files' dense deltas in the weights of the dense model.

    Args:
        dense: The dense model; it is only read.
        stack: The files and their weights.

    Raises:
        ImportError: This diffusers has no such layers.
        MissingExtraError: diffusers lacks what a pipeline needs.
    """
    transformer = lite_transformer(
        dense, rank=BASE_RANK, precision=Precision.EXACT, dtype=torch.float32
    )
    pipeline = _pipeline(transformer)
    base = _latents(pipeline)
    merged = _merged(dense, weighted_sum((file.deltas, weight) for file, weight in stack))
    expected = _latents(_pipeline(merged))
    attach(pipeline)
    for file, _ in stack:
        pipeline.load_lora_weights(str(file.path), adapter_name=file.path.stem)
    names, weights = [file.path.stem for file, _ in stack], [weight for _, weight in stack]
    pipeline.set_adapters(names, weights)
    found = _latents(pipeline)
    report = pipeline.qwenlora.report.summary()
    pipeline.unload_lora_weights()
    calls = ["qwenlora.attach(pipeline)"]
    calls += [f'pipeline.load_lora_weights(path, adapter_name="{name}")' for name in names]
    calls.append(f"pipeline.set_adapters({names}, {weights})")
    return Picture(
        calls,
        report,
        float((found - expected).norm() / (expected - base).norm()),
        is_base_again=torch.equal(_latents(pipeline), base),
    )


def _merged(dense: Any, deltas: Deltas) -> Any:
    merged = copy.deepcopy(dense)
    for path, delta in deltas.items():
        weight = merged.get_submodule(path).weight
        weight.copy_(weight.double() + delta)
    return merged


def _pipeline(transformer: Any) -> Any:
    scheduler = require("diffusers", "FlowMatchEulerDiscreteScheduler")()
    kind = require("diffusers", "QwenImagePipeline")
    pipeline = kind(
        scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _latents(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    width = pipeline.transformer.config.joint_attention_dim
    latents: torch.Tensor = pipeline(
        prompt_embeds=torch.randn(1, _TEXT_TOKENS, width, generator=generator),
        prompt_embeds_mask=torch.ones(1, _TEXT_TOKENS, dtype=torch.long),
        num_inference_steps=2,
        height=64,
        width=64,
        true_cfg_scale=1.0,
        generator=generator,
        output_type="latent",
    ).images
    return latents
