"""ComfyUI's entry point: the node classes by their ids."""

from __future__ import annotations

import logging

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

WEB_DIRECTORY = "web"

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

try:
    import qwenlora

    # Its Rust part is loaded with the first name that needs it.
    qwenlora.read_keys  # noqa: B018
except ImportError as error:
    logging.getLogger("qwenlora").error(
        "no qwenlora nodes: %s (run `pip install -r requirements.txt` in the node's folder, with"
        " ComfyUI's Python)",
        error,
    )
else:
    from .host import warn_of_rivals
    from .registry import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .reports import add_route

    add_route()
    warn_of_rivals()
