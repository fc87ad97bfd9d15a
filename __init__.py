"""Registers the ComfyUI nodes where this repository is cloned into `custom_nodes`.

The library itself is installed from its wheel.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

WEB_DIRECTORY = "comfy/qwenlora_nodes/web"

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

_PACKAGE = "qwenlora"


def give_way() -> None:
    """Load the installed package under the name that was asked for.

    A clone may be named like it, and another pack may put `custom_nodes` on Python's path.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = _installed()
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(
            f"the package `{_PACKAGE}` is not installed: {Path(__file__).parent} holds its ComfyUI"
            " nodes only",
            name=_PACKAGE,
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = module
    spec.loader.exec_module(module)


def _installed() -> ModuleSpec | None:
    """Find the package on Python's path; it has a Rust part, which no clone has at that place."""
    for folder in sys.path:
        spec = PathFinder.find_spec(_PACKAGE, [folder])
        if spec is not None and spec.origin and any(Path(spec.origin).parent.glob("_core.*")):
            return spec
    return None


if __name__ == _PACKAGE:
    give_way()
# Test runners import this file, too, as the package that their root seems to be.
elif "folder_paths" in sys.modules:
    from .comfy.qwenlora_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
