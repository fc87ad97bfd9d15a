"""The nodes of saved workflows, under the ids that those have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from . import host
from .inputs import (
    CLIP_TIP,
    NAME_TIP,
    AnyInputs,
    Inputs,
    Schema,
    clip_input,
    model_input,
    name_input,
    saved_input,
    strength_input,
)
from .loader_nodes import LoraNode, validate_name
from .request import Request
from .rows import as_flag, as_row, read_rows
from .saved import (
    STACK,
    STACK_V1,
    STACK_V2,
    STACK_V3,
    Z_IMAGE_STACK_V1,
    Z_IMAGE_STACK_V2,
    Z_IMAGE_STACK_V3,
    Z_IMAGE_STACK_V4,
    Saved,
)

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

__all__ = [
    "NunchakuQwenImageLoraLoader",
    "NunchakuQwenImageLoraStack",
    "NunchakuQwenImageLoraStackV1",
    "NunchakuQwenImageLoraStackV2",
    "NunchakuQwenImageLoraStackV3",
    "NunchakuZImageTurboLoraStackV1",
    "NunchakuZImageTurboLoraStackV2",
    "NunchakuZImageTurboLoraStackV3",
    "NunchakuZImageTurboLoraStackV4",
]

_SAVED_CATEGORY = "Nunchaku"


class _SavedStack(LoraNode):
    """A stack of the pack that ours stands in for, with its inputs in its order."""

    CATEGORY = _SAVED_CATEGORY
    DEPRECATED = True
    FUNCTION = "load_lora_stack"
    DESCRIPTION = (
        "For saved workflows; `LoRA Stack (Nunchaku Qwen-Image, Z-Image)` is the new node."
    )
    saved: ClassVar[Saved]

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        drawn = {name: saved_input(name) for name in cls.saved.today.names}
        model = model_input(**cls.saved.published)
        return {"required": model, "optional": AnyInputs(drawn)}

    @classmethod
    def restored(cls, inputs: Inputs) -> Inputs:
        """The inputs under their own names, whichever version saved them."""
        return cls.saved.restore(inputs)

    @classmethod
    def request(cls, inputs: Inputs) -> Request:
        """The rows that the count and the switches leave."""
        inputs = cls.restored(inputs)
        modulation = as_flag(inputs.get("apply_awq_mod"), True)
        if not as_flag(inputs.get("stack_enabled"), True):
            return Request((), modulation)
        offload = inputs.get("cpu_offload") == "enable"
        count = str(inputs.get("lora_count"))
        limit = int(count) if count.isdecimal() else None
        return Request(read_rows(inputs, limit=limit), modulation, offload)

    def load(self, model: ModelPatcher, **inputs: Any) -> dict[str, Any]:
        """Run the node."""
        _warn_of_settings(self.restored(inputs))
        return super().load(model, **inputs)

    load_lora = load_lora_stack = load


class NunchakuQwenImageLoraLoader(_SavedStack):
    """One LoRA."""

    FUNCTION = "load_lora"
    DESCRIPTION = "For saved workflows; `Load LoRA (Nunchaku Qwen-Image, Z-Image)` is the new node."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        names = ("lora_strength", "cpu_offload", "save_precompiled_lora")
        return {
            "required": {**model_input(), "lora_name": name_input(NAME_TIP)},
            "optional": {
                **{name: saved_input(name) for name in names},
                "lora_strength": strength_input(),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: object = None) -> bool | str:
        """Check that the file is there."""
        return validate_name(lora_name)

    @classmethod
    def restored(cls, inputs: Inputs) -> Inputs:
        """The inputs: its saved values only ever grew at the end."""
        return inputs

    @classmethod
    def request(cls, inputs: Inputs) -> Request:
        """One row; this node never had a switch for the modulation."""
        return Request((as_row(inputs),), offload=inputs.get("cpu_offload") == "enable")


class NunchakuQwenImageLoraStack(_SavedStack):
    """Ten plain rows."""

    saved = STACK


class NunchakuQwenImageLoraStackV1(_SavedStack):
    """Rows as dicts, which its own frontend drew; plain rows here."""

    saved = STACK_V1


class NunchakuQwenImageLoraStackV2(_SavedStack):
    """Ten plain rows, and a switch for the modulation."""

    saved = STACK_V2


class NunchakuQwenImageLoraStackV3(_SavedStack):
    """Ten plain rows that can be switched off."""

    saved = STACK_V3


class _SavedStackWithClip(_SavedStack):
    """A stack that also passes a text encoder on."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("model", "clip", "report")
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = (
        LoraNode.OUTPUT_TOOLTIPS[0],
        CLIP_TIP,
        LoraNode.OUTPUT_TOOLTIPS[1],
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        schema = super().INPUT_TYPES()
        return {**schema, "optional": AnyInputs({**clip_input(), **schema["optional"]})}

    def load(self, model: ModelPatcher, clip: object = None, **inputs: Any) -> dict[str, Any]:
        """Run the node."""
        done = super().load(model, **inputs)
        model, report = done["result"]
        return {**done, "result": (model, clip, report)}

    load_lora = load_lora_stack = load


class NunchakuZImageTurboLoraStackV1(_SavedStackWithClip):
    """Rows as dicts, which its own frontend drew; plain rows here."""

    saved = Z_IMAGE_STACK_V1


class NunchakuZImageTurboLoraStackV2(_SavedStack):
    """Ten plain rows."""

    saved = Z_IMAGE_STACK_V2


class NunchakuZImageTurboLoraStackV3(_SavedStack):
    """Ten plain rows that can be switched off."""

    saved = Z_IMAGE_STACK_V3


class NunchakuZImageTurboLoraStackV4(_SavedStackWithClip):
    """Ten plain rows that can be switched off."""

    saved = Z_IMAGE_STACK_V4


def _warn_of_settings(inputs: Inputs) -> None:
    if as_flag(inputs.get("save_precompiled_lora"), False):
        host.warn_once("`save_precompiled_lora` is ignored: nothing needs to be saved")
