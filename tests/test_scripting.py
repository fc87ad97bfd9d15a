"""Scripting with diffusers: a real QwenImagePipeline runs the emulated transformer."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

import qwenlora
from qwenlora import ComfyQwenImageWrapper, LoraSpec
from qwenlora.schedule import course_of


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


def latents(pipeline, steps=2, **options):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 6, pipeline.transformer.config.joint_attention_dim, generator=generator)
    device = pipeline._execution_device
    return pipeline(
        prompt_embeds=embeds.to(device),
        prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long, device=device),
        num_inference_steps=steps,
        height=32,
        width=32,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **options,
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


def test_a_schedule_follows_the_pipelines_scheduler(pipeline, style):
    """Against strengths that are composed by hand between the steps."""

    def strength(step):
        return 0.8 * (1 - 0.7 * min(step / 4 / 0.5, 1))

    def between(pipe, step, timestep, kwargs):
        qwenlora.compose_loras(pipe.transformer, (style, strength(step + 1)))
        return kwargs

    qwenlora.compose_loras(pipeline.transformer, (style, strength(0)))
    expected = latents(pipeline, steps=4, callback_on_step_end=between)
    qwenlora.reset_loras(pipeline.transformer)
    base = latents(pipeline, steps=4)
    wrapper = ComfyQwenImageWrapper.of(pipeline.transformer)
    wrapper.loras[:] = [LoraSpec(style, 0.8, schedule="0:1, 50%:0.3")]
    wrapper.course = course_of(pipeline.scheduler)
    for _ in range(2):
        assert torch.equal(latents(pipeline, steps=4), expected)
    wrapper.loras[:] = []
    assert torch.equal(latents(pipeline, steps=4), base)


def test_the_course_of_a_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    course = course_of(scheduler)
    scheduler.set_timesteps(4)
    shares = []
    sample = torch.zeros(1, 2)
    for timestep in scheduler.timesteps:
        shares.append(course())
        scheduler.step(sample, timestep, sample)
    assert shares == [0, 0.25, 0.5, 0.75]
    # From an image: the first step is not the schedule's first.
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert course() == 0.5
    with pytest.raises(TypeError, match="object has no `timesteps`: a scheduler of diffusers"):
        course_of(object())


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


@pytest.mark.gpu
def test_model_cpu_offload_between_two_stacks(pipeline, style, Draft, tmp_path):
    """Composing meets the transformer on the host, the forward runs it on the device."""
    other = Draft.full(seed=2, rank=8).save(tmp_path / "other.safetensors")
    stacks = [(style, 0.8), (other, -0.5), (style, 0.8)]
    expected = []
    for stack in stacks:
        qwenlora.compose_loras(pipeline.transformer, stack)
        expected.append(latents(pipeline))
    qwenlora.reset_loras(pipeline.transformer)
    base = latents(pipeline)
    pipeline.enable_model_cpu_offload()
    for stack, wanted in zip(stacks, expected, strict=True):
        qwenlora.compose_loras(pipeline.transformer, stack)
        assert (latents(pipeline).cpu() - wanted).norm() <= 1e-3 * wanted.norm()
    qwenlora.reset_loras(pipeline.transformer)
    assert (latents(pipeline).cpu() - base).norm() <= 1e-3 * base.norm()
    pipeline.maybe_free_model_hooks()
    assert all(tensor.device.type == "cpu" for tensor in pipeline.transformer.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("lazy", [False, True])
def test_offload_that_comes_with_the_stack(pipeline, Draft, tmp_path, lazy):
    """`ComposeOptions.offload` turns the model's own block offload on, on the device."""
    transformer = pipeline.transformer
    style = Draft.full(seed=1, blocks=3).save(tmp_path / "style.safetensors")
    base = latents(pipeline)
    qwenlora.compose_loras(transformer, (style, 0.8))
    expected = latents(pipeline)
    qwenlora.reset_loras(transformer)
    pipeline.to("cuda")
    options = qwenlora.ComposeOptions(offload=True)
    wrapper = qwenlora.ComfyQwenImageWrapper.of(transformer)
    if lazy:
        wrapper.options = options
        wrapper.loras.append((style, 0.8))
    else:
        qwenlora.compose_loras(transformer, (style, 0.8), options=options)
    for _ in range(2):
        found = latents(pipeline).cpu()
        assert (found - expected).norm() <= 1e-3 * expected.norm()
    assert transformer.offload
    assert wrapper.report.bus_bytes > 0
    manager, blocks = transformer.offload_manager, transformer.transformer_blocks
    assert manager.memory_stream is not None
    held = [t for block in blocks[1:] for t in (*block.parameters(), *block.buffers())]
    assert all(tensor.device.type == "cpu" for tensor in held)
    assert all(tensor.is_pinned() for tensor in held)
    if lazy:
        wrapper.loras[:] = []
    else:
        qwenlora.reset_loras(transformer)
    assert (latents(pipeline).cpu() - base).norm() <= 1e-3 * base.norm()
    assert transformer.offload_manager is manager
