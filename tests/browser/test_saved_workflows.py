"""Workflows of the nodes that ours stand in for: opened, changed, queued, saved and converted."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest

from .conftest import WAYS
from .frontends import Frontend, Renderer
from .saved_files import DEFAULTS, AllBranches, SavedNode, saved_nodes
from .workbench import SIZE, Workbench

FIRST, SECOND, THIRD = "style.safetensors", "character.safetensors", "qwen/light.safetensors"
_STEP_BACK = 10.0
"""Seconds in which a busy machine has taken a step back."""

FIELDS = ("enabled", "lora_name", "lora_strength")

_SHOWN = """(ids) => ids.map((id) => {
    const node = app.graph.getNodeById(id);
    return {
        values: Object.fromEntries(node.widgets.map((own) => [own.name, own.value])),
        hidden: node.widgets.filter((own) => own.hidden).map((own) => own.name),
        height: node.size[1],
        least: node.computeSize()[1],
    };
})"""

_CENTER = """(id) => {
    app.canvas.ds.scale = 1;
    app.canvas.centerOnNode(app.graph.getNodeById(id));
    app.canvas.setDirty(true, true);
}"""

_HAS = "(kind) => app.graph.nodes.some((own) => own.type === kind)"
_CONVERTED = "() => !JSON.stringify((app.rootGraph ?? app.graph).serialize()).includes('Nunchaku')"

_PLACE = """([id, name]) => {
    const node = app.graph.getNodeById(id);
    const widget = node.widgets.find((own) => own.name === name);
    const box = app.canvas.canvas.getBoundingClientRect();
    const at = (x, y) => {
        const [left, top] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + x, node.pos[1] + y]);
        return [box.x + left, box.y + top];
    };
    return [at(node.size[0] / 2, widget.last_y + 10), at(node.size[0] - 24, widget.last_y + 10)];
}"""


def one(kind: str, by: str = "") -> SavedNode:
    """The first node of a kind."""
    return next(own for own in saved_nodes() if own.type.endswith(kind) and by in own.by)


def one_of_each() -> tuple[SavedNode, ...]:
    """A node of each id, and those with a setting that needs a thought."""
    found: dict[str, SavedNode] = {}
    for saved in saved_nodes():
        settings = {name: value for name, value in saved.settings.items() if name != "cpu_offload"}
        found.setdefault(json.dumps([saved.type, settings]), saved)
    return tuple(found.values())


def shown(bench: Workbench, made: AllBranches) -> list[dict[str, Any]]:
    """Values and hidden widgets of the nodes under test."""
    found: list[dict[str, Any]] = bench.page.evaluate(_SHOWN, made.ids)
    return found


def rows_of(values: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """All rows that the values hold, those that are hidden, too."""
    if "lora_name" in values:
        return [(values["lora_name"], values["lora_strength"], True)]
    count = sum(name.startswith("lora_name_") for name in values)
    return [
        (values[f"lora_name_{i}"], values[f"lora_strength_{i}"], values.get(f"enabled_{i}", True))
        for i in range(1, count + 1)
    ]


def assert_shows(saved: SavedNode, node: dict[str, Any]) -> None:
    """The right values in the right widgets, unused rows hidden, and no room left for them."""
    values = node["values"]
    count = len(saved.rows)
    rows = rows_of(values)
    expected = [(name.replace("\\", "/"), *rest) for name, *rest in (*saved.rows, *saved.unused)]
    assert rows == expected + [("None", 1, True)] * (len(rows) - len(expected)), saved
    for name, default in DEFAULTS.items():
        if name in values:
            assert values[name] == saved.settings.get(name, default), (name, saved)
    if "lora_count" in values:
        assert values["lora_count"] == count, saved
    unused = {f"{field}_{i}" for field in FIELDS for i in range(count + 1, len(rows) + 1)}
    assert set(node["hidden"]) == unused & set(values), saved
    if not saved.type.endswith("Loader"):
        assert node["height"] == node["least"], saved


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_every_saved_node_shows_its_values_and_is_saved_in_one_form(workbench):
    is_newest = workbench.frontend is Frontend.NEWEST
    nodes = saved_nodes() if is_newest else one_of_each()
    made = AllBranches.of(nodes, sampled=False)
    workbench.load(made.graph)
    for saved, node in zip(nodes, shown(workbench, made), strict=True):
        assert_shows(saved, node)
    first = workbench.saved()
    sent = workbench.prompt()
    own = zip(nodes, under_test(first, made), shown(workbench, made), strict=True)
    for saved, node, now in own:
        names = todays_names(workbench, saved)
        assert node["widgets_values"] == [now["values"][name] for name in names], saved
        inputs = sent[str(node["id"])]["inputs"]
        assert {name: inputs[name] for name in names} == {
            name: now["values"][name] for name in names
        }, saved
        assert set(inputs) == {"model", *names}, saved
    # As a frontend reads it that saves names, too, and as one that does not.
    for graph in (first, without_names(first)):
        workbench.load(graph)
        for saved, node in zip(nodes, shown(workbench, made), strict=True):
            assert_shows(saved, node)
        again = workbench.saved()
        assert [node["widgets_values"] for node in under_test(again, made)] == [
            node["widgets_values"] for node in under_test(first, made)
        ]
    assert workbench.problems == []


def under_test(graph: dict[str, Any], made: AllBranches) -> list[dict[str, Any]]:
    by_id = {node["id"]: node for node in graph["nodes"]}
    return [by_id[number] for number in made.ids]


def without_names(graph: dict[str, Any]) -> dict[str, Any]:
    graph = copy.deepcopy(graph)
    for node in graph["nodes"]:
        node.pop("widgets_values_named", None)
    return graph


def todays_names(bench: Workbench, saved: SavedNode) -> list[str]:
    """The widgets in today's order, as the server has them."""
    if saved.type.endswith("Loader"):
        return ["lora_name", "lora_strength", "cpu_offload", "save_precompiled_lora"]
    definition = bench.comfy.request(f"/object_info/{saved.type}")[saved.type]
    names: list[str] = definition["input"]["required"]["model"][1]["qwenlora_layouts"][0]
    fields = [name.removesuffix("_1") for name in names if name.endswith("_1")]
    more = range(11, len(saved.rows) + 1)
    return [*names, *(f"{field}_{i}" for i in more for field in fields)]


# ---- what a person does ----


def press(bench: Workbench, node: int, name: str, *, more: bool = False) -> None:
    """Click a widget in its middle, or at what makes its number larger."""
    bench.page.evaluate(_CENTER, node)
    bench.settle(100)
    if bench.renderer is Renderer.NODES_2:
        widget = bench.page.locator(f"[data-node-id='{node}'] [data-widget-name='{name}']")
        target = widget.get_by_test_id("increment") if more else widget.locator("button").last
        target.click()
    else:
        middle, right = bench.page.evaluate(_PLACE, [node, name])
        bench.page.mouse.click(*(right if more else middle))
    # A click that follows sooner is a double click to the canvas.
    bench.settle(350)


def drawn_rows(bench: Workbench, node: int) -> int:
    """Rows that are on the screen."""
    if bench.renderer is Renderer.NODES_2:
        own = bench.page.locator(f"[data-node-id='{node}'] [data-widget-name^='lora_name_']")
        return own.count()
    count: int = bench.page.evaluate(
        """(id) => {
            const node = app.graph.getNodeById(id);
            const names = node.widgets.filter((own) => own.name.startsWith('lora_name_'));
            return names.filter((own) => node.isWidgetVisible(own)).length;
        }""",
        node,
    )
    return count


@pytest.mark.parametrize("way", [*WAYS[:2], WAYS[-1]], indirect=True)
def test_old_stacks_are_changed_with_the_mouse_queued_saved_and_opened_again(workbench):
    nodes = (
        one("StackV2", "2.2.5"),
        one("QwenImageLoraStackV1", "one row off"),
        one("QwenImageLoraStackV3", "2.2.5"),
    )
    made = AllBranches.of(nodes)
    workbench.load(made.graph)
    counted, dicts, switched = made.ids
    assert [drawn(workbench, node) for node in made.ids] == [3, 3, 3]

    press(workbench, counted, "lora_strength_1", more=True)
    raised = workbench.values(counted)["lora_strength_1"]
    assert raised > 0.7
    press(workbench, counted, "lora_count", more=True)
    assert workbench.values(counted)["lora_count"] == 4
    assert drawn(workbench, counted) == 4

    press(workbench, dicts, "Add LoRA")
    assert drawn(workbench, dicts) == 4

    press(workbench, switched, "toggle_all")
    values = workbench.values(switched)
    assert [values[f"enabled_{i}"] for i in range(1, 5)] == [False, False, False, True]

    found = hashes(workbench, made)
    saved = workbench.saved()
    workbench.load(without_names(saved))
    assert workbench.values(counted)["lora_strength_1"] == raised
    assert [drawn(workbench, node) for node in made.ids] == [4, 3, 3]
    assert [node["widgets_values"] for node in under_test(workbench.saved(), made)] == [
        node["widgets_values"] for node in under_test(saved, made)
    ]
    abc = [(FIRST, raised), (SECOND, 0.9), (THIRD, 1.25)]
    ac = [(FIRST, 0.7), (THIRD, 1.25)]
    assert found == hashes_of_stacks(workbench, abc, ac, [])
    assert workbench.problems == []


def drawn(bench: Workbench, node: int) -> int:
    """Rows that are on the screen once the node is in its middle."""
    bench.page.evaluate(_CENTER, node)
    bench.settle(100)
    return drawn_rows(bench, node)


def hashes_of_stacks(bench: Workbench, *stacks: list[tuple[str, float]]) -> list[str]:
    """The hashes of latents that a `QwenLoraStack` of such rows gives."""
    made = AllBranches.of(tuple(SavedNode("", [], {}, new_stack(rows)) for rows in stacks))
    bench.load(made.graph)
    return hashes(bench, made)


def new_stack(rows: list[tuple[str, float]]) -> dict[str, Any]:
    """A node as it is saved today."""
    value = [{"lora_name": name, "strength": strength, "enabled": True} for name, strength in rows]
    return {
        "type": "QwenLoraStack",
        "size": [400, 200],
        "inputs": [{"name": "model", "type": "MODEL", "link": None}],
        "outputs": [{"name": "model", "type": "MODEL", "links": None}],
        "properties": {},
        "widgets_values": [value],
    }


def hashes(bench: Workbench, made: AllBranches) -> list[str]:
    """Queue the workflow; the hash of each branch."""
    outputs = bench.queue()["outputs"]
    return [outputs[str(number)]["text"][0] for number in made.shown]


# ---- into today's nodes ----


def types_of(bench: Workbench) -> set[str]:
    return {node["type"] for node in bench.saved()["nodes"]}


def ends_of_links(bench: Workbench) -> set[tuple[str, int, str, int]]:
    """The links by the places of their nodes, which new nodes share with the old."""
    graph = bench.saved()
    place = {node["id"]: json.dumps(node["pos"]) for node in graph["nodes"]}
    links = graph["links"]
    return {(place[giver], out, place[taker], slot) for _, giver, out, taker, slot, _ in links}


def undo(bench: Workbench, types: set[str]) -> None:
    """Step back until these nodes of ours are there.

    What else the frontend has noted meanwhile, a node's size for one, is a step of its own.
    """
    for _ in range(3):
        bench.page.keyboard.press("Control+z")
        end = time.monotonic() + _STEP_BACK
        while time.monotonic() < end:
            bench.settle(100)
            if own_types(bench) == types:
                return
    raise AssertionError(f"after undoing: {own_types(bench)}, not {types}")


def own_types(bench: Workbench) -> set[str]:
    """The types of old and new loaders on the canvas."""
    return {kind for kind in types_of(bench) if kind.startswith(("Nunchaku", "QwenLora"))}


def open_the_canvas_menu(bench: Workbench) -> None:
    """Right-click beside all nodes."""
    bench.page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [3600, 600]; }")
    bench.settle()
    bench.page.mouse.click(700, 850, button="right")


def test_all_old_nodes_are_converted_at_once_with_the_same_result_and_back(workbench):
    nodes = one_of_each()
    made = AllBranches.of(nodes)
    workbench.load(made.graph)
    old_types, links = types_of(workbench), ends_of_links(workbench)
    before = hashes(workbench, made)
    assert len(set(before)) > 3
    open_the_canvas_menu(workbench)
    workbench.page.get_by_text(f"Convert all {len(nodes)} old LoRA nodes").click()
    question = workbench.page.get_by_role("dialog")
    question.get_by_text("stack_enabled off").first.wait_for()
    assert types_of(workbench) == old_types
    question.get_by_role("button", name="Confirm").click()
    workbench.until(_CONVERTED)
    assert not any(kind.startswith("Nunchaku") for kind in types_of(workbench))
    assert ends_of_links(workbench) == links
    assert hashes(workbench, made) == before
    undo(workbench, {saved.type for saved in nodes})
    assert types_of(workbench) == old_types
    assert ends_of_links(workbench) == links
    assert workbench.problems == []


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_button_on_the_node_converts_it(workbench):
    if workbench.frontend is not Frontend.OLDEST:
        # The workflow that the page begins with may come later than its graph.
        workbench.page.wait_for_function("() => app.extensionManager.workflow.activeWorkflow")
    made = AllBranches.of((one("QwenImageLoraStackV3", "one row off"), one("LoraLoader")))
    workbench.load(made.graph)
    links = ends_of_links(workbench)
    press(workbench, made.ids[0], "Convert to LoRA Stack")
    workbench.until(_HAS, "QwenLoraStack")
    press(workbench, made.ids[1], "Convert to Load LoRA")
    workbench.until(_HAS, "QwenLoraLoader")
    new = {node["type"]: node for node in workbench.saved()["nodes"]}
    assert workbench.values(new["QwenLoraStack"]["id"])["loras"] == [
        {"lora_name": FIRST, "strength": 0.7, "enabled": True},
        {"lora_name": SECOND, "strength": 0.9, "enabled": False},
        {"lora_name": THIRD, "strength": 1.25, "enabled": True},
    ]
    loader = workbench.values(new["QwenLoraLoader"]["id"])
    assert (loader["lora_name"], loader["strength"]) == (FIRST, 0.7)
    assert ends_of_links(workbench) == links
    workbench.page.mouse.move(10, 900)
    stack, loader = (one(kind).type for kind in ("QwenImageLoraStackV3", "LoraLoader"))
    undo(workbench, {"QwenLoraStack", loader})
    undo(workbench, {stack, loader})
    assert ends_of_links(workbench) == links
    assert workbench.problems == []


def test_nothing_is_lost_without_a_question_or_a_reason(workbench):
    page = workbench.page
    offloaded = one("LoraStack", "Windows")
    many = copy.deepcopy(one("QwenImageLoraStackV1", "twelve rows").node)
    many["widgets_values"] += many["widgets_values"][-12:]
    made = AllBranches.of((offloaded, SavedNode("", [], {}, many)), sampled=False)
    workbench.load(made.graph)
    before = workbench.saved()

    press(workbench, made.ids[0], "Convert to LoRA Stack")
    question = page.get_by_role("dialog")
    question.get_by_text("cpu_offload 'enable'").wait_for()
    question.get_by_role("button", name="Cancel").click()
    question.wait_for(state="detached")
    workbench.settle(200)
    assert workbench.saved()["nodes"] == before["nodes"]

    page.evaluate(_CENTER, made.ids[1])
    workbench.settle()
    page.mouse.click(SIZE["width"] / 2, SIZE["height"] / 2, button="right")
    # The panel beside the canvas has a button of this name, too.
    page.get_by_role("menuitem", name="Convert to LoRA Stack").click()
    page.get_by_text("it has 24 rows, a LoRA Stack holds 20").last.wait_for()
    assert workbench.saved()["nodes"] == before["nodes"]

    # A strength that comes from another node has no place in a row.
    workbench.load(made.graph)
    number = workbench.add("PrimitiveFloat", (-2000, 0), value=0.25)
    workbench.link(number, 0, made.ids[0], "lora_strength_2")
    press(workbench, made.ids[0], "Convert to LoRA Stack")
    question.get_by_text("the link into lora_strength_2").wait_for()
    question.get_by_role("button", name="Confirm").click()
    workbench.until(_HAS, "QwenLoraStack")
    assert types_of(workbench) >= {"QwenLoraStack", "PrimitiveFloat"}
    assert workbench.problems == []


def test_links_round_a_node_and_its_looks_are_kept(workbench):
    saved = one("ZImageTurboLoraStackV4")
    made = AllBranches.of((saved,), sampled=False)
    workbench.load(made.graph)
    old = made.ids[0]
    clip = workbench.add("CLIPLoader", (-2000, 0))
    text = workbench.add("CLIPTextEncode", (900, 0))
    report = workbench.add("PreviewAny", (900, 400))
    workbench.link(clip, 0, old, "clip")
    workbench.page.evaluate(
        """([id, text, report]) => {
            const node = app.graph.getNodeById(id);
            const slot = (type) => node.outputs.findIndex((own) => own.type === type);
            node.connect(slot('CLIP'), app.graph.getNodeById(text), 0);
            node.connect(slot('STRING'), app.graph.getNodeById(report), 0);
            node.title = 'mine';
            node.color = '#322';
            node.mode = 4;
        }""",
        [old, text, report],
    )
    press(workbench, old, "Convert to LoRA Stack")
    workbench.until(_HAS, "QwenLoraStack")
    (new,) = [node for node in workbench.saved()["nodes"] if node["type"] == "QwenLoraStack"]
    assert (new["title"], new["color"], new["mode"], new["pos"]) == ("mine", "#322", 4, [0, 0])
    links = {tuple(map(str, link[1:5])) for link in workbench.saved()["links"]}
    slot = [output["name"] for output in new["outputs"]].index("report")
    kept = [(clip, 0, text, 0), (new["id"], slot, report, 0), (2, 0, new["id"], 0)]
    assert links == {tuple(map(str, link)) for link in kept}
    assert workbench.problems == []


def test_a_node_in_a_subgraph_is_converted_there(workbench):
    made = AllBranches.of((one("QwenImageLoraStackV3"), one("QwenImageLoraStackV2")))
    workbench.load(made.graph)
    before = hashes(workbench, made)
    workbench.page.evaluate(
        "(id) => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])); }",
        made.ids[0],
    )
    workbench.settle(100)
    definitions = workbench.page.evaluate("() => app.rootGraph.serialize().definitions")
    assert one("QwenImageLoraStackV3").type in json.dumps(definitions)
    open_the_canvas_menu(workbench)
    workbench.page.get_by_text("Convert all 2 old LoRA nodes").click()
    workbench.until(_CONVERTED)
    assert "Nunchaku" not in json.dumps(workbench.page.evaluate("() => app.rootGraph.serialize()"))
    assert hashes(workbench, made) == before
    assert workbench.problems == []


def test_what_no_layout_tells_stays_and_the_server_says_so(workbench):
    told: list[str] = []
    workbench.listen("console", lambda message: told.append(message.text))
    strange = copy.deepcopy(one("StackV2", "before its script ran").node)
    strange["widgets_values"] = [3, "disable", 0.5, "style.safetensors", True, 7]
    made = AllBranches.of((SavedNode("", [], {}, strange),))
    workbench.load(made.graph)
    values = workbench.saved()["nodes"][made.ids[0] - 1]["widgets_values"]
    assert values[:6] == strange["widgets_values"]
    refused = workbench.try_queue()
    assert "style.safetensors" in json.dumps(refused.get("status", refused))
    # What goes wrong in our part leaves the node as the frontend has made it.
    workbench.page.evaluate(
        """([id, saved]) => {
            const node = app.graph.getNodeById(id);
            node.computeSize = () => { throw new Error('no size'); };
            node.configure({ ...saved, id });
        }""",
        [made.ids[0], one("StackV2", "before its script ran").node],
    )
    workbench.settle()
    assert any("stays as it is (onConfigure)" in text for text in told)
    assert workbench.problems == []
