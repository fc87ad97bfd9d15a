"""The node that shows what a LoRA file holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qwenlora import read_keys
from qwenlora.words import counted

from . import host
from .inputs import CATEGORY, NAME_TIP, Schema, name_input
from .loader_nodes import validate_name

__all__ = ["QwenLoraInspect"]


class QwenLoraInspect:
    """The node that shows what a LoRA file holds."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "inspect"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = "Says what a LoRA file holds and whether it can be applied; needs no model."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        return {"required": {"lora_name": name_input(NAME_TIP)}}

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None) -> bool | str:
        """Check that the file is there."""
        return validate_name(lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None = None) -> str:
        """The file's identity."""
        return "" if lora_name is None else json.dumps(host.file_identity(lora_name))

    def inspect(self, lora_name: str) -> dict[str, Any]:
        """Run the node."""
        text = "\n".join(_describe(lora_name, read_keys(host.lora_path(lora_name))))
        return {"ui": {"text": [text]}, "result": (text,)}


def _describe(name: str, plan: Mapping[str, Any]) -> Iterator[str]:
    """Lines for a person from a FilePlan document."""
    yield f"{name}: {plan['verdict']}"
    if plan["reason"]:
        yield f"  {plan['reason']}"
    yield f"  model: {plan['model'] or 'unknown'}, {plan['size_bytes'] / 1e6:.1f} MB"
    kinds = Counter(
        (module["adapter"], module["rank"], module["supported"]) for module in plan["modules"]
    )
    for (adapter, rank, supported), count in kinds.most_common():
        ranked = "" if rank is None else f" of rank {rank}"
        modules = counted(count, "module")
        yield f"  {modules}: {adapter}{ranked}{'' if supported else ', not supported'}"
    reasons = Counter(tensor["reason"] for tensor in plan["tensors"] if tensor["reason"])
    for reason, count in reasons.most_common():
        yield f"  left out: {counted(count, 'tensor')}, {reason}"
