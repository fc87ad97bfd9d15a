"""A ComfyUI and a browser for programs that make what the repository keeps."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

from .comfy_process import ComfyProcess
from .conftest import ARGUMENTS, CHROMIUM
from .frontends import Frontend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

__all__ = ["comfy_and_browser"]


@contextlib.contextmanager
def comfy_and_browser() -> Iterator[tuple[ComfyProcess, Browser]]:
    """Both, started; they end with the block."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        comfy = ComfyProcess.start(Path(folder), Frontend.NEWEST.folder)
        path = next(filter(None, map(shutil.which, CHROMIUM)), None)
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield comfy, browser
        finally:
            browser.close()
            comfy.stop()
