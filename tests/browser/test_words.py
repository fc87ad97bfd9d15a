"""Our nodes, help and errors on the page of somebody who reads Chinese."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .frontends import Frontend, Renderer
from .workbench import Workbench

pytestmark = [pytest.mark.browser, pytest.mark.slow]
LOCALES = Path(__file__).parents[2] / "locales"


@pytest.fixture
def in_chinese(comfy, loras, chromium):
    """A page in Chinese."""
    comfy.choose(**{"Comfy.Locale": "zh"})
    try:
        bench = Workbench.open(comfy, chromium, Frontend.NEWEST, Renderer.CANVAS)
    finally:
        comfy.choose(**{"Comfy.Locale": "en"})
    yield bench
    bench.close()


def test_nodes_help_and_errors_are_chinese(in_chinese):
    bench, page = in_chinese, in_chinese.page
    texts = json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    own = texts["QwenLoraLoader"]
    node = bench.add("QwenLoraLoader", (400, 100), lora_name="style.safetensors")
    shown = page.evaluate(
        """(id) => {
            const node = app.graph.getNodeById(id);
            const label = (own) => own.label ?? own.localized_name ?? own.name;
            return [node.title, node.widgets.map(label), node.outputs.map(label)];
        }""",
        node,
    )
    assert shown[0] == own["display_name"]
    assert {own["inputs"][name]["name"] for name in ("lora_name", "strength")} <= set(shown[1])
    assert [slot["name"] for slot in own["outputs"].values()] == shown[2]

    module = page.evaluate(
        "() => LiteGraph.registered_node_types.QwenLoraLoader.nodeData.python_module"
    )
    pack = module.split(".")[1]
    found = page.request.get(f"{bench.comfy.url}/extensions/{pack}/docs/QwenLoraLoader/zh.md")
    assert found.ok
    assert found.text().startswith(f"# {own['display_name']}")

    bench.chain(node)
    # Files may go between the choice and the run; rows are judged when they run.
    stack = bench.add("QwenLoraStack", (400, 500))
    bench.link(node, 0, stack, "model")
    sampler = page.evaluate("() => app.graph.findNodesByType('KSampler')[0].id")
    bench.link(stack, 0, sampler, "model")
    page.evaluate(
        """(id) => {
            const rows = app.graph.getNodeById(id).widgets.find((own) => own.name === "loras");
            rows.value = [{ lora_name: "styel.safetensors", strength: 1, enabled: true }];
        }""",
        stack,
    )
    failed = bench.try_queue()
    assert failed["status"]["status_str"] == "error"
    page.get_by_text("第 1 行: LoRA 'styel.safetensors' 不在 ComfyUI").first.wait_for()
    page.get_by_text("提示：最接近的是 'style.safetensors'").first.wait_for()
    assert bench.problems == []
