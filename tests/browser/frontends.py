"""The frontends that tests run, each in a folder of its own."""

from __future__ import annotations

import enum
import sys
from pathlib import Path

INSTALL = "make test-python"


class Frontend(enum.Enum):
    """A version of `comfyui-frontend-package`."""

    OLDEST = "1.32.9"
    """ComfyUI 0.3.75's own."""

    BEFORE_ROWS = "1.49.6"
    """ComfyUI 0.33's own; it knows no growing rows."""

    NEWEST = "1.58.1"

    @property
    def folder(self) -> Path:
        """Where its files lie, whether they are there or not."""
        installed = Path(sys.prefix, "frontends", self.value)
        return installed / "comfyui_frontend_package" / "static"


class Renderer(enum.Enum):
    """What draws the nodes."""

    CANVAS = "canvas"
    """LiteGraph's canvas, which is what a new user sees."""

    NODES_2 = "nodes 2.0"
    """Vue components in the document."""
