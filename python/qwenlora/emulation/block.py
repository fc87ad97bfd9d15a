"""One double-stream transformer block over quantized leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwenlora.emulation.attention import NORM_EPSILON, EmulatedAttention
from qwenlora.emulation.awq import AWQW4A16Linear
from qwenlora.emulation.linear import SVDQW4A4Linear
from qwenlora.emulation.mlp import fused_gelu_mlp
from qwenlora.emulation.precision import Precision
from qwenlora.packing.layout import MODULATION_PLANES

if TYPE_CHECKING:
    from qwenlora.emulation.config import EmulatedConfig

MLP_RATIO = 4
"""Width of an MLP's hidden layer over the transformer's."""

_HALF_MAX = 65504


class EmulatedGelu(nn.Module):
    """Holds an MLP's first linear; neither is called where the MLP runs fused.

    Attributes:
        approximate: The approximation of GELU that the fused kernel has.
        proj: The linear.
    """

    def __init__(self, proj: SVDQW4A4Linear) -> None:
        super().__init__()
        self.approximate = "tanh"
        self.proj = proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, S, C) to (B, S, H)."""
        hidden: torch.Tensor = self.proj(hidden_states)
        return torch.nn.functional.gelu(hidden, approximate=self.approximate)


class EmulatedFeedForward(nn.Module):
    """MLP whose two linears, `net.0.proj` and `net.2`, run inside one fused function."""

    def __init__(self, config: EmulatedConfig) -> None:
        super().__init__()
        channels, hidden = config.channels, MLP_RATIO * config.channels

        def linear(inputs: int, outputs: int, act_unsigned: bool) -> SVDQW4A4Linear:
            return SVDQW4A4Linear(
                inputs,
                outputs,
                config.rank,
                precision=config.precision,
                act_unsigned=act_unsigned,
                torch_dtype=config.dtype,
            )

        # Floats of 4 bits have a sign of their own: nothing is gained by a shift.
        is_int = config.precision is not Precision.NVFP4
        projection = EmulatedGelu(linear(channels, hidden, act_unsigned=False))
        self.net = nn.ModuleList(
            [projection, nn.Dropout(0.0), linear(hidden, channels, act_unsigned=is_int)]
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, S, C) to (B, S, C)."""
        fc1, fc2 = self.net[0].proj, self.net[2]
        if not isinstance(fc1, SVDQW4A4Linear) or not isinstance(fc2, SVDQW4A4Linear):
            raise TypeError(f"`net` holds other layers than were built into it: {self.net}")
        return fused_gelu_mlp(hidden_states, fc1, fc2)


class EmulatedTransformerBlock(nn.Module):
    """Modulated joint attention and MLPs over an image and a text stream."""

    def __init__(self, config: EmulatedConfig) -> None:
        super().__init__()

        def modulation() -> nn.Sequential:
            linear = AWQW4A16Linear(
                config.channels,
                MODULATION_PLANES * config.channels,
                precision=config.precision,
                torch_dtype=config.dtype,
            )
            return nn.Sequential(nn.SiLU(), linear)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.channels, eps=NORM_EPSILON, elementwise_affine=False)

        self.img_mod = modulation()
        self.img_norm1 = norm()
        self.attn = EmulatedAttention(config)
        self.img_norm2 = norm()
        self.img_mlp = EmulatedFeedForward(config)
        self.txt_mod = modulation()
        self.txt_norm1 = norm()
        self.txt_norm2 = norm()
        self.txt_mlp = EmulatedFeedForward(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update both streams.

        Args:
            hidden_states: (B, S, C) image stream.
            encoder_hidden_states: (B, T, C) text stream.
            encoder_hidden_states_mask: (B, T) bool or None.
            temb: (B, C) time embedding.
            image_rotary_emb: Rotations of image and text tokens, or None.
            joint_attention_kwargs: Passed on to the attention module.

        Returns:
            Text (B, T, C), then image (B, S, C): diffusers' order.
        """
        image, text = hidden_states, encoder_hidden_states
        image_mod, text_mod = _planes(self.img_mod(temb)), _planes(self.txt_mod(temb))
        image_attended, text_attended = self.attn(
            hidden_states=_modulated(self.img_norm1(image), image_mod[0], image_mod[1]),
            encoder_hidden_states=_modulated(self.txt_norm1(text), text_mod[0], text_mod[1]),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        image = image + image_mod[2] * image_attended
        text = text + text_mod[2] * text_attended
        image_inner = _modulated(self.img_norm2(image), image_mod[3], image_mod[4])
        text_inner = _modulated(self.txt_norm2(text), text_mod[3], text_mod[4])
        image = image + image_mod[5] * self.img_mlp(image_inner)
        text = text + text_mod[5] * self.txt_mlp(text_inner)
        return _clipped(text), _clipped(image)


def _planes(raw: torch.Tensor) -> torch.Tensor:
    # (B, C*6) as an AWQ layer writes it => (6, B, 1, C): shift, scale and gate, twice
    planes = raw.view(raw.shape[0], -1, MODULATION_PLANES).transpose(1, 2)  # (B, 6, C)
    return planes.transpose(0, 1).unsqueeze(2)


def _modulated(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # The 1 of 1 + scale is part of the modulation's bias.
    return normed * scale + shift


def _clipped(x: torch.Tensor) -> torch.Tensor:
    return x.clip(-_HALF_MAX, _HALF_MAX) if x.dtype == torch.float16 else x
