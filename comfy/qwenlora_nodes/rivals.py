"""Other packs that put a class of their own in the transformer's place to apply LoRAs.

What they compose is theirs to undo: nothing of ours is put on top of it.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Rival", "rival_of"]


class Rival(NamedTuple):
    """A pack with a LoRA engine for Nunchaku models.

    Attributes:
        wrapper: What its class's name begins with; some have an ending.
        pack: The name of the pack.
        instead: What to do, as the beginning of a hint.
    """

    wrapper: str
    pack: str
    instead: str


_RIVALS = (
    # Its class has the other's name with an ending: the other's engine, copied.
    Rival(
        "ComfyQwenImageWrapperLM",
        "ComfyUI-Lora-Manager",
        "take `Lora Loader (LoraManager)` out of the way of this model; its LoRAs go through `Lora"
        " Stacker (LoraManager)` into the input `lora_stack` of `Load LoRA` or `LoRA Stack`"
        " (Nunchaku Qwen-Image, Z-Image)",
    ),
    Rival(
        "ComfyQwenImageWrapper",
        "ComfyUI-QwenImageLoraLoader",
        "remove that pack from custom_nodes; its saved nodes open as ours",
    ),
    Rival(
        "ComfyZImageTurboWrapper",
        "ComfyUI-QwenImageLoraLoader",
        "remove that pack from custom_nodes; its saved nodes open as ours",
    ),
)


def rival_of(kind: type) -> Rival | None:
    """The pack whose wrapper a class is; None where it is none that is known."""
    return next((rival for rival in _RIVALS if kind.__name__.startswith(rival.wrapper)), None)
