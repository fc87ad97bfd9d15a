"""The names that checkpoints have: of files, and of the modules in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SAFETENSORS_ENDINGS", "names_of"]

SAFETENSORS_ENDINGS = (".safetensors", ".sft")
"""Ends of the names of safetensors files."""
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "")
"""What files put before a model's own names, the longest first."""
_IN_BLOCKS = {
    "attention.out": "attention.to_out.0",
    "attention.qkv": "attention.to_qkv",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "feed_forward.net.2": "feed_forward.w2",
}
"""Names that Z-Image's own files and quantized ones have within a block, and diffusers' for them.
"""
_OUTSIDE = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
"""The same outside of blocks."""
_BLOCK = re.compile(r"([a-z_]+\.[0-9]{1,4})\.(.+)")


def names_of(path: str) -> Iterator[str]:
    """The names that diffusers may give to what a file has at this path."""
    for prefix in _PREFIXES:
        if path.startswith(prefix):
            own = path.removeprefix(prefix)
            yield own
            yield _renamed(own)


def _renamed(path: str) -> str:
    block = _BLOCK.fullmatch(path)
    if block is None:
        return _OUTSIDE.get(path, path)
    return f"{block[1]}.{_IN_BLOCKS.get(block[2], block[2])}"
