"""The node that shows what a LoRA file holds, what it says of itself, and where it acts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from qwenlora import LoraSpec, QwenLoraError, read_keys
from qwenlora.about import About
from qwenlora.map.job import map_loras
from qwenlora.map.png import to_image
from qwenlora.map.scene import scene_of, scene_of_text
from qwenlora.plan.documents import read_producer

from . import host
from .description import describe
from .inputs import CATEGORY, NAME_TIP, Schema, name_input
from .loader_nodes import validate_name
from .node_report import NodeReport, with_report

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image

__all__ = ["QwenLoraInspect"]

_NONE = "None"
_OTHER_TIP = "A second LoRA, drawn below the first on the same scale. 'None' for none."


class QwenLoraInspect:
    """The node that shows what a LoRA file holds, what it says of itself, and where it acts."""

    RETURN_TYPES = ("STRING", "IMAGE", "STRING")
    RETURN_NAMES = ("report", "image", "trigger_words")
    OUTPUT_TOOLTIPS = (
        "What the file holds, and whether it can be applied.",
        "Where it acts, and how strongly: blocks by kinds of layer.",
        "Trigger words that the file names; else the most frequent tags of its pictures.",
    )
    FUNCTION = "inspect"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Says what a LoRA file holds and whether it can be applied, and draws where it acts; needs"
        " no model."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "lora info",
        "lora metadata",
        "trigger words",
        "lora inspector",
    ]

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        return {
            "required": {"lora_name": name_input(NAME_TIP)},
            "optional": {"other": name_input(_OTHER_TIP, skippable=True)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None) -> bool | str:
        """Check that the file is there; `other` the server checks against the list itself.

        What is said here the server puts at every input that is taken.
        """
        return validate_name(lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None, other: str | None = None) -> str:
        """The files' identities."""
        names = [name for name in (lora_name, other) if name not in (None, _NONE)]
        return json.dumps([host.file_identity(name) for name in names if name is not None])

    def inspect(self, lora_name: str, other: str = _NONE) -> dict[str, Any]:
        """Run the node."""
        names = [lora_name] + ([] if other == _NONE else [other])
        plans = [read_keys(host.lora_path(name)) for name in names]
        lines: list[str] = []
        for name, plan in zip(names, plans, strict=True):
            lines += describe(name, plan, read_producer(host.lora_path(name)))
        text = "\n".join(lines)
        words = About.of(plans[0]["metadata"]).prompt_words
        image = _picture(names)
        pixels = np.asarray(image, dtype=np.float32) / 255
        # (1, height, width, 3), 0 to 1
        outputs = (text, torch.from_numpy(pixels)[None], words)
        shown = {"text": [text], "images": [host.preview(image, "qwenlora_map")]}
        return with_report(_report(names, plans, text), *outputs, **shown)


def _report(names: Sequence[str], plans: Sequence[Mapping[str, Any]], text: str) -> NodeReport:
    """What is shown on the node: the verdicts, the worse ones with their reasons."""
    verdicts = [
        f"{plan['verdict']}: {plan['reason'] or name}"
        for name, plan in zip(names, plans, strict=True)
    ]
    whole = all(plan["verdict"] == "apply" for plan in plans)
    return NodeReport("; ".join(verdicts), text, complete=whole)


def _picture(names: Sequence[str]) -> Image:
    """The maps of files; of what cannot be mapped a picture of the reason."""
    maps = []
    for name in names:
        try:
            spec = LoraSpec(host.lora_path(name), name=name)
            maps.append(map_loras([spec], progress=_progress))
        except QwenLoraError as error:
            return to_image(scene_of_text(f"No map: {name}", str(error)))
    return to_image(scene_of(maps))


def _progress(done: int, total: int) -> None:
    host.progress("map", done, total)
