"""The linears of a Qwen-Image block that a LoRA trains, and the layers that carry them."""

from __future__ import annotations

WIDTH = 3072
BLOCKS = 60

LINEARS = {
    "attn.to_q": (WIDTH, WIDTH),
    "attn.to_k": (WIDTH, WIDTH),
    "attn.to_v": (WIDTH, WIDTH),
    "attn.add_q_proj": (WIDTH, WIDTH),
    "attn.add_k_proj": (WIDTH, WIDTH),
    "attn.add_v_proj": (WIDTH, WIDTH),
    "attn.to_out.0": (WIDTH, WIDTH),
    "attn.to_add_out": (WIDTH, WIDTH),
    "img_mlp.net.0.proj": (4 * WIDTH, WIDTH),
    "img_mlp.net.2": (WIDTH, 4 * WIDTH),
    "txt_mlp.net.0.proj": (4 * WIDTH, WIDTH),
    "txt_mlp.net.2": (WIDTH, 4 * WIDTH),
}
"""(out, in) of the linears as they are trained."""

MODULATIONS = {"img_mod.1": (6 * WIDTH, WIDTH), "txt_mod.1": (6 * WIDTH, WIDTH)}
"""(out, in) of the modulations."""

FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Layers of the model that hold several trained linears."""


def slots(blocks: int) -> dict[str, tuple[str, ...]]:
    """The model's layers by path, with the trained linears that each holds."""
    alone = {name: (name,) for name in LINEARS if not any(name in f for f in FUSED.values())}
    return {
        f"transformer_blocks.{block}.{slot}": tuple(
            f"transformer_blocks.{block}.{name}" for name in names
        )
        for block in range(blocks)
        for slot, names in (alone | FUSED).items()
    }
