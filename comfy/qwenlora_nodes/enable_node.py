"""The node that makes ComfyUI's own LoRA nodes work on a Nunchaku model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from qwenlora.compose.planning import plan_report

from . import host, native
from .inputs import CATEGORY, Schema
from .node_report import NodeReport, with_report

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

__all__ = ["QwenLoraEnable"]

_MODEL_TIP = (
    "The model from `Nunchaku Qwen Image DiT Loader` or `Nunchaku Z-Image DiT Loader`. LoRA loaders"
    " that stand before this node have no effect: put them behind it."
)


class QwenLoraEnable:
    """Enables the LoRA nodes of ComfyUI and of other packs behind it."""

    DESCRIPTION = (
        "Behind this node LoRA nodes work on a Nunchaku model as on any other: Load LoRA, Power"
        " Lora Loader, LoRA hooks and schedules. Put it right after the model loader. The loaders"
        " of qwenlora do the same by themselves."
    )
    SEARCH_ALIASES: ClassVar[list[str]] = [
        "nunchaku lora",
        "enable lora",
        "lora hooks",
        "load lora",
        "power lora loader",
        "qwen image lora",
    ]
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("model", "report")
    OUTPUT_TOOLTIPS: ClassVar[tuple[str, ...]] = (
        "The model for other LoRA nodes, and for anything else.",
        "What the model's LoRAs so far will apply, and what not.",
    )
    FUNCTION = "enable"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> Schema:
        """The inputs that the host draws."""
        return {"required": {"model": ("MODEL", {"tooltip": _MODEL_TIP})}}

    def enable(self, model: ModelPatcher) -> dict[str, Any]:
        """Run the node; a model that is enabled already is passed on as it is."""
        host.warn_of_rivals()
        enabled = native.enable(model)
        line = "LoRA nodes of ComfyUI and of other packs work on this model"
        report = NodeReport(line, line)
        wanted = native.wanted_set(enabled)
        if wanted is not None and wanted.specs:
            plan = plan_report(host.transformer_of(enabled), wanted)
            report = NodeReport.of(plan, plan.text())
        if notice := host.patches_notice(enabled):
            report = replace(report, text=f"{report.text}\n  {notice}")
        return with_report(report, enabled, report.text)
