"""Qwen-Image's blocks as Nunchaku and diffusers build them: the names that tell one from the other.

Sizes and all modules are Rust's (`rust/core/src/model/qwen_image.rs`).
"""

from __future__ import annotations

__all__ = ["BLOCKS", "FUSED_ATTENTION", "MLPS", "MODULATIONS", "QUERY"]

BLOCKS = "transformer_blocks"
"""The list of blocks."""
MODULATIONS = ("img_mod.1", "txt_mod.1")
"""A block's modulation linears: one for each of its two streams."""
MLPS = ("img_mlp", "txt_mlp")
"""A block's MLPs: one for each of its two streams."""
FUSED_ATTENTION = "attn.to_qkv"
"""The linear of query, key and value in a block of Nunchaku's."""
QUERY = "attn.to_q"
"""The linear of the query alone in a block of diffusers'."""
