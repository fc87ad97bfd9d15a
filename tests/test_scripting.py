"""Scripting with diffusers: a real QwenImagePipeline runs the emulated transformer."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

import qwenlora


@pytest.fixture
def pipeline(make_model):
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=make_model(num_layers=3),
    )


def latents(pipeline, steps=2):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 6, pipeline.transformer.config.joint_attention_dim, generator=generator)
    return pipeline(
        prompt_embeds=embeds,
        prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
        num_inference_steps=steps,
        height=32,
        width=32,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images


@pytest.fixture
def style(Draft, tmp_path):
    return Draft.full(seed=1).save(tmp_path / "style.safetensors")


def test_eager(pipeline, style):
    base = latents(pipeline)
    report = qwenlora.compose_loras(pipeline.transformer, (style, 0.8))
    changed = latents(pipeline)
    assert report.complete
    assert not torch.equal(changed, base)
    qwenlora.reset_loras(pipeline.transformer)
    assert torch.equal(latents(pipeline), base)


def test_lazy(pipeline, style):
    qwenlora.compose_loras(pipeline.transformer, (style, 0.8))
    expected = latents(pipeline)
    qwenlora.reset_loras(pipeline.transformer)
    wrapper = qwenlora.ComfyQwenImageWrapper.of(pipeline.transformer)
    wrapper.loras.append((style, 0.8))
    assert torch.equal(latents(pipeline), expected)
    # The wrapper may also take the transformer's place.
    assert wrapper.transformer is pipeline.transformer


@pytest.mark.parametrize("when", ["before", "after"])
def test_set_offload(pipeline, style, when):
    transformer = pipeline.transformer
    qwenlora.ComfyQwenImageWrapper.of(transformer)
    qwenlora.compose_loras(transformer, (style, 0.8))
    expected = latents(pipeline)
    if when == "before":
        qwenlora.reset_loras(transformer)
    transformer.set_offload(True, device="cpu")
    if when == "before":
        qwenlora.compose_loras(transformer, (style, 0.8))
    found = latents(pipeline)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.gpu
def test_model_cpu_offload(pipeline, style):
    """accelerate moves the whole transformer to the device for its forward, and back."""
    qwenlora.compose_loras(pipeline.transformer, (style, 0.8))
    expected = latents(pipeline)
    qwenlora.reset_loras(pipeline.transformer)
    pipeline.enable_model_cpu_offload()
    qwenlora.ComfyQwenImageWrapper.of(pipeline.transformer).loras.append((style, 0.8))
    found = latents(pipeline).cpu()
    assert (found - expected).norm() <= 1e-3 * expected.norm()
