"""A real ComfyUI for the tests in this folder, and small Qwen-Image models that it samples."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

import qwenlora.runtime

from .comfy_host import ComfyHost, Graph, comfy_root


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyHost]:
    """ComfyUI, imported and serving; skips where it is not installed."""
    try:
        comfy_root()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    running = ComfyHost.start(tmp_path_factory.mktemp("comfy"))
    yield running
    running.stop()


@pytest.fixture
def graph(host: ComfyHost) -> Iterator[Graph]:
    """Runs graphs; afterwards no model stays loaded and no node pack registered."""
    runner = Graph(host)
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def qwen(host: ComfyHost) -> ModuleType:
    """The module `small_qwen`: `small_qwen`, `conditioning`, `empty_latent`, `ksample`."""
    return importlib.import_module(".small_qwen", __package__)


@pytest.fixture(scope="session")
def nunchaku(host: ComfyHost) -> ModuleType:
    """The module `emulated_qwen`: `emulated_qwen` and the classes that imitate ComfyUI-nunchaku."""
    return importlib.import_module(".emulated_qwen", __package__)


@pytest.fixture
def small_qwen(graph: Graph, qwen: ModuleType):
    """A dense two-block Qwen-Image of ComfyUI's own classes, under its ModelPatcher."""
    return qwen.small_qwen()


@pytest.fixture
def emulated_qwen(small_qwen, nunchaku: ModuleType):
    """The same weights as `small_qwen` in emulated Nunchaku leaves, under a patcher like theirs."""
    return nunchaku.emulated_qwen(small_qwen)


@pytest.fixture
def composed(monkeypatch):
    """Sets that the runtime composed, in order."""
    seen = []
    bring = qwenlora.runtime.bring

    def counting(module, wanted, **options):
        seen.append(wanted)
        return bring(module, wanted, **options)

    monkeypatch.setattr("qwenlora.runtime.bring", counting)
    return seen
