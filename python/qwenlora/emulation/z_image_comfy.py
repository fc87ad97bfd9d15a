"""ComfyUI's Z-Image model as ComfyUI-nunchaku builds it, with diffusers' arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from qwenlora.emulation.fused_qkv import ROWS_PADDED, fused_qkv_norm_rotary
from qwenlora.emulation.z_image_layers import attend, split
from qwenlora.packing.rotation import pack_rotations, unpack_rotations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.emulation.linear import SVDQW4A4Linear

TOKENS_PADDED = 32
"""Image and caption are padded to a multiple of as many tokens each."""


@dataclass(frozen=True)
class ZImageOutput:
    """The result of `forward` with `return_dict=True`."""

    sample: list[Tensor]
    """One (channels, 1, height, width) per sample."""


class ComfyAttention(nn.Module):
    """Attention over one stream; query, key and value are the rows of one layer.

    Attributes:
        n_local_heads: Heads.
        n_local_kv_heads: As many.
        head_dim: Channels of a head.
    """

    def __init__(self, dense: Any, qkv: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.n_local_heads = self.n_local_kv_heads = dense.heads
        self.head_dim = dense.inner_dim // dense.heads
        self.qkv = qkv
        self.out = out
        # ComfyUI leaves their epsilon to PyTorch.
        self.q_norm = _comfy_norm(dense.norm_q, epsilon=None)
        self.k_norm = _comfy_norm(dense.norm_k, epsilon=None)

    def forward(
        self,
        x: Tensor,
        x_mask: Tensor | None,
        freqs_cis: Tensor,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        """Attend over (B, S, C) under rotations (B, S, 1, D/2, 2, 2)."""
        del transformer_options
        query, key, value = split(self.qkv(x), self.n_local_heads)
        query, key = _turned(self.q_norm(query), freqs_cis), _turned(self.k_norm(key), freqs_cis)
        projected: Tensor = self.out(attend(query, key, value, x_mask))
        return projected


class ComfyFusedAttention(ComfyAttention):
    """A function reads the tensors of `qkv`, `q_norm` and `k_norm`; none is called.

    As the pack's hooks do it, one brings rotations to the kernel's layout.
    """

    def __init__(self, dense: Any, qkv: nn.Module, out: nn.Module) -> None:
        super().__init__(dense, qkv, out)
        self.register_forward_pre_hook(_pack_rotations)

    def forward(
        self,
        x: Tensor,
        x_mask: Tensor | None,
        freqs_cis: Tensor,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        """See `ComfyAttention.forward`; rotations are packed, of S and more tokens."""
        del transformer_options
        qkv: Any = self.qkv
        sine, cosine = unpack_rotations(freqs_cis)[:, : x.shape[1]].unbind(-1)
        rotation = torch.complex(cosine, sine)  # (B, S, D/2)
        fused = fused_qkv_norm_rotary(x, qkv, self.q_norm.weight, self.k_norm.weight, rotation)
        query, key, value = split(fused, self.n_local_heads)
        projected: Tensor = self.out(attend(query, key, value, x_mask))
        return projected


def _pack_rotations(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook: packs the rotations, padded to whole blocks of rows."""
    x, mask, rotation, *rest = args
    sine_and_cosine = rotation[:, :, 0, :, 1]  # (B, S, D/2, 2)
    missing = -x.shape[1] % ROWS_PADDED
    padded = F.pad(sine_and_cosine, (0, 0, 0, 0, 0, missing))
    return x, mask, pack_rotations(padded), *rest


def _turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn (B, S, H, D) by matrices (B, S, 1, D/2, 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)  # (B, S, H, D/2, 2)
    turned: Tensor = rotation @ pairs[..., None]
    return turned.squeeze(-1).flatten(-2).to(x.dtype)


class ComfyFeedForward(nn.Module):
    """w2(silu(w1(x)) * w3(x)), each a layer of its own."""

    def __init__(self, w1: nn.Module, w2: nn.Module, w3: nn.Module) -> None:
        super().__init__()
        self.w1 = w1
        self.w2 = w2
        self.w3 = w3

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, C) to (B, S, C)."""
        projected: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return projected


class ComfyQuantizedFeedForward(nn.Module):
    """The same, with the rows of `w3` and then `w1` in one layer."""

    def __init__(self, w13: SVDQW4A4Linear, w2: SVDQW4A4Linear) -> None:
        super().__init__()
        self.w13 = w13
        self.w2 = w2

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, C) to (B, S, C)."""
        factor, gated = self.w13(x).chunk(2, dim=-1)
        projected: Tensor = self.w2(F.silu(gated) * factor)
        return projected


class ComfyZImageBlock(nn.Module):
    """One block; those of the captions have no modulation."""

    def __init__(self, dense: Any, attention: ComfyAttention, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm1 = _alike(dense.attention_norm1)
        self.ffn_norm1 = _alike(dense.ffn_norm1)
        self.attention_norm2 = _alike(dense.attention_norm2)
        self.ffn_norm2 = _alike(dense.ffn_norm2)
        self.modulation: bool = dense.modulation
        if self.modulation:
            self.adaLN_modulation = dense.adaLN_modulation

    def forward(
        self,
        x: Tensor,
        x_mask: Tensor | None,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        """Map (B, S, C) to (B, S, C), under a time embedding (B, T) where there is modulation."""
        scales: Sequence[Tensor | float] = (0.0, 0.0)
        gates: Sequence[Tensor | float] = (1.0, 1.0)
        if self.modulation:
            planes = self.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=-1)
            scales, gates = planes[0::2], [plane.tanh() for plane in planes[1::2]]
        attended = self.attention(
            self.attention_norm1(x) * (1 + scales[0]),
            x_mask,
            freqs_cis,
            transformer_options=transformer_options,
        )
        x = x + gates[0] * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x) * (1 + scales[1]))
        x = x + gates[1] * self.ffn_norm2(fed)
        return x


class ComfyZImageTransformer(nn.Module):
    """ComfyUI's names and order of modules, called as diffusers' model is.

    ComfyUI gives tensors of a batch, the time reversed, and expects the output negated. Here
    arguments and output are diffusers', so that outputs can be compared.

    Attributes:
        patch_size: Side of an image token in latent pixels.
        time_scale: Steps of a time of 1.
    """

    def __init__(self, dense: Any, blocks: dict[str, list[ComfyZImageBlock]]) -> None:
        super().__init__()
        (self.patch_size,) = dense.all_patch_size
        (key,) = dense.all_x_embedder
        self.time_scale: float = dense.t_scale
        self.rope_embedder = dense.rope_embedder
        self.x_embedder = dense.all_x_embedder[key]
        self.noise_refiner = nn.ModuleList(blocks["noise_refiner"])
        self.context_refiner = nn.ModuleList(blocks["context_refiner"])
        self.t_embedder = dense.t_embedder
        self.cap_embedder = nn.Sequential(_alike(dense.cap_embedder[0]), dense.cap_embedder[1])
        self.layers = nn.ModuleList(blocks["layers"])
        # What ComfyUI-nunchaku leaves of a norm that the model does not use.
        self.norm_final = None
        self.final_layer = dense.all_final_layer[key]
        self.x_pad_token = dense.x_pad_token
        self.cap_pad_token = dense.cap_pad_token

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        dtype: torch.dtype = self.x_embedder.weight.dtype
        return dtype

    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        cap_feats: list[Tensor],
        return_dict: bool = True,
        transformer_options: dict[str, Any] | None = None,
    ) -> ZImageOutput | tuple[list[Tensor]]:
        """Denoise.

        Args:
            x: One (channels, 1, height, width) latent per sample, all of one shape.
            t: (B,) times in [0, 1].
            cap_feats: One (T, cap_feat_dim) caption per sample, all of one length.
            return_dict: Whether to return a `ZImageOutput` or a tuple.
            transformer_options: Passed on to the blocks.

        Returns:
            `ZImageOutput` or a tuple of one list: latents as in `x`.
        """
        latents = torch.stack(x).squeeze(2)  # (B, c, height, width)
        rows, columns = (side // self.patch_size for side in latents.shape[2:])
        temb = self.t_embedder(t * self.time_scale).type_as(latents)  # (B, 256)
        image = self.x_embedder(self._patches(latents))  # (B, S, C)
        text = self.cap_embedder(torch.stack(cap_feats))  # (B, T, C)
        image, text = _padded(image, self.x_pad_token), _padded(text, self.cap_pad_token)
        rotation = self._rotations(image, text, rows, columns)  # (B, T+S, 1, D/2, 2, 2)
        length = text.shape[1]
        options = {"transformer_options": transformer_options}
        for block in self.context_refiner:
            text = block(text, None, rotation[:, :length].contiguous(), **options)
        for block in self.noise_refiner:
            image = block(image, None, rotation[:, length:].contiguous(), temb, **options)
        joined = torch.cat([text, image], dim=1)  # (B, T+S, C)
        for block in self.layers:
            joined = block(joined, None, rotation, temb, **options)
        tokens = self.final_layer(joined, c=temb)[:, length : length + rows * columns]
        sample = list(self._pixels(tokens, rows, columns))
        return ZImageOutput(sample) if return_dict else (sample,)

    def _patches(self, latents: Tensor) -> Tensor:
        side = self.patch_size
        # (B, c, rows, side, columns, side) => (B, rows, columns, side, side, c)
        batch, channels, height, width = latents.shape
        parts = latents.view(batch, channels, height // side, side, width // side, side)
        return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _pixels(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        side = self.patch_size
        parts = tokens.reshape(tokens.shape[0], rows, columns, side, side, -1)
        # (B, rows, columns, side, side, c) => (B, c, rows, side, columns, side)
        turned = parts.permute(0, 5, 1, 3, 2, 4)
        return turned.flatten(4).flatten(2, 3).unsqueeze(2)  # (B, c, 1, height, width)

    def _rotations(self, image: Tensor, text: Tensor, rows: int, columns: int) -> Tensor:
        length, device = text.shape[1], image.device
        text_ids = torch.zeros(length, 3, dtype=torch.int64, device=device)
        text_ids[:, 0] = torch.arange(length, device=device) + 1
        # Padding stands at the origin.
        image_ids = torch.zeros(image.shape[1], 3, dtype=torch.int64, device=device)
        places = image_ids[: rows * columns].view(rows, columns, 3)
        places[..., 0] = length + 1
        places[..., 1] = torch.arange(rows, device=device)[:, None]
        places[..., 2] = torch.arange(columns, device=device)
        turn: Tensor = self.rope_embedder(torch.cat([text_ids, image_ids]))  # (T+S, D/2)
        entries = torch.stack([turn.real, -turn.imag, turn.imag, turn.real], dim=-1)
        matrices = entries.view(1, -1, 1, turn.shape[1], 2, 2)
        return matrices.expand(image.shape[0], *matrices.shape[1:]).contiguous()


def _alike(norm: Any) -> nn.RMSNorm:
    return _comfy_norm(norm, epsilon=norm.eps)


def _comfy_norm(norm: Any, *, epsilon: float | None) -> nn.RMSNorm:
    """ComfyUI's kind of norm, with the weight of a norm of diffusers."""
    made = nn.RMSNorm(tuple(norm.weight.shape), eps=epsilon, device="meta")
    made.weight = norm.weight
    return made


def _padded(tokens: Tensor, token: Tensor) -> Tensor:
    missing = -tokens.shape[1] % TOKENS_PADDED
    padding = token.expand(tokens.shape[0], missing, -1)  # (1, C) => (B, missing, C)
    return torch.cat([tokens, padding], dim=1)
