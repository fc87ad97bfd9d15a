"""The report on the node: after a run, from the cache, after a reload, and when inputs change."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from .conftest import WAYS
from .frontends import Frontend, Renderer
from .workbench import NOWHERE

if TYPE_CHECKING:
    from .workbench import Workbench

_LINES = """() => Object.fromEntries(app.graph.nodes
    .filter((own) => own.widgets?.some((widget) => widget.name === "qwenlora_report"))
    .map((own) => {
        const line = own.widgets.find((widget) => widget.name === "qwenlora_report").element;
        // Around it Nodes 2.0 puts what a node is higher than it need be.
        const box = line.querySelector("button").getBoundingClientRect();
        return [own.id, {state: line.dataset.state, text: line.textContent, height: box.height}];
    }))"""

_SET = """([id, name, value]) => {
    const widget = app.graph.getNodeById(id).widgets.find((own) => own.name === name);
    widget.value = value;
    widget.callback?.(value);
}"""
_LINE_HEIGHT = 22
_SHOWN_IN = 60.0
"""Seconds in which a busy machine shows a report."""
_AFTER_OPENING = 500
"""Milliseconds after which the page has asked for the reports of what was opened."""


def lines(bench: Workbench) -> dict[str, dict[str, Any]]:
    """What each of our nodes shows, by node id."""
    return bench.page.evaluate(_LINES)


def states(bench: Workbench) -> list[str]:
    """The states in the order of the nodes' ids."""
    shown = lines(bench)
    return [shown[own]["state"] for own in sorted(shown, key=int)]


def wait_for(bench: Workbench, *wanted: str) -> None:
    """Wait until the nodes show these states.

    Raises:
        AssertionError: They do not.
    """
    end = time.monotonic() + _SHOWN_IN
    while time.monotonic() < end:
        if states(bench) == list(wanted):
            return
        bench.settle()
    assert states(bench) == list(wanted), lines(bench)


def choose(bench: Workbench, node: Any, name: str, value: Any) -> None:
    """Change a widget; the click elsewhere is what the page takes for the end of an edit."""
    bench.page.evaluate(_SET, [node, name, value])
    bench.page.mouse.click(*NOWHERE)


def saved_values(workflow: dict[str, Any]) -> dict[str, list[Any] | None]:
    """The values that a file holds, by node id."""
    return {str(node["id"]): node.get("widgets_values") for node in workflow["nodes"]}


def open_panel(bench: Workbench, line: int) -> Any:
    """Click on a node's line; returns what opens."""
    bench.page.locator(".qwenlora-report button").nth(line).click()
    return bench.page.locator("dialog.qwenlora-panel")


@pytest.fixture
def part(loras, Draft):
    """A LoRA of which a part cannot be applied."""
    draft = Draft.full(4, rank=4, blocks=2)
    draft.put("transformer_blocks.0.attn.to_q", "diff_b", 5).save(loras / "part.safetensors")
    return "part.safetensors"


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_the_report_is_on_the_node(part, workbench):
    bench, page = workbench, workbench.page
    bench.settle(_AFTER_OPENING)
    first = bench.add("QwenLoraLoader", (400, 100), lora_name="style.safetensors")
    second = bench.add("QwenLoraLoader", (400, 330), lora_name=part)
    stack = bench.add("NunchakuQwenImageLoraStackV3", (780, 330))
    before = bench.saved()
    bench.chain(first, second, stack)
    wait_for(bench, "none", "none", "none")
    bench.queue()
    wait_for(bench, "complete", "amber", "complete")
    shown = lines(bench)
    assert shown[str(first)]["text"].startswith("complete: 1 LoRA on ")
    assert shown[str(second)]["text"].startswith("`part` lacks 1 (")
    assert max(own["height"] for own in shown.values()) <= _LINE_HEIGHT

    # Click for the whole.
    panel = open_panel(bench, 1)
    assert "not applied: 1 x" in panel.locator("pre").inner_text()
    assert panel.locator("header").inner_text().endswith("Something was left out")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel.locator("button", has_text="Copy").click()
    panel.locator("button", has_text="Copied").wait_for()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied.startswith("2 LoRAs on ")
    assert copied.splitlines()[-1].startswith("    not applied: 1 x")
    # The page's own keys stay away from the nodes below.
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")
    panel.wait_for(state="detached")
    assert len(lines(bench)) == 3

    # An edit makes it stale, and all behind it; the old value brings it back.
    choose(bench, second, "strength", 0.5)
    wait_for(bench, "complete", "stale", "stale")
    choose(bench, second, "strength", 1.0)
    wait_for(bench, "complete", "amber", "complete")
    choose(bench, second, "strength", 0.5)
    bench.queue()
    wait_for(bench, "complete", "amber", "complete")
    assert "x 0.5" in open_panel(bench, 1).locator("pre").inner_text()
    page.keyboard.press("Escape")

    # Nothing of it is saved or sent.
    values = saved_values(bench.saved())
    assert values[str(first)] == ["style.safetensors", 1, "all", "", "", "linear"]
    assert values[str(stack)] == saved_values(before)[str(stack)]
    assert len(values[str(stack)]) == 34
    assert "qwenlora_report" not in str(bench.prompt())

    # Opened anew it is there again, without a run.
    workflow = bench.saved()
    assert bench.problems == []
    bench.reset()
    bench.load(workflow)
    wait_for(bench, "complete", "amber", "complete")
    assert bench.problems == []


def test_results_from_the_cache_have_their_reports(part, workbench):
    """A page that did not see them made asks for them, and for those alone that are right."""
    bench = workbench
    first = bench.add("QwenLoraLoader", (400, 100), lora_name="character.safetensors")
    second = bench.add("QwenLoraLoader", (400, 330), lora_name=part, strength=0.25)
    nodes = bench.chain(first, second)
    choose(bench, nodes["sampler"], "control_after_generate", "fixed")
    workflow = bench.saved()
    bench.queue()
    bench.reload()
    bench.load(workflow)
    wait_for(bench, "complete", "amber")
    # The sampler's steps are nothing that the reports depend on; all before it is cached.
    choose(bench, nodes["sampler"], "steps", 1)
    bench.queue()
    wait_for(bench, "complete", "amber")
    bench.page.evaluate("(id) => { app.graph.getNodeById(id).mode = 4; }", first)
    bench.page.mouse.click(*NOWHERE)
    wait_for(bench, "stale", "stale")
    bench.queue()
    wait_for(bench, "stale", "amber")
    assert lines(bench)[str(second)]["text"].endswith("1 LoRA on 26 slots, rank +16, 0.9 MB")
    assert bench.problems == []


@pytest.mark.parametrize(
    "way",
    [
        pytest.param((Frontend.NEWEST, Renderer.NODES_2), id="newest-nodes2"),
        pytest.param((Frontend.OLDEST, Renderer.CANVAS), id="oldest-canvas"),
    ],
    indirect=True,
)
def test_a_node_in_a_subgraph_has_its_report(workbench):
    bench = workbench
    loader = bench.add("QwenLoraLoader", (400, 100), lora_name="style.safetensors")
    bench.chain(loader)
    bench.page.evaluate(
        "(id) => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])); }", loader
    )
    inner = """() => {
        for (const outer of (app.rootGraph ?? app.graph).nodes)
            for (const node of outer.subgraph?.nodes ?? [])
                for (const own of node.widgets ?? []) if (own.name === "qwenlora_report")
                    return [own.element.dataset.state, own.element.textContent];
    }"""
    bench.queue()
    bench.page.wait_for_function(f"() => ({inner})()?.[0] === 'complete'")
    workflow = bench.saved()
    bench.reload()
    bench.load(workflow)
    bench.page.wait_for_function(f"() => ({inner})()?.[0] === 'complete'")
    assert bench.page.evaluate(inner)[1].startswith("complete: 1 LoRA on ")


def test_the_inspector_shows_what_it_found(workbench):
    bench = workbench
    bench.add("QwenLoraInspect", (400, 100), lora_name="style.safetensors")
    bench.queue()
    wait_for(bench, "amber")
    panel = open_panel(bench, 0)
    assert panel.locator("pre").inner_text().startswith("style.safetensors: ")


def test_a_failing_server_breaks_nothing(workbench):
    """A report that a run sends is shown all the same."""
    bench = workbench
    bench.page.route("**/qwenlora/reports", lambda route: route.fulfill(status=500, body="no"))
    loader = bench.add("QwenLoraLoader", (400, 100), lora_name="qwen/light.safetensors")
    bench.chain(loader)
    bench.queue()
    wait_for(bench, "complete")
    bench.page.unroute("**/qwenlora/reports")
    bench.page.route("**/qwenlora/reports", lambda route: route.abort())
    choose(bench, loader, "strength", 0.75)
    bench.queue()
    wait_for(bench, "complete")
    assert not [own for own in bench.problems if "qwenlora" in own]
