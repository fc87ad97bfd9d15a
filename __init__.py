"""Registers the ComfyUI nodes where this repository is cloned into `custom_nodes`.

The library itself is installed from its wheel.
"""

import sys

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

WEB_DIRECTORY = "comfy/qwenlora_nodes/web"

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

# Test runners import this file, too, as the package that their root seems to be.
if "folder_paths" in sys.modules:
    from .comfy.qwenlora_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
