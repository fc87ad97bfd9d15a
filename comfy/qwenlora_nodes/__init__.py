"""ComfyUI's entry point: the node classes by their ids."""

from __future__ import annotations

import logging

from . import wheel
from .registry import FAULTS, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, PLACE, RUNNING
from .version import __version__

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

WEB_DIRECTORY = "web"

_log = logging.getLogger("qwenlora")


def _tell() -> None:
    """Say in one line what cannot run, or how nodes and package differ, or that all is there."""
    for fault in dict.fromkeys(FAULTS.values()):
        ids = [node_id for node_id, own in FAULTS.items() if own == fault]
        which = ", ".join(ids) if RUNNING else "the nodes of qwenlora"
        _log.error("%s cannot run: %s", which, fault)
    if not FAULTS:
        is_older, text = wheel.difference(PLACE)
        text = text or f"qwenlora {__version__}: all nodes are there"
        _log.log(logging.WARNING if is_older else logging.INFO, "%s", text)


if RUNNING:
    from .host import warn_of_rivals
    from .reports import add_route

    add_route()
    warn_of_rivals()
_tell()
