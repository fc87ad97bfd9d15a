"""The nodes by their ids, and their names on the canvas.

A node whose module cannot be imported is a stub, which says why: see `stubs.py`.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING

from . import install, stubs, wheel

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FAULTS", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "PLACE", "RUNNING"]

_log = logging.getLogger("qwenlora")

# Each node's class has its id for a name.
_HOMES: dict[str, tuple[str, ...]] = {
    "loader_nodes": ("QwenLoraLoader", "QwenLoraStack"),
    "enable_node": ("QwenLoraEnable",),
    "inspect_node": ("QwenLoraInspect",),
    "merge_node": ("QwenLoraMerge",),
    "saved_nodes": (
        "NunchakuQwenImageLoraLoader",
        "NunchakuQwenImageLoraStack",
        "NunchakuQwenImageLoraStackV1",
        "NunchakuQwenImageLoraStackV2",
        "NunchakuQwenImageLoraStackV3",
        "NunchakuZImageTurboLoraStackV1",
        "NunchakuZImageTurboLoraStackV2",
        "NunchakuZImageTurboLoraStackV3",
        "NunchakuZImageTurboLoraStackV4",
    ),
}

_NAMES: dict[str, str] = {
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


def _load() -> tuple[dict[str, type], dict[str, str]]:
    """The nodes that can run, and why others cannot, both by their ids."""
    fault = wheel.find_fault(PLACE)
    nodes: dict[str, type] = {}
    faults: dict[str, str] = {}
    for home, ids in _HOMES.items():
        own = fault
        if own is None:
            try:
                module = importlib.import_module(f".{home}", __package__)
                nodes.update({node_id: getattr(module, node_id) for node_id in ids})
            except Exception as error:  # noqa: BLE001 - a node that is missing says nothing
                own = wheel.fault_of_import(error, PLACE)
                if not isinstance(error, (ImportError, SyntaxError)):
                    # Nobody has foreseen it: whoever mends it needs the place.
                    _log.exception("%s cannot be imported", home)
        if own is not None:
            faults.update(dict.fromkeys(ids, own))
    return nodes, faults


def _stubs(faults: Mapping[str, str]) -> dict[str, type]:
    """Stubs for nodes that cannot run, but where another pack has one of that id that can."""
    taken = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    shapes = stubs.read_shapes() if faults else {}
    return {
        node_id: stubs.stub_of(node_id, shapes[node_id], fault)
        for node_id, fault in faults.items()
        if node_id not in taken
    }


PLACE = install.here()
"""Where the nodes run, for commands that mend."""

RUNNING, FAULTS = _load()
"""The nodes that can run, and why others cannot, both by their ids."""

NODE_CLASS_MAPPINGS: dict[str, type] = {**RUNNING, **_stubs(FAULTS)}

NODE_DISPLAY_NAME_MAPPINGS = {name: _NAMES[name] for name in NODE_CLASS_MAPPINGS}
