"""The precisions in which the stand-in layers compute."""

from __future__ import annotations

import enum


class Precision(str, enum.Enum):
    """Arithmetic of the emulated quantized layers."""

    EXACT = "exact"
    """No quantization error: `qweight` is the float32 residual weight (out, in), row-major.

    Everything else keeps its real layout: the low-rank branch, bias and smooth factor are packed,
    the modulation rows interleaved. Arithmetic is float32 with one cast at the end.
    """

    W4A4 = "w4a4"
    """The 4-bit values, scales and packed layouts of the real layers.

    SVDQ layers hold int4 weights and quantize their activations as the kernels do; AWQ layers hold
    uint4 weights and take 16-bit activations (W4A16).
    """

    NVFP4 = "nvfp4"
    """The same with 4-bit floats in SVDQ layers, in groups of 16 with 8-bit scales, for weights and
    activations. AWQ layers are those of `W4A4`."""
