"""A page whose server has the nodes without a package that they can use."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from .comfy_process import REPOSITORY, ComfyProcess
from .conftest import WAYS
from .frontends import Frontend
from .workbench import Workbench

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

PACKAGE = REPOSITORY / "python" / "qwenlora"
SAID = "qwenlora lacks its Rust part, in"
ROWS = [
    {"lora_name": "style.safetensors", "strength": 0.8, "enabled": True},
    {"lora_name": "qwen/light.safetensors", "strength": -1, "enabled": False},
]

_KEPT = ("type", "inputs", "outputs", "widgets_values", "size", "mode", "properties")


@pytest.fixture(scope="module")
def without_wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyProcess]:
    """ComfyUI with our pack, and a package that was copied without its Rust part."""
    packages = tmp_path_factory.mktemp("packages")
    left_out = shutil.ignore_patterns("_core.*so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, packages / "qwenlora", ignore=left_out)
    base = tmp_path_factory.mktemp("without")
    running = ComfyProcess.start(base, Frontend.NEWEST.folder, packages=packages)
    for folder, name in (("loras", "style"), ("loras", "character"), ("diffusion_models", "model")):
        path = base / "models" / folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    yield running
    running.stop()


@pytest.fixture
def stubs(
    without_wheel: ComfyProcess, workbench: Workbench, chromium: Browser
) -> Iterator[Workbench]:
    """A page of its own, shown as `workbench` is."""
    bench = Workbench.open(without_wheel, chromium, workbench.frontend, workbench.renderer)
    yield bench
    bench.close()


def draw(bench: Workbench) -> None:
    """A workflow that loads a model, gives it LoRAs, and saves them."""
    model = bench.add("UNETLoader", (20, 100))
    one = bench.add("QwenLoraLoader", (340, 60), lora_name="style.safetensors", strength=0.3)
    stack = bench.add("QwenLoraStack", (340, 360), loras=ROWS, blocks="style")
    old = bench.add(
        "NunchakuQwenImageLoraStackV3",
        (760, 60),
        lora_count=2,
        lora_name_1="style.safetensors",
        lora_strength_2=0.25,
        cpu_offload="enable",
    )
    merge = bench.add("QwenLoraMerge", (760, 500), filename_prefix="loras/both", rank=8)
    bench.add("QwenLoraInspect", (1140, 100), lora_name="character.safetensors")
    for giver, taker in ((model, one), (one, stack), (stack, old), (old, merge)):
        bench.link(giver, 0, taker, "model")


def kept(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file has of each node of ours."""
    return [
        {name: node.get(name) for name in _KEPT}
        for node in workflow["nodes"]
        if node["type"] != "UNETLoader"
    ]


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)
def test_a_workflow_is_opened_queued_and_saved_without_a_wheel(workbench, stubs):
    asked: list[str] = []
    stubs.listen("request", lambda own: "/qwenlora/" in own.url and asked.append(own.url))
    draw(workbench)
    saved = workbench.saved()
    stubs.load(saved)
    assert kept(stubs.saved()) == kept(saved)
    assert len(kept(saved)) == 5
    assert stubs.saved()["links"] == saved["links"]
    assert stubs.page.get_by_text("missing", exact=False).count() == 0
    lines = stubs.page.locator(".qwenlora-report[data-state=blocked]")
    assert [SAID in text for text in lines.all_inner_texts()] == [True] * 5

    values = "(name) => { app.graph.nodes.find((own) => own.type === 'UNETLoader').widgets[0]"
    stubs.page.evaluate(f"{values}.value = name; }}", "model.safetensors")
    refused = stubs.try_queue()["node_errors"]
    ours = [str(node["id"]) for node in saved["nodes"] if node["type"] != "UNETLoader"]
    assert sorted(refused) == sorted(ours)
    for own in refused.values():
        (error,) = own["errors"]
        assert SAID in error["details"]
    lines.first.locator("button").click()
    panel = stubs.page.locator("dialog.qwenlora-panel")
    assert SAID in panel.locator("pre").inner_text()
    assert panel.locator("header").inner_text().endswith("This node cannot run")
    stubs.page.keyboard.press("Escape")
    # An edit asks the server for no reports, which has none.
    stubs.page.mouse.click(1250, 700)
    stubs.settle(600)
    assert asked == []
    assert stubs.problems == []
    assert kept(stubs.saved()) == kept(saved)
