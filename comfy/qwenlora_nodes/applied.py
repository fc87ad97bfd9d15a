"""The LoRAs of a MODEL as text, for an image's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenlora import LoraSet

__all__ = ["applied_text"]


def applied_text(wanted: LoraSet | None) -> str:
    """`<lora:name:strength>` of each LoRA, in order; empty where there is none."""
    if wanted is None:
        return ""
    pairs = zip(wanted.names, wanted.specs, strict=True)
    return " ".join(f"<lora:{name}:{spec.strength:g}>" for name, spec in pairs)
