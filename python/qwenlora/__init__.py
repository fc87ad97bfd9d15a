"""The LoRA engine for 4-bit (SVDQuant) Qwen-Image and Z-Image models.

Names are loaded when they are first used, so that reading keys needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qwenlora.requirements import require

if TYPE_CHECKING:
    from types import ModuleType

    from qwenlora import compat, emulation
    from qwenlora._core import __version__
    from qwenlora.blocks import BlockFactors
    from qwenlora.cache import clear_cache
    from qwenlora.compose.compose import applied, compose_loras, reset_loras
    from qwenlora.errors import QwenLoraError
    from qwenlora.lora_set import LoraSet
    from qwenlora.pipeline.attach import attach, detach
    from qwenlora.plan.documents import read_keys
    from qwenlora.report import ComposeReport
    from qwenlora.runtime import ComfyQwenImageWrapper
    from qwenlora.schedule import Schedule, ScheduleMode
    from qwenlora.spec import ComposeOptions, LoraSpec, Placement

__all__ = [
    "BlockFactors",
    "ComfyQwenImageWrapper",
    "ComposeOptions",
    "ComposeReport",
    "LokrScale",
    "LoraSet",
    "LoraSpec",
    "Placement",
    "QwenLoraError",
    "Schedule",
    "ScheduleMode",
    "__version__",
    "applied",
    "attach",
    "clear_cache",
    "compat",
    "compose_loras",
    "detach",
    "emulation",
    "read_keys",
    "reset_loras",
]

_HOMES = {
    "BlockFactors": "blocks",
    "ComfyQwenImageWrapper": "runtime",
    "ComposeOptions": "spec",
    "ComposeReport": "report",
    "LokrScale": "spec",
    "LoraSet": "lora_set",
    "LoraSpec": "spec",
    "Placement": "spec",
    "QwenLoraError": "errors",
    "Schedule": "schedule",
    "ScheduleMode": "schedule",
    "__version__": "_core",
    "applied": "compose.compose",
    "attach": "pipeline.attach",
    "clear_cache": "cache",
    "compose_loras": "compose.compose",
    "detach": "pipeline.attach",
    "read_keys": "plan.documents",
    "reset_loras": "compose.compose",
}
_MODULES = ("_core", "compat", "emulation", "errors")
_ON_TORCH = frozenset(
    {
        "ComfyQwenImageWrapper",
        "LoraSet",
        "applied",
        "attach",
        "clear_cache",
        "compose_loras",
        "detach",
        "reset_loras",
    }
)
"""Names that need the packages of the extra `torch`; modules that do check by themselves."""


def __getattr__(name: str) -> Any:
    if name in _ON_TORCH:
        require()
    if name in _MODULES:
        return _imported(name)
    if name not in _HOMES:
        raise AttributeError(f"module 'qwenlora' has no attribute {name!r}")
    value = getattr(_imported(_HOMES[name]), name)
    globals()[name] = value
    return value


def _imported(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"qwenlora.{module}")
    except ModuleNotFoundError as error:
        if error.name == "qwenlora._core":
            raise ImportError(
                "the Rust part of qwenlora is not installed: run `pip install qwenlora`"
            ) from error
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
