"""Real diffusers pipelines, tiny: one transformer dense, and emulated with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from qwenlora.emulation import EmulatedQwenImageTransformer, Precision, lite_transformer

WIDTH = 128
BLOCK_PATHS = ("attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0", "img_mlp.net.2")

ALL_PATHS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_{name}" for stream in ("img", "txt") for name in ("mod.1", "mlp.net.0.proj")),
    *("img_mlp.net.2", "txt_mlp.net.2"),
)
TOP_PATHS = ("img_in", "txt_in", "proj_out", "time_text_embed.timestep_embedder.linear_2")
_SIZES = {
    "mod.1": (WIDTH, 6 * WIDTH),
    "net.0.proj": (WIDTH, 4 * WIDTH),
    "net.2": (4 * WIDTH, WIDTH),
    "img_in": (64, WIDTH),
    "txt_in": (96, WIDTH),
    "proj_out": (WIDTH, 64),
}
"""(in, out) of what is not square, by the ends of paths."""


def dense_transformer(*, num_layers=2):
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=num_layers,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=96,
        axes_dims_rope=(16, 24, 24),
    )
    return model.eval().requires_grad_(False)


def tiny_vae():
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )


def emulated(dense):
    """Nunchaku's transformer, emulated."""
    return EmulatedQwenImageTransformer.from_diffusers(
        dense, rank=32, precision=Precision.EXACT, dtype=torch.float32
    )


def lite(dense):
    """diffusers' own transformer and 4-bit layers, kernels emulated."""
    return lite_transformer(dense, rank=32, precision=Precision.EXACT, dtype=torch.float32)


QUANTIZED = {"nunchaku": emulated, "diffusers": lite}


def pipeline_of(transformer, vae):
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline, **options) -> torch.Tensor:
    """The latent that two steps make."""
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt_embeds=torch.randn(1, 6, 96, generator=generator),
        prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
        num_inference_steps=2,
        height=32,
        width=32,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **options,
    ).images


def forward(transformer, **options) -> torch.Tensor:
    """What one forward makes of one fixed input."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 4, 64, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 96, generator=generator),
            timestep=torch.tensor([0.7]),
            img_shapes=[[(1, 2, 2)]],
            return_dict=False,
            **options,
        )[0]


def tensors(
    seed, *, rank=4, paths=BLOCK_PATHS, top=(), blocks=2, prefix="transformer."
) -> dict[str, Any]:
    """A LoRA under diffusers' keys, which changes the picture visibly."""
    generator = torch.Generator().manual_seed(seed)
    targets = [f"transformer_blocks.{block}.{path}" for block in range(blocks) for path in paths]
    found = {}
    for target in (*targets, *top):
        sizes = [own for end, own in _SIZES.items() if target.endswith(end)]
        inputs, outputs = sizes[0] if sizes else (WIDTH, WIDTH)
        down = torch.randn(rank, inputs, generator=generator)
        up = torch.randn(outputs, rank, generator=generator)
        found[f"{prefix}{target}.lora_A.weight"] = 0.4 * down
        found[f"{prefix}{target}.lora_B.weight"] = 0.4 * up
    return found


def relative_error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())
