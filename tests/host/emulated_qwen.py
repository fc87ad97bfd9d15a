"""ComfyUI's Qwen-Image over emulated Nunchaku leaves, built the way ComfyUI-nunchaku builds it.

The transformer derives from ComfyUI's and overrides `_forward` only, so that ComfyUI's `forward`
runs the DIFFUSION_MODEL wrappers round it; the patcher overrides `load` and `detach` only. Imports
ComfyUI: only a fixture that has started the host may import this module.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.ldm.flux.layers import EmbedND
from comfy.ldm.modules.attention import optimized_attention_masked
from comfy.ldm.qwen_image.model import (
    FeedForward,
    LastLayer,
    QwenImageTransformer2DModel,
    QwenTimestepProjEmbeddings,
    apply_rotary_emb,
)
from torch import nn

from qwenlora.emulation import AWQW4A16Linear, Precision, SVDQW4A4Linear, fused_gelu_mlp
from qwenlora.emulation.dense import load_dense_state
from qwenlora.emulation.offload import CPUOffloadManager
from qwenlora.packing.layout import MODULATION_PLANES

from .small_qwen import devices

NORM_EPSILON = 1e-6
MLP_RATIO = 4


def emulated_qwen(
    dense: comfy.model_patcher.ModelPatcher,
    *,
    rank: int = 32,
    precision: Precision = Precision.EXACT,
) -> EmulatedPatcher:
    """Convert a model of `small_qwen.small_qwen`; in EXACT precision it computes the same.

    Args:
        dense: The dense model; it is only read.
        rank: Rank of the base low-rank branches.
        precision: See `Precision`.
    """
    state = dense.model.diffusion_model.state_dict()
    sizes = dense.model.model_config.unet_config
    options = {**sizes, "scale_shift": 0, "rank": rank, "precision": precision}
    dtype = dense.model.diffusion_model.dtype
    key = (repr(options), dtype, _digest(state))
    if key not in _CONVERTED:
        config = EmulatedConfig(options)
        config.set_inference_dtype(dtype, None)
        made = config.get_model({}, "")
        load_dense_state(made.diffusion_model, state, torch.Generator().manual_seed(0))
        _CONVERTED[key] = made
    return EmulatedPatcher(copy.deepcopy(_CONVERTED[key]), **devices())


_CONVERTED: dict[tuple[Any, ...], nn.Module] = {}
"""Models that nobody runs, by what they were made of: each test has a copy."""


def _digest(state: dict[str, torch.Tensor]) -> bytes:
    """Of the names and the bytes of all tensors."""
    found = hashlib.blake2b()
    for name, tensor in state.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.digest()


class EmulatedPatcher(comfy.model_patcher.ModelPatcher):
    """Overrides what `NunchakuModelPatcher` overrides, and ignores what it ignores."""

    def load(
        self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False
    ):
        with self.use_ejected():
            self.model.diffusion_model.to_safely(device_to)

    def detach(self, unpatch_all: bool = True):
        self.eject_model()
        self.model.diffusion_model.to_safely(self.offload_device)


class EmulatedConfig(comfy.supported_models.QwenImage):
    """Model config whose model is an `EmulatedQwenImage`."""

    def get_model(self, state_dict, prefix="", device=None):
        return EmulatedQwenImage(self, device=device)


class EmulatedQwenImage(comfy.model_base.QwenImage):
    """ComfyUI's Qwen-Image round the emulated transformer."""

    def __init__(self, model_config, model_type=comfy.model_base.ModelType.FLUX, device=None):
        # Past the parent's constructor, which names the dense transformer.
        super(comfy.model_base.QwenImage, self).__init__(
            model_config, model_type, device=device, unet_model=EmulatedTransformer
        )
        self.memory_usage_factor_conds = ("ref_latents",)


class EmulatedFeedForward(FeedForward):
    """MLP whose linears run inside the fused function, never as modules."""

    def __init__(self, dim: int, **leaf: Any) -> None:
        nn.Module.__init__(self)
        first = nn.Module()
        first.proj = SVDQW4A4Linear(dim, MLP_RATIO * dim, **leaf)
        second = SVDQW4A4Linear(MLP_RATIO * dim, dim, act_unsigned=True, **leaf)
        self.net = nn.ModuleList([first, nn.Dropout(0.0), second])

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return fused_gelu_mlp(hidden_states, self.net[0].proj, self.net[2])


class EmulatedAttention(nn.Module):
    """Joint attention with fused projections."""

    def __init__(self, dim: int, heads: int, head_dim: int, norm: Any, **leaf: Any) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = norm(head_dim), norm(head_dim)
        self.norm_added_q, self.norm_added_k = norm(head_dim), norm(head_dim)
        self.to_qkv = SVDQW4A4Linear(dim, 3 * dim, **leaf)
        self.add_qkv_proj = SVDQW4A4Linear(dim, 3 * dim, **leaf)
        self.to_out = nn.ModuleList([SVDQW4A4Linear(dim, dim, **leaf), nn.Dropout(0.0)])
        self.to_add_out = SVDQW4A4Linear(dim, dim, **leaf)

    def forward(self, image, text, rotary):
        length = text.shape[1]
        image_query, image_key, image_value = self._heads(self.to_qkv(image))  # (B, S, H, D)
        text_query, text_key, text_value = self._heads(self.add_qkv_proj(text))  # (B, T, H, D)
        query = torch.cat([self.norm_added_q(text_query), self.norm_q(image_query)], dim=1)
        key = torch.cat([self.norm_added_k(text_key), self.norm_k(image_key)], dim=1)
        value = torch.cat([text_value, image_value], dim=1)
        joint = optimized_attention_masked(
            apply_rotary_emb(query, rotary).flatten(2),
            apply_rotary_emb(key, rotary).flatten(2),
            value.flatten(2),
            self.heads,
            None,
        )  # (B, T+S, C)
        image_output = self.to_out[1](self.to_out[0](joint[:, length:].contiguous()))
        return image_output, self.to_add_out(joint[:, :length].contiguous())

    def _heads(self, fused: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (self.heads, -1)) for part in fused.chunk(3, dim=-1)]


class EmulatedBlock(nn.Module):
    """One block; its modulation rows are interleaved as Nunchaku stores them."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, scale_shift: float, operations: Any, **leaf: Any
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        dtype, device = leaf["torch_dtype"], leaf["device"]

        def modulation() -> nn.Sequential:
            options = {key: leaf[key] for key in ("precision", "torch_dtype", "device")}
            return nn.Sequential(nn.SiLU(), AWQW4A16Linear(dim, MODULATION_PLANES * dim, **options))

        def norm() -> nn.Module:
            return operations.LayerNorm(
                dim, elementwise_affine=False, eps=NORM_EPSILON, dtype=dtype, device=device
            )

        def head_norm(size: int) -> nn.Module:
            return operations.RMSNorm(size, eps=NORM_EPSILON, dtype=dtype, device=device)

        self.img_mod, self.txt_mod = modulation(), modulation()
        self.img_norm1, self.img_norm2 = norm(), norm()
        self.img_mlp = EmulatedFeedForward(dim, **leaf)
        self.txt_norm1, self.txt_norm2 = norm(), norm()
        self.txt_mlp = EmulatedFeedForward(dim, **leaf)
        self.attn = EmulatedAttention(dim, heads, head_dim, head_norm, **leaf)

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        temb,
        image_rotary_emb=None,
    ):
        del encoder_hidden_states_mask  # ComfyUI-nunchaku does not use it either
        image, text = hidden_states, encoder_hidden_states
        image_first, image_second = self._modulations(self.img_mod(temb))
        text_first, text_second = self._modulations(self.txt_mod(temb))
        image_inner, image_gate = self._modulate(self.img_norm1(image), image_first)
        text_inner, text_gate = self._modulate(self.txt_norm1(text), text_first)
        image_inner, text_inner = self.attn(image_inner, text_inner, image_rotary_emb)
        image = image + image_gate * image_inner
        text = text + text_gate * text_inner
        image_inner, image_gate = self._modulate(self.img_norm2(image), image_second)
        text_inner, text_gate = self._modulate(self.txt_norm2(text), text_second)
        image = image + image_gate * self.img_mlp(image_inner)
        return text + text_gate * self.txt_mlp(text_inner), image

    @staticmethod
    def _modulations(raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # (B, C*6) interleaved => (B, 6*C) planes, then one half per norm
        planes = raw.view(raw.shape[0], -1, MODULATION_PLANES).transpose(1, 2)
        return planes.reshape(raw.shape[0], -1).chunk(2, dim=-1)

    def _modulate(self, x: torch.Tensor, half: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, scale, gate = (part.unsqueeze(1) for part in half.chunk(3, dim=-1))  # (B, 1, C)
        return x * (scale + self.scale_shift) + shift, gate


class EmulatedTransformer(QwenImageTransformer2DModel):
    """The transformer as ComfyUI-nunchaku has it, its block offload included.

    Attributes:
        offload: Whether `offload_manager` hands out the blocks.
        offload_manager: See `CPUOffloadManager`; missing until `set_offload` is first called.
    """

    offload = False
    offload_manager: CPUOffloadManager | None

    def __init__(
        self,
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=60,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=3584,
        axes_dims_rope=(16, 56, 56),
        image_model=None,
        dtype=None,
        device=None,
        operations=None,
        scale_shift=1.0,
        **leaf,
    ):
        nn.Module.__init__(self)
        del image_model
        placed = {"dtype": dtype, "device": device}
        self.dtype = dtype
        self.patch_size = patch_size
        self.out_channels = out_channels or in_channels
        self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.pe_embedder = EmbedND(
            dim=attention_head_dim, theta=10000, axes_dim=list(axes_dims_rope)
        )
        self.time_text_embed = QwenTimestepProjEmbeddings(
            embedding_dim=dim, pooled_projection_dim=768, operations=operations, **placed
        )
        self.txt_norm = operations.RMSNorm(joint_attention_dim, eps=NORM_EPSILON, **placed)
        self.img_in = operations.Linear(in_channels, dim, **placed)
        self.txt_in = operations.Linear(joint_attention_dim, dim, **placed)
        self.transformer_blocks = nn.ModuleList(
            EmulatedBlock(
                dim,
                num_attention_heads,
                attention_head_dim,
                scale_shift,
                operations,
                torch_dtype=dtype,
                device=device,
                **leaf,
            )
            for _ in range(num_layers)
        )
        self.norm_out = LastLayer(dim, dim, operations=operations, **placed)
        self.proj_out = operations.Linear(dim, patch_size**2 * self.out_channels, **placed)

    def to_safely(self, device):
        """Move, unless the blocks are offloaded."""
        return self if self.offload else self.to(device)

    def set_offload(self, offload: bool, **kwargs: Any) -> None:
        """Turn block offload on or off; `use_pin_memory` and `num_blocks_on_gpu` as there."""
        if offload == self.offload:
            return
        self.offload = offload
        resident = (self.img_in, self.txt_in, self.txt_norm, self.time_text_embed, self.norm_out)
        self.offload_manager = (
            CPUOffloadManager(
                self.transformer_blocks,
                use_pin_memory=kwargs.get("use_pin_memory", True),
                on_gpu_modules=[*resident, self.proj_out],
                num_blocks_on_gpu=kwargs.get("num_blocks_on_gpu", 1),
            )
            if offload
            else None
        )

    def _forward(
        self,
        x,
        timesteps,
        context,
        attention_mask=None,
        guidance=None,
        ref_latents=None,
        transformer_options={},  # noqa: B006 - the host's own signature
        control=None,
        **kwargs,
    ):
        del guidance, kwargs
        if self.offload:
            self.offload_manager.set_device(x.device)
        image, ids, padded = self.process_img(x)  # (B, S, 64), (B, S, 3)
        length = image.shape[1]
        for index, reference in enumerate(ref_latents or [], start=1):
            tokens, places, _ = self.process_img(reference, index=index)
            image, ids = torch.cat([image, tokens], dim=1), torch.cat([ids, places], dim=1)
        rotary = self._rotary(x, context.shape[1], ids)
        image = self.img_in(image)  # (B, S, C)
        text = self.txt_in(self.txt_norm(context))  # (B, T, C)
        temb = self.time_text_embed(timesteps, image)  # (B, C)
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        stream = torch.cuda.current_stream() if x.is_cuda else None
        if self.offload:
            self.offload_manager.initialize(stream)
        for index, block in enumerate(self.transformer_blocks):
            if self.offload:
                block = self.offload_manager.get_block(index)
            text, image = _run_block(
                block, replaced.get(("double_block", index)), text, image, temb, rotary
            )
            added = (control or {}).get("input", [])[index : index + 1]
            if added and added[0] is not None:
                image[:, : added[0].shape[1]] += added[0]
            if self.offload:
                self.offload_manager.step(stream)
        image = self.proj_out(self.norm_out(image, temb))[:, :length]  # (B, S, 64)
        batch, channels, _, height, width = padded
        image = image.view(batch, height // 2, width // 2, channels, 2, 2)
        image = image.permute(0, 3, 1, 4, 2, 5)  # (B, 16, H/2, 2, W/2, 2)
        return image.reshape(padded)[:, :, :, : x.shape[-2], : x.shape[-1]]

    def _rotary(self, x: torch.Tensor, length: int, image_ids: torch.Tensor) -> torch.Tensor:
        begin = round(max((side + 1) // self.patch_size // 2 for side in x.shape[-2:]))
        line = torch.arange(begin, begin + length, device=x.device)
        text_ids = line.reshape(1, -1, 1).repeat(x.shape[0], 1, 3)
        rotary = self.pe_embedder(torch.cat([text_ids, image_ids], dim=1))
        return rotary.squeeze(1).unsqueeze(2).to(x.dtype)


def _run_block(block, replacement, text, image, temb, rotary):
    def run(args: dict[str, Any]) -> dict[str, torch.Tensor]:
        new_text, new_image = block(
            hidden_states=args["img"],
            encoder_hidden_states=args["txt"],
            encoder_hidden_states_mask=None,
            temb=args["vec"],
            image_rotary_emb=args["pe"],
        )
        return {"txt": new_text, "img": new_image}

    args = {"img": image, "txt": text, "vec": temb, "pe": rotary}
    out = run(args) if replacement is None else replacement(args, {"original_block": run})
    return out["txt"], out["img"]
