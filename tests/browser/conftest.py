"""A real ComfyUI, a real browser, and a person's hands in it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..host.comfy_host import comfy_root
from .comfy_process import ComfyProcess
from .frontends import INSTALL, Frontend, Renderer
from .workbench import Workbench

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
INSTALL_CHROMIUM = "apt-get install --no-install-recommends chromium fonts-noto-cjk"

ARGUMENTS = (
    "--no-sandbox",
    # A page whose files were laid over the server's own could not open its socket.
    "--disable-features=LocalNetworkAccessChecks",
)

WAYS = [
    pytest.param((Frontend.NEWEST, Renderer.CANVAS), id="newest-canvas"),
    pytest.param((Frontend.NEWEST, Renderer.NODES_2), id="newest-nodes2"),
    pytest.param((Frontend.BEFORE_ROWS, Renderer.CANVAS), id="1.49-canvas"),
    pytest.param((Frontend.OLDEST, Renderer.CANVAS), id="oldest-canvas"),
]
"""Every way in which people see nodes; `pytest.mark.parametrize("way", WAYS, indirect=True)`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "workbench" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyProcess]:
    """ComfyUI with our pack and the pack of emulated models; skips where it is not installed."""
    try:
        comfy_root()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    _require(Frontend.NEWEST)
    running = ComfyProcess.start(tmp_path_factory.mktemp("browser"), Frontend.NEWEST.folder)
    yield running
    running.stop()


@dataclass
class _Shown:
    """What follows from test to test.

    Attributes:
        browser: Chromium, once a test has needed it.
        pages: One page for each way: loading it takes longer than what a test does in it.
        end: Ends both.
    """

    browser: Browser | None = None
    pages: dict[tuple[Frontend, Renderer], Workbench] = field(default_factory=dict)
    end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self) -> None:
        """Leave the pages and the browser."""
        self.end.close()
        self.browser = None
        self.pages.clear()


_SHOWN = _Shown()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        return (yield)
    finally:
        # Its driver keeps an event loop that other tests would meet, and no page is quite idle.
        if nextitem is None or not nextitem.path.is_relative_to(Path(__file__).parent):
            _SHOWN.close()


@pytest.fixture
def chromium() -> Browser:
    """The browser, until a test of another folder follows."""
    if _SHOWN.browser is not None:
        return _SHOWN.browser
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make setup")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"needs Chromium: {INSTALL_CHROMIUM}")
    playwright = _SHOWN.end.enter_context(sync_api.sync_playwright())
    browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
    _SHOWN.end.callback(browser.close)
    _SHOWN.browser = browser
    return browser


@pytest.fixture
def way(request: pytest.FixtureRequest) -> tuple[Frontend, Renderer]:
    """The frontend and renderer of a test: one of `WAYS` where it is parametrized, indirectly."""
    return getattr(request, "param", (Frontend.NEWEST, Renderer.CANVAS))


@cache
def _three(draft: Any) -> dict[str, bytes]:
    """The files of three LoRAs by their names."""
    seeds = {"style": 1, "character": 2, "qwen/light": 3}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "one.safetensors")
        files = {}
        for name, seed in seeds.items():
            draft.full(seed, rank=4, blocks=2).save(path)
            files[name] = path.read_bytes()
    return files


@pytest.fixture
def loras(comfy: ComfyProcess, Draft) -> Iterator[Path]:
    """The folder with three LoRAs: `style`, `character`, and `qwen/light`; others go afterwards."""
    for name, content in _three(Draft).items():
        path = comfy.loras / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    yield comfy.loras
    shutil.rmtree(comfy.loras)
    comfy.loras.mkdir()


@pytest.fixture
def pages() -> dict[tuple[Frontend, Renderer], Workbench]:
    """The pages that are open."""
    return _SHOWN.pages


@pytest.fixture
def workbench(
    comfy: ComfyProcess,
    loras: Path,
    chromium: Browser,
    way: tuple[Frontend, Renderer],
    pages: dict[tuple[Frontend, Renderer], Workbench],
) -> Workbench:
    """An empty canvas, as on a page that was just loaded."""
    frontend, renderer = way
    _require(frontend)
    if way in pages:
        pages[way].reset()
    else:
        pages[way] = Workbench.open(comfy, chromium, frontend, renderer)
    return pages[way]


def _require(frontend: Frontend) -> None:
    if not frontend.folder.is_dir():
        pytest.skip(f"needs ComfyUI's frontend {frontend.value}: {INSTALL}")
