"""A whole Qwen-Image transformer over quantized leaves, with Nunchaku's module paths."""

from __future__ import annotations

import gc
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from qwenlora.emulation.attention import NORM_EPSILON
from qwenlora.emulation.block import EmulatedTransformerBlock
from qwenlora.emulation.config import EmulatedConfig
from qwenlora.emulation.dense import load_dense_state
from qwenlora.emulation.offload import CPUOffloadManager
from qwenlora.emulation.rope import ImageShape, rotations

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qwenlora.emulation.precision import Precision

TIME_CHANNELS = 256
"""Width of the sinusoidal time embedding."""


class DiffusersModel(Protocol):
    """A diffusers model as far as it is read: its weights and its config values."""

    @property
    def config(self) -> Any:
        """Mapping of config names to values."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights by name."""


@dataclass(frozen=True)
class EmulatedOutput:
    """The result of `forward` with `return_dict=True`."""

    sample: torch.Tensor
    """(B, S, patch_size² * out_channels)."""


class TimestepEmbedder(nn.Module):
    """Two linears with SiLU in between: `linear_1`, `linear_2`."""

    def __init__(self, config: EmulatedConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_CHANNELS, config.channels, dtype=config.dtype)
        self.linear_2 = nn.Linear(config.channels, config.channels, dtype=config.dtype)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        """Map (B, 256) to (B, C)."""
        embedded: torch.Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return embedded


class TimeTextEmbedding(nn.Module):
    """Time embedding; the name is diffusers', there is no text in it."""

    def __init__(self, config: EmulatedConfig) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(config)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Map timesteps (B,) in [0, 1] to (B, C)."""
        embedded: torch.Tensor = self.timestep_embedder(_time_waves(timestep))
        return embedded


class ModulatedNorm(nn.Module):
    """Last normalization: `linear` computes its scale and shift from the time embedding."""

    def __init__(self, config: EmulatedConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.channels, 2 * config.channels, dtype=config.dtype)
        self.norm = nn.LayerNorm(config.channels, eps=NORM_EPSILON, elementwise_affine=False)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Normalize (B, S, C) under a time embedding (B, C)."""
        scale, shift = self.linear(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, C) each
        normed: torch.Tensor = self.norm(x)
        modulated: torch.Tensor = normed * (1 + scale) + shift
        return modulated


class EmulatedQwenImageTransformer(nn.Module):
    """Qwen-Image over `SVDQW4A4Linear` and `AWQW4A16Linear` leaves, on CPU or GPU.

    Module paths, fusion of q, k and v, row order of the modulations and the way each leaf is run
    are Nunchaku's: attention and modulation linears and the plain linears are called as modules,
    the linears of the MLPs run inside `fused_gelu_mlp`. In `EXACT` precision and float32 the output
    is that of the diffusers model with the same weights.

    A model made by the constructor has zeros for quantized weights and PyTorch's usual random
    plain linears; `from_diffusers` and `random_transformer` give useful ones.

    Attributes:
        config: Sizes and precision it was built with.
        offload: Whether blocks are offloaded; see `set_offload`.
        offload_manager: Runs the blocks while they are, else None.
    """

    offload_manager: CPUOffloadManager | None

    def __init__(self, config: EmulatedConfig) -> None:
        super().__init__()
        self.config = config
        self.offload = False
        self.offload_manager = None
        channels, dtype = config.channels, config.dtype
        self.time_text_embed = TimeTextEmbedding(config)
        self.txt_norm = nn.RMSNorm(config.joint_attention_dim, eps=NORM_EPSILON, dtype=dtype)
        self.img_in = nn.Linear(config.in_channels, channels, dtype=dtype)
        self.txt_in = nn.Linear(config.joint_attention_dim, channels, dtype=dtype)
        self.transformer_blocks = nn.ModuleList(
            EmulatedTransformerBlock(config) for _ in range(config.num_layers)
        )
        self.norm_out = ModulatedNorm(config)
        self.proj_out = nn.Linear(channels, config.patch_size**2 * config.out_channels, dtype=dtype)

    @classmethod
    def from_diffusers(
        cls,
        model: DiffusersModel,
        *,
        rank: int,
        precision: Precision,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> EmulatedQwenImageTransformer:
        """Convert a dense diffusers `QwenImageTransformer2DModel`.

        Args:
            model: The dense model; it is only read.
            rank: Rank of the base low-rank branches.
            precision: See `Precision`.
            dtype: Dtype of activations and plain weights.
            seed: Chooses the smooth factors, which differ from 1.

        Returns:
            A new model on the CPU.
        """
        return cls.from_dense_state(
            model.state_dict(),
            model.config,
            rank=rank,
            precision=precision,
            dtype=dtype,
            seed=seed,
        )

    @classmethod
    def from_dense_state(
        cls,
        state: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        *,
        rank: int,
        precision: Precision,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> EmulatedQwenImageTransformer:
        """Convert a dense state dict; see `from_diffusers`.

        Args:
            state: Weights under diffusers' names.
            config: Config values under diffusers' names.
            rank: Rank of the base low-rank branches.
            precision: See `Precision`.
            dtype: Dtype of activations and plain weights.
            seed: Chooses the smooth factors.

        Raises:
            ValueError: A weight is missing, left over or of the wrong shape, or the config asks for
                an option that is not emulated.
        """
        emulated = cls(
            EmulatedConfig.from_diffusers(config, rank=rank, precision=precision, dtype=dtype)
        )
        load_dense_state(emulated, state, torch.Generator().manual_seed(seed))
        return emulated.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.img_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the plain weights."""
        return self.img_in.weight.device

    def set_offload(self, offload: bool, **kwargs: Any) -> None:
        """Turn block offload on or off, as Nunchaku's transformer does.

        Nothing happens where it is on or off already, whatever the other arguments say. Turned off,
        every block stays on the device it is on.

        Args:
            offload: Whether to offload.
            **kwargs: `use_pin_memory` (True) and `num_blocks_on_gpu` (1). Not in Nunchaku:
                `device` (None: "cuda" where there is one, else the CPU). Others are ignored.
        """
        if offload == self.offload:
            return
        self.offload = offload
        if not offload:
            self.offload_manager = None
            gc.collect()
            torch.cuda.empty_cache()
            return
        self.offload_manager = CPUOffloadManager(
            self.transformer_blocks,
            device=kwargs.get("device"),
            use_pin_memory=kwargs.get("use_pin_memory", True),
            on_gpu_modules=[
                self.img_in,
                self.txt_in,
                self.txt_norm,
                self.time_text_embed,
                self.norm_out,
                self.proj_out,
            ],
            num_blocks_on_gpu=kwargs.get("num_blocks_on_gpu", 1),
        )

    def to(self, *args: Any, **kwargs: Any) -> EmulatedQwenImageTransformer:
        """Move or cast the model; with offload on a call that names a device does nothing.

        Warns:
            UserWarning: The call was left out.
        """
        if self.offload and ("device" in kwargs or any(map(_is_device, args))):
            warnings.warn("the model is not moved: offload is on", UserWarning, stacklevel=2)
            return self
        return super().to(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Do nothing; diffusers' pipelines open one around each forward."""
        del name
        yield

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_shapes: Sequence[Any] | None = None,
        txt_seq_lens: Sequence[int] | None = None,
        guidance: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> EmulatedOutput | tuple[torch.Tensor]:
        """Denoise, with diffusers' keyword arguments.

        Args:
            hidden_states: (B, S, in_channels) image tokens.
            encoder_hidden_states: (B, T, joint_attention_dim) text embedding.
            encoder_hidden_states_mask: (B, T), nonzero for real tokens, or None.
            timestep: (B,) in [0, 1].
            img_shapes: One (frames, height, width) or a list of them per sample; the positions of
                the first sample hold for all.
            txt_seq_lens: Ignored: the text's length is T.
            guidance: Ignored: the model has no guidance input.
            attention_kwargs: Passed on to each attention module.
            return_dict: Whether to return an `EmulatedOutput` or a tuple.
            **kwargs: Ignored: other versions of diffusers take other arguments.

        Returns:
            `EmulatedOutput` or a tuple of one tensor (B, S, patch_size² * out_channels).

        Raises:
            ValueError: `timestep` or `img_shapes` is missing.
        """
        del txt_seq_lens, guidance, kwargs
        if timestep is None or not img_shapes:
            raise ValueError("`timestep` and `img_shapes` are needed")
        manager = self.offload_manager
        if manager is not None:
            manager.set_device(hidden_states.device)
        image = self.img_in(hidden_states)  # (B, S, C)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))  # (B, T, C)
        temb = self.time_text_embed(timestep.to(image.dtype))  # (B, C)
        rotary = rotations(
            _images_of(img_shapes[0]), text.shape[1], self.config.axes_dims_rope, image.device
        )
        mask = encoder_hidden_states_mask
        if manager is not None:
            manager.initialize()
        for index, resident in enumerate(self.transformer_blocks):
            block = resident if manager is None else manager.get_block(index)
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=None if mask is None else mask.bool(),
                temb=temb,
                image_rotary_emb=rotary,
                joint_attention_kwargs=attention_kwargs,
            )
            if manager is not None:
                manager.step()
        sample = self.proj_out(self.norm_out(image, temb))  # (B, S, patch_size² * out_channels)
        return EmulatedOutput(sample) if return_dict else (sample,)


def _images_of(shapes: Any) -> list[ImageShape]:
    # A sample's entry is one shape as a tuple, or the list of its images' shapes.
    return list(shapes) if isinstance(shapes, list) else [shapes]


def _is_device(argument: object) -> bool:
    # A string, too, if it names one; Nunchaku lets tensors and device numbers pass.
    if isinstance(argument, str):
        try:
            torch.device(argument)
        except RuntimeError:
            return False
        return True
    return isinstance(argument, torch.device)


def _time_waves(timestep: torch.Tensor) -> torch.Tensor:
    # (B,) -> (B, 256): cosines, then sines
    half = TIME_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    frequencies = torch.exp(-math.log(10000) * exponents)
    phases = 1000 * (timestep.float()[:, None] * frequencies)
    return torch.cat([phases.cos(), phases.sin()], dim=-1).to(timestep.dtype)
