"""Sizes and precision of an emulated transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwenlora.emulation.contract import check_rank
from qwenlora.emulation.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNSUPPORTED = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")


@dataclass(frozen=True, kw_only=True)
class EmulatedConfig:
    """Sizes of a Qwen-Image transformer; the defaults are the real model's.

    Any number of blocks and any width will do, as long as the packed layouts exist: the width
    heads * head_dim is a multiple of 64 in `EXACT` and of 128 in `W4A4` precision.

    Attributes:
        num_layers: Number of transformer blocks.
        heads: Attention heads.
        head_dim: Channels per head, the sum of `axes_dims_rope`.
        joint_attention_dim: Channels of the text embedding.
        in_channels: Channels of an image token.
        out_channels: Channels of a latent pixel; an output token has patch_size² times as many.
        patch_size: Side of an image token in latent pixels.
        axes_dims_rope: Channels of a head that encode frame, height and width; each even.
        rank: Rank of the base low-rank branch, a multiple of 16.
        precision: See `Precision`.
        dtype: Dtype of activations and of all parameters but packed weights.
    """

    num_layers: int = 60
    heads: int = 24
    head_dim: int = 128
    joint_attention_dim: int = 3584
    in_channels: int = 64
    out_channels: int = 16
    patch_size: int = 2
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    rank: int = 32
    precision: Precision = Precision.W4A4
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if sum(self.axes_dims_rope) != self.head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"`axes_dims_rope` must be even and add up to `head_dim` {self.head_dim}, "
                f"got: {self.axes_dims_rope}"
            )
        multiple = 64 if self.precision is Precision.EXACT else 128
        if self.channels % multiple:
            raise ValueError(
                f"heads * head_dim must be a multiple of {multiple} "
                f"for precision {self.precision.value}, got: {self.channels}"
            )

    @property
    def channels(self) -> int:
        """Width of the transformer."""
        return self.heads * self.head_dim

    @property
    def guidance_embeds(self) -> bool:
        """False: pipelines ask whether the model was distilled with a guidance input."""
        return False

    @classmethod
    def from_diffusers(
        cls,
        config: Mapping[str, Any],
        *,
        rank: int,
        precision: Precision,
        dtype: torch.dtype,
    ) -> EmulatedConfig:
        """Read the config values of a diffusers `QwenImageTransformer2DModel`.

        Raises:
            ValueError: The config turns on an option that the emulation does not have.
        """
        for option in _UNSUPPORTED:
            if config.get(option):
                raise ValueError(f"option is not emulated: `{option}`")
        frames, height, width = config["axes_dims_rope"]
        return cls(
            num_layers=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            joint_attention_dim=config["joint_attention_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"] or config["in_channels"],
            patch_size=config["patch_size"],
            axes_dims_rope=(frames, height, width),
            rank=rank,
            precision=precision,
            dtype=dtype,
        )
