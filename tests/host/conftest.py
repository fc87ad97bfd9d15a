"""A real ComfyUI for the tests in this folder, and small models that it samples."""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING

import pytest

from .comfy_host import ComfyHost, Device, Graph, comfy_root

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[ComfyHost]:
    """ComfyUI, imported and serving; skips where it is not installed.

    On the GPU where only tests that need one are run (`pytest -m gpu`), else on the CPU.
    """
    try:
        comfy_root()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    here = [item for item in request.session.items if "host" in item.fixturenames]
    device = Device.CUDA if all("gpu" in item.keywords for item in here) else Device.CPU
    running = ComfyHost.start(tmp_path_factory.mktemp("comfy"), device)
    # It collects cycles for each graph: not through all of its own modules.
    gc.collect()
    gc.freeze()
    yield running
    running.stop()


@pytest.fixture(scope="module", autouse=True)
def _kept_modules() -> Iterator[None]:
    """What the tests of a module imported stays, torch's compiler above all: see `host`."""
    yield
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def z_image(host: ComfyHost) -> ModuleType:
    """The module `small_z_image`: `small_z_image`, `conditioning`, `forward`, `ksample`."""
    return importlib.import_module(".small_z_image", __package__)


@pytest.fixture(scope="session")
def nunchaku_z_image(host: ComfyHost) -> ModuleType:
    """The module `emulated_z_image`: the same built as ComfyUI-nunchaku builds it."""
    return importlib.import_module(".emulated_z_image", __package__)


@pytest.fixture
def small_qwen(graph: Graph, qwen: ModuleType):
    """A dense two-block Qwen-Image of ComfyUI's own classes, under its ModelPatcher."""
    return qwen.small_qwen()


@pytest.fixture
def emulated_qwen(small_qwen, nunchaku: ModuleType):
    """The same weights as `small_qwen` in emulated Nunchaku leaves, under a patcher like theirs."""
    return nunchaku.emulated_qwen(small_qwen)


@pytest.fixture
def cuda_host(host: ComfyHost) -> ComfyHost:
    """The host where it loads models on a GPU."""
    if host.device is not Device.CUDA:
        pytest.skip("ComfyUI runs on the CPU beside other tests: select these with `-m gpu`")
    return host
