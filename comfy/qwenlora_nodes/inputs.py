"""Inputs of the nodes, as ComfyUI is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenlora import ScheduleMode

from . import host
from .lora_stack import LORA_STACK, LORA_STACK_INPUT
from .presets import ALL, CUSTOM, PRESETS
from .rows import MAX_STRENGTH
from .saved import OFFLOAD_MODES, ROWS

__all__ = [
    "APPLIED_TIP",
    "CATEGORY",
    "CLIP_TIP",
    "ENABLED_TIP",
    "NAME_TIP",
    "ROWS_TIP",
    "ROWS_TYPE",
    "SLOT_TIP",
    "STACK_OUT_TIP",
    "AnyInputs",
    "Inputs",
    "Schema",
    "choice_input",
    "clip_input",
    "control_inputs",
    "flag_input",
    "model_input",
    "name_input",
    "saved_input",
    "stack_input",
    "strength_input",
]

Inputs = Mapping[str, Any]
Schema = dict[str, dict[str, Any]]

CATEGORY = "qwenlora"
"""Where the host's menu of nodes has ours."""

_MODEL_TIP = (
    "The model that the LoRAs are applied to. Make sure the model is loaded by"
    " `Nunchaku Qwen Image DiT Loader` or `Nunchaku Z-Image DiT Loader`."
)
CLIP_TIP = "The text encoder, passed on as it is."
NAME_TIP = "The file name of the LoRA."
SLOT_TIP = "The file name of the LoRA. Select 'None' to skip this slot."
_STRENGTH_TIP = "How strongly to modify the diffusion model. This value can be negative."
ENABLED_TIP = "Whether this LoRA is used."
ROWS_TYPE = "QWENLORA_ROWS"
"""The widget that `web/rows.js` draws; its value is a list of rows."""

ROWS_TIP = "The LoRAs: each a file, its strength, and whether it is used."
_STACK_TIP = (
    "A LORA_STACK of another node. Its LoRAs come before this node's own; only the model strengths"
    " are used here."
)
STACK_OUT_TIP = (
    "What this node applies, and what came in by `lora_stack`, for nodes that take a LORA_STACK."
)
APPLIED_TIP = "All LoRAs of the model, those of nodes before included, as <lora:name:strength>."
_AWQ_TIP = (
    "Whether the modulation layers (Qwen-Image's img_mod and txt_mod) of this node's LoRAs are"
    " applied."
)
_COUNT_TIP = "Number of LoRA slots in use."
_OFFLOAD_TIP = (
    "'auto' and 'disable' leave offload as the model loader set it; 'enable' turns it on if it is"
    " off. Z-Image has none of its own: ComfyUI places it."
)
_FLAG_TIPS = {
    "enabled": ENABLED_TIP,
    "stack_enabled": "Whether the LoRAs of this node are used.",
    "toggle_all": "Without effect when the node runs: the switches of the rows count.",
    "apply_awq_mod": _AWQ_TIP,
    "save_precompiled_lora": "Without effect: nothing needs to be saved for a LoRA to load fast.",
}

_BLOCKS_TIP = (
    "The blocks of the model in which the LoRAs act. 'style' fades out the first blocks,"
    " 'composition' the last ones: a rule of thumb. 'custom' takes `custom_blocks`."
)
_CUSTOM_TIP = (
    "With blocks 'custom': factors by block and kind of layer, such as '0-19:1, 20-39:0.5; mod:0'."
    " The kinds are attn, mlp, mod, img, txt and rest."
)
_SCHEDULE_TIP = (
    "Factors on the strength over the steps, by the share of the course of sampling: '0:1, 0.5:0.3'"
    " begins at the whole strength and is at 30 % of it half way. Empty: the same all the way."
)
_MODE_TIP = "Between two places of the schedule: 'linear' fades, 'steps' stays until the next."


class _Unconverted(str):
    """A widget's type whose values the server passes on as they came.

    Saved workflows bring values under their neighbours' names: the server would refuse a file's
    name where it expects a number, before the node can put it back.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class AnyInputs(dict[str, Any]):
    """Optional inputs under any name besides those that are drawn."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> tuple[str, dict[str, Any]]:
        return ("*", {})


def strength_input(kind: str = "FLOAT") -> tuple[str, dict[str, Any]]:
    """A strength."""
    limits = {"min": -MAX_STRENGTH, "max": MAX_STRENGTH, "step": 0.01}
    return kind, {"default": 1.0, **limits, "tooltip": _STRENGTH_TIP}


def flag_input(default: bool, tooltip: str, kind: str = "BOOLEAN") -> tuple[str, dict[str, Any]]:
    """A switch."""
    return kind, {"default": default, "tooltip": tooltip}


def choice_input(choices: list[str], tooltip: str) -> tuple[list[str], dict[str, Any]]:
    """One of several texts, the first by default."""
    return choices, {"default": choices[0], "tooltip": tooltip}


def name_input(tooltip: str, *, skippable: bool = False) -> tuple[list[str], dict[str, Any]]:
    """A file out of the host's list; `skippable` puts "None" before them."""
    names = ["None"] if skippable else []
    return names + host.lora_names(), {"tooltip": tooltip}


def model_input(**options: Any) -> dict[str, Any]:
    """The MODEL, with more options for our part in the browser."""
    return {"model": ("MODEL", {"tooltip": _MODEL_TIP, "lazy": True, **options})}


def stack_input() -> dict[str, Any]:
    """The stack of another node."""
    return {LORA_STACK_INPUT: (LORA_STACK, {"tooltip": _STACK_TIP})}


def clip_input() -> dict[str, Any]:
    """The CLIP that a node passes on."""
    return {"clip": ("CLIP", {"tooltip": CLIP_TIP})}


def control_inputs() -> dict[str, Any]:
    """In which blocks and steps a node's LoRAs act; the defaults change nothing."""
    modes = [mode.value for mode in ScheduleMode]
    hidden = {"advanced": True}
    return {
        "blocks": ([*PRESETS, CUSTOM], {"default": ALL, "tooltip": _BLOCKS_TIP, **hidden}),
        "custom_blocks": ("STRING", {"default": "", "tooltip": _CUSTOM_TIP, **hidden}),
        "schedule": ("STRING", {"default": "", "tooltip": _SCHEDULE_TIP, **hidden}),
        "schedule_mode": (modes, {"default": modes[0], "tooltip": _MODE_TIP, **hidden}),
    }


def saved_input(name: str) -> tuple[Any, dict[str, Any]]:
    """A widget of the old nodes, by its name."""
    number, boolean = _Unconverted("FLOAT"), _Unconverted("BOOLEAN")
    field = name.rstrip("0123456789").rstrip("_")
    if field == "lora_count":
        limits = {"min": 1, "max": ROWS}
        return _Unconverted("INT"), {"default": 3, **limits, "tooltip": _COUNT_TIP}
    if field == "cpu_offload":
        return list(OFFLOAD_MODES), {"default": "disable", "tooltip": _OFFLOAD_TIP}
    if field == "lora_name":
        return name_input(SLOT_TIP, skippable=True)
    if field == "lora_strength":
        return strength_input(number)
    return flag_input(field != "save_precompiled_lora", _FLAG_TIPS[field], boolean)
