"""Joint attention of text and image tokens over quantized projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from qwenlora.emulation.linear import SVDQW4A4Linear
from qwenlora.emulation.rope import rotate

if TYPE_CHECKING:
    from qwenlora.emulation.config import EmulatedConfig

NORM_EPSILON = 1e-6


class EmulatedAttention(nn.Module):
    """Attention over the text tokens followed by the image tokens.

    Module paths are Nunchaku's: `to_qkv`, `add_qkv_proj` (text), `to_out.0`, `to_add_out` (text),
    `norm_q`, `norm_k`, `norm_added_q`, `norm_added_k`. Every projection is called as a module.
    """

    def __init__(self, config: EmulatedConfig) -> None:
        super().__init__()
        channels = config.channels
        self.heads = config.heads

        def projection(outputs: int) -> SVDQW4A4Linear:
            return SVDQW4A4Linear(
                channels,
                outputs,
                config.rank,
                precision=config.precision,
                torch_dtype=config.dtype,
            )

        def head_norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.head_dim, eps=NORM_EPSILON, dtype=config.dtype)

        self.norm_q = head_norm()
        self.norm_k = head_norm()
        self.norm_added_q = head_norm()
        self.norm_added_k = head_norm()
        self.to_qkv = projection(3 * channels)
        self.to_out = nn.ModuleList([projection(channels), nn.Dropout(0.0)])
        self.add_qkv_proj = projection(3 * channels)
        self.to_add_out = projection(channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over both streams.

        Args:
            hidden_states: (B, S, C) image stream.
            encoder_hidden_states: (B, T, C) text stream.
            encoder_hidden_states_mask: (B, T) bool, true for real tokens, or None.
            image_rotary_emb: Rotations of image (S, D/2) and text (T, D/2) tokens, or None.

        Returns:
            Image (B, S, C) and text (B, T, C) outputs.
        """
        image = self._heads(self.to_qkv(hidden_states))  # (3, B, S, H, D)
        text = self._heads(self.add_qkv_proj(encoder_hidden_states))  # (3, B, T, H, D)
        image_query, image_key = self.norm_q(image[0]), self.norm_k(image[1])
        text_query, text_key = self.norm_added_q(text[0]), self.norm_added_k(text[1])
        if image_rotary_emb is not None:
            image_rotation, text_rotation = image_rotary_emb
            image_query, image_key = (rotate(x, image_rotation) for x in (image_query, image_key))
            text_query, text_key = (rotate(x, text_rotation) for x in (text_query, text_key))
        query, key, value = (
            torch.cat(pair, dim=1).transpose(1, 2)  # (B, T+S, H, D) => (B, H, T+S, D)
            for pair in ((text_query, image_query), (text_key, image_key), (text[2], image[2]))
        )
        mask = _joint_mask(encoder_hidden_states_mask, hidden_states.shape[1])
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        merged = attended.transpose(1, 2).flatten(2)  # (B, H, T+S, D) => (B, T+S, C)
        text_length = encoder_hidden_states.shape[1]
        image_output = self.to_out[0](merged[:, text_length:].contiguous())
        return self.to_out[1](image_output), self.to_add_out(merged[:, :text_length].contiguous())

    def _heads(self, fused: torch.Tensor) -> torch.Tensor:
        # (B, S, 3*H*D) => (3, B, S, H, D)
        split = fused.view(*fused.shape[:2], 3, self.heads, -1)
        return split.permute(2, 0, 1, 3, 4)


def _joint_mask(text_mask: torch.Tensor | None, image_length: int) -> torch.Tensor | None:
    if text_mask is None:
        return None
    image_mask = text_mask.new_ones(text_mask.shape[0], image_length)
    return torch.cat([text_mask, image_mask], dim=1)[:, None, None, :]  # (B, 1, 1, T+S)
