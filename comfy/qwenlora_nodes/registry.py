"""The nodes by their ids, and their names on the canvas."""

from __future__ import annotations

from .enable_node import QwenLoraEnable
from .inspect_node import QwenLoraInspect
from .loader_nodes import QwenLoraLoader, QwenLoraStack
from .merge_node import QwenLoraMerge
from .saved_nodes import (
    NunchakuQwenImageLoraLoader,
    NunchakuQwenImageLoraStack,
    NunchakuQwenImageLoraStackV1,
    NunchakuQwenImageLoraStackV2,
    NunchakuQwenImageLoraStackV3,
    NunchakuZImageTurboLoraStackV1,
    NunchakuZImageTurboLoraStackV2,
    NunchakuZImageTurboLoraStackV3,
    NunchakuZImageTurboLoraStackV4,
)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "QwenLoraLoader": QwenLoraLoader,
    "QwenLoraStack": QwenLoraStack,
    "QwenLoraEnable": QwenLoraEnable,
    "QwenLoraInspect": QwenLoraInspect,
    "QwenLoraMerge": QwenLoraMerge,
    "NunchakuQwenImageLoraLoader": NunchakuQwenImageLoraLoader,
    "NunchakuQwenImageLoraStack": NunchakuQwenImageLoraStack,
    "NunchakuQwenImageLoraStackV1": NunchakuQwenImageLoraStackV1,
    "NunchakuQwenImageLoraStackV2": NunchakuQwenImageLoraStackV2,
    "NunchakuQwenImageLoraStackV3": NunchakuQwenImageLoraStackV3,
    "NunchakuZImageTurboLoraStackV1": NunchakuZImageTurboLoraStackV1,
    "NunchakuZImageTurboLoraStackV2": NunchakuZImageTurboLoraStackV2,
    "NunchakuZImageTurboLoraStackV3": NunchakuZImageTurboLoraStackV3,
    "NunchakuZImageTurboLoraStackV4": NunchakuZImageTurboLoraStackV4,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "QwenLoraLoader": "Load LoRA (Nunchaku Qwen-Image, Z-Image)",
    "QwenLoraStack": "LoRA Stack (Nunchaku Qwen-Image, Z-Image)",
    "QwenLoraEnable": "Enable LoRA nodes (Nunchaku)",
    "QwenLoraInspect": "Inspect LoRA (Nunchaku Qwen-Image, Z-Image)",
    "QwenLoraMerge": "Merge applied LoRAs into one file",
    "NunchakuQwenImageLoraLoader": "Nunchaku Qwen Image LoRA Loader",
    "NunchakuQwenImageLoraStack": "Nunchaku Qwen Image LoRA Stack (Legacy)",
    "NunchakuQwenImageLoraStackV1": "Nunchaku Qwen Image LoRA Stack V1",
    "NunchakuQwenImageLoraStackV2": "Nunchaku Qwen Image LoRA Stack V2",
    "NunchakuQwenImageLoraStackV3": "Nunchaku Qwen Image LoRA Stack V3",
    "NunchakuZImageTurboLoraStackV1": "Nunchaku Z-Image-Turbo LoRA Stack V1",
    "NunchakuZImageTurboLoraStackV2": "Nunchaku Z-Image-Turbo LoRA Stack V2",
    "NunchakuZImageTurboLoraStackV3": "Nunchaku Z-Image-Turbo LoRA Stack V3",
    "NunchakuZImageTurboLoraStackV4": "Nunchaku Z-Image-Turbo LoRA Stack V4",
}
