"""A node pack for tests: small models, and what shows a person what was computed.

The modules that it imports are those of `tests/host`, which are put beside it.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import torch

from . import emulated_qwen, emulated_z_image, small_qwen, small_z_image

CATEGORY = "tests"

# The tensors are tiny and the machines shared: more threads only wait for each other.
torch.set_num_threads(1)


class EmulatedModel:
    """A loader: the same model object each time that it runs anew."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    INPUT_TYPES = classmethod(lambda cls: {"required": {"kind": (["qwen-image", "z-image"], {})}})

    def load(self, kind: str) -> tuple[Any]:
        if kind == "z-image":
            return (emulated_z_image.emulated_z_image(small_z_image.small_z_image()),)
        return (emulated_qwen.emulated_qwen(small_qwen.small_qwen()),)


class NunchakuQwenImageDiTLoader:
    """Stands in for ComfyUI-nunchaku's loader, under its id and with its inputs."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"
    CATEGORY = CATEGORY
    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {
                "model_name": (
                    [
                        "svdq-int4_r128-qwen-image.safetensors",
                        "svdq-int4_r128-qwen-image-edit-2509.safetensors",
                    ],
                    {},
                ),
                "cpu_offload": (["auto", "enable", "disable"], {"default": "auto"}),
            },
            "optional": {
                "num_blocks_on_gpu": ("INT", {"default": 1, "min": 1, "max": 60}),
                "use_pin_memory": (["enable", "disable"], {"default": "disable"}),
            },
        }
    )

    def load_model(self, **inputs: Any) -> tuple[Any]:
        del inputs
        return EmulatedModel().load("qwen-image")


class NunchakuZImageDiTLoader:
    """Stands in for ComfyUI-nunchaku's loader, under its id and with its input."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"
    CATEGORY = CATEGORY
    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"model_name": (["svdq-int4_r128-z-image-turbo.safetensors"], {})}}
    )

    def load_model(self, model_name: str) -> tuple[Any]:
        del model_name
        return EmulatedModel().load("z-image")


class EmulatedText:
    """Random embeddings in place of a text encoder's."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = CATEGORY
    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {
                "seed": ("INT", {"default": 1, "min": 0, "max": 99}),
                "kind": (["qwen-image", "z-image"], {}),
            }
        }
    )

    def encode(self, seed: int, kind: str) -> tuple[Any]:
        module = small_z_image if kind == "z-image" else small_qwen
        return (module.conditioning(seed),)


class LatentHash:
    """Shows a latent as the hash of its bytes, and keeps what was shown."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "show"
    CATEGORY = CATEGORY
    INPUT_TYPES = classmethod(lambda cls: {"required": {"samples": ("LATENT", {})}})
    shown: ClassVar[list[str]] = []

    def show(self, samples: dict[str, Any]) -> dict[str, Any]:
        values = samples["samples"].detach().cpu().contiguous()
        text = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:8]
        self.shown.append(text)
        return {"ui": {"text": [text]}}


NODE_CLASS_MAPPINGS = {
    "EmulatedModel": EmulatedModel,
    "EmulatedText": EmulatedText,
    "LatentHash": LatentHash,
    "NunchakuQwenImageDiTLoader": NunchakuQwenImageDiTLoader,
    "NunchakuZImageDiTLoader": NunchakuZImageDiTLoader,
}
