"""The forms in which a 4-bit Z-Image transformer comes."""

from __future__ import annotations

import enum


class ZImageForm(enum.Enum):
    """Which software built the model: its modules, their names, and what runs them.

    Blocks are the same in all: attention with query, key and value, a gated MLP (`w1` is gated,
    `w3` multiplies, `w2` leads back), and a dense `adaLN_modulation.0`.
    """

    CALLED = "called"
    """Nunchaku 1.1: `attention.to_qkv` is called as a module, norms and rotation follow it.

    The MLP is `feed_forward.net.0.proj`, with the rows of `w3` before those of `w1`, and
    `feed_forward.net.2`.
    """

    FUSED = "fused"
    """Nunchaku since 1.2: `attention.fused_module` holds the tensors of `to_qkv` and both norms.

    It has no layer inside. The MLP is as in `CALLED`.
    """

    PASSED = "passed"
    """nunchaku-lite: `attention.to_qkv` is a layer that nothing calls.

    A function reads its tensors and those of both norms. The MLP is as in `CALLED`, and
    `adaLN_modulation.0` is of a class of its own.
    """

    STOCK = "stock"
    """diffusers' own backend: its stock blocks, each linear a 4-bit layer of its own."""

    COMFYUI = "comfyui"
    """ComfyUI-nunchaku since 1.2: ComfyUI's model and names.

    `attention.qkv` is a layer that nothing calls, as in `PASSED`. The MLP is `feed_forward.w13`,
    with the rows of `w3` before those of `w1`, and `feed_forward.w2`.
    """

    COMFYUI_CALLED = "comfyui_called"
    """ComfyUI-nunchaku 1.1: as `COMFYUI`, but `attention.qkv` is called as a module."""
