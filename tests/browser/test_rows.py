"""The rows of `QwenLoraStack`: what a person does with them, in every frontend and renderer."""

from __future__ import annotations

import time

import pytest

from .conftest import WAYS
from .frontends import Frontend, Renderer
from .stack import Stack, row

BOTH = [
    pytest.param((Frontend.NEWEST, Renderer.CANVAS), id="newest-canvas"),
    pytest.param((Frontend.NEWEST, Renderer.NODES_2), id="newest-nodes2"),
]
ENDS = [
    pytest.param((Frontend.NEWEST, Renderer.CANVAS), id="newest"),
    pytest.param((Frontend.OLDEST, Renderer.CANVAS), id="oldest"),
]
THREE = (row("qwen/light", 0.8), row("style", 1.0, False), row("character", -0.5))

DEFAULTS = {"blocks": "all", "custom_blocks": "", "schedule": "", "schedule_mode": "linear"}


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_stack_is_filled_with_the_mouse(workbench):
    stack = Stack.add(workbench)
    assert stack.shown == [("choose a file", "1.00", True)]

    stack.click(0, "file")
    stack.choose("ligh")
    stack.click(0, "strength")
    stack.keys(*"0,8", "Enter")
    stack.add_row()
    workbench.page.get_by_role("option", name="style").click()
    stack.add_row()
    stack.choose("char")
    stack.click(1, "switch")
    assert stack.rows == [row("qwen/light", 0.8), row("style", 1.0, False), row("character")]
    assert stack.shown == [
        ("qwen/light", "0.80", True),
        ("style", "1.00", False),
        ("character", "1.00", True),
    ]
    workflow = workbench.saved()
    assert workflow["nodes"][0]["widgets_values"][0] == stack.rows
    assert prompted(workbench) == stack.rows

    stack.drag(0, 2)
    assert [own["lora_name"][0] for own in stack.rows] == ["s", "c", "q"]
    stack.part(2, "arrows").locator("button").first.click()
    assert [own["lora_name"][0] for own in stack.rows] == ["s", "q", "c"]
    stack.all.click()
    assert all(own["enabled"] for own in stack.rows)
    stack.all.click()
    assert not any(own["enabled"] for own in stack.rows)
    for _ in range(3):
        stack.click(0, "remove")
    assert stack.rows == [row("")]
    assert workbench.problems == []


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_strength_is_dragged_and_stepped(workbench):
    stack = Stack.add(workbench, row("style"))
    box = stack.part(0, "strength").bounding_box()
    mouse = workbench.page.mouse
    mouse.move(box["x"] + 20, box["y"] + 8)
    mouse.down()
    mouse.move(box["x"] - 60, box["y"] + 8, steps=5)
    mouse.up()
    assert stack.rows == [row("style", 0.0)]
    stack.click(0, "strength")
    stack.keys("ArrowUp", "ArrowUp", "Shift+ArrowDown")
    assert stack.rows == [row("style", 0.09)]
    stack.keys("Control+a", *"nonsense", "Tab")
    assert stack.rows == [row("style", 0.09)]
    assert stack.shown == [("style", "0.09", True)]


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_the_keyboard_alone(workbench):
    stack = Stack.add(workbench, *THREE)
    stack.line(0).focus()
    stack.keys("ArrowDown", " ")
    assert stack.rows[1]["enabled"]
    stack.keys("Alt+ArrowDown")
    assert [own["lora_name"][0] for own in stack.rows] == ["q", "c", "s"]
    stack.keys("Enter")
    stack.choose("qwen ligh")
    assert stack.rows[2] == row("qwen/light")
    # The list gives the focus back to the file; Escape goes to its row.
    stack.keys("Escape", "Delete")
    assert [own["lora_name"][0] for own in stack.rows] == ["q", "c"]
    stack.keys("ArrowUp", "Tab", "Tab", "Enter", "Escape")
    assert stack.rows[0] == THREE[0]
    stack.keys("Tab", "ArrowUp", "Shift+Tab", "Shift+Tab", "Shift+Tab", "Delete")
    assert stack.rows == [row("character", -0.5)]
    assert len(workbench.saved()["nodes"]) == 1


def prompted(bench):
    """The rows of the one stack in what would be queued."""
    (stack,) = (node for node in bench.prompt().values() if node["class_type"] == "QwenLoraStack")
    assert list(stack["inputs"]["loras"]) == ["__value__"]
    return stack["inputs"]["loras"]["__value__"]


def saved_node(bench, node_id):
    """A node as it would be saved."""
    (found,) = (node for node in bench.saved()["nodes"] if str(node["id"]) == str(node_id))
    return found


def as_node(number, **saved):
    place = {"pos": [60 + 450 * (number % 3), 60 + 300 * (number // 3)], "size": [400, 700]}
    inputs = [{"name": "model", "type": "MODEL", "link": None}, *saved.pop("inputs", [])]
    rest = {"flags": {}, "order": 0, "mode": 0, "outputs": [], "properties": {}}
    return {"id": number + 1, "type": "QwenLoraStack", "inputs": inputs, **place, **rest, **saved}


NAMES = [own["lora_name"] for own in THREE]
CELLS = [cell for own in THREE for cell in own.values()]
UNUSED = ["None", 1.0, True]
SHAPES = {
    "before control": {"widgets_values": [list(THREE)]},
    "with control": {"widgets_values": [list(THREE), "style", "", "", "linear"]},
    "growing, with control": {"widgets_values": [3, *CELLS, "style", "", "", "linear"]},
    "by name too": {
        "widgets_values": [list(THREE)],
        "widgets_values_named": {"loras": list(THREE)},
    },
    "plain, ten rows": {
        "widgets_values": [*CELLS, *UNUSED * 7],
        "inputs": [
            {
                "name": "lora_name_1",
                "type": "COMBO",
                "link": None,
                "widget": {"name": "lora_name_1"},
            }
        ],
    },
    "plain, with names": {
        "widgets_values": [*CELLS, *UNUSED * 7],
        "widgets_values_named": {
            f"{field}_{number}": value
            for number, own in enumerate(THREE, 1)
            for field, value in own.items()
        },
    },
    "growing": {"widgets_values": [3, *CELLS]},
    "growing, with names": {
        "widgets_values": [3, *CELLS],
        "widgets_values_named": {
            f"loras.{number}.{field}": value
            for number, own in enumerate(THREE)
            for field, value in own.items()
        },
    },
}


TODAYS = {"before control", "with control", "by name too"}


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_every_saved_shape_opens(workbench):
    nodes = [as_node(number, **saved) for number, saved in enumerate(SHAPES.values())]
    workbench.load(
        {"last_node_id": len(nodes), "last_link_id": 0, "nodes": nodes, "links": [], "version": 0.4}
    )
    for node, shape in zip(nodes, SHAPES, strict=True):
        expected = DEFAULTS | ({"blocks": "style"} if "with control" in shape else {})
        values = workbench.values(node["id"])
        assert values["loras"] == list(THREE), shape
        assert {name: values[name] for name in DEFAULTS} == expected, shape
        names = [own["name"] for own in saved_node(workbench, node["id"])["inputs"]]
        assert names[0] == "model"
        assert not any(name.startswith("lora_name") for name in names)
        assert saved_node(workbench, node["id"])["widgets_values"][0] == list(THREE)
        least = workbench.page.evaluate(
            "(id) => app.graph.getNodeById(id).computeSize()[1]", node["id"]
        )
        # That of another layout's node says nothing of today's.
        height = 700 if shape in TODAYS else least
        assert saved_node(workbench, node["id"])["size"][1] == pytest.approx(height, abs=2), shape
    assert workbench.problems == []


@pytest.mark.parametrize("way", ENDS, indirect=True)
def test_what_one_frontend_saves_the_others_open(workbench, pages):
    stack = Stack.add(workbench, *THREE)
    saved = workbench.saved()
    # They are open from the tests before; this one alone opens its own.
    for bench in pages.values():
        if bench is not workbench:
            bench.reset()
        bench.load(saved)
        opened = Stack(bench, stack.node)
        assert opened.rows == list(THREE)
        assert len(opened.shown) == 3
        saved = bench.saved()


@pytest.mark.parametrize("way", ENDS, indirect=True)
def test_a_stack_gives_what_a_chain_gives(workbench):
    stack = Stack.add(workbench, *THREE)
    nodes = workbench.chain(stack.node)
    of_stack = workbench.hash_of(workbench.queue())
    light = workbench.add("QwenLoraLoader", lora_name=NAMES[0], strength=0.8)
    character = workbench.add("QwenLoraLoader", lora_name=NAMES[2], strength=-0.5)
    workbench.link(nodes["model"], 0, light, "model")
    workbench.link(light, 0, character, "model")
    workbench.link(character, 0, nodes["sampler"], "model")
    assert workbench.hash_of(workbench.queue()) == of_stack
    workbench.link(stack.node, 0, nodes["sampler"], "model")
    stack.click(2, "switch")
    other = workbench.hash_of(workbench.queue())
    assert len(other) == 8
    assert other != of_stack


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_nodes_are_copied_undone_collapsed_and_grouped(workbench):
    page = workbench.page
    stack = Stack.add(workbench, *THREE)
    left, top, _, _ = workbench.box(stack.node)
    page.mouse.click(left + 120, top + 12)
    stack.keys("Control+c")
    stack.keys("Control+v")
    workbench.until("() => app.graph.nodes.length === 2")
    copies = [node for node in workbench.saved()["nodes"] if str(node["id"]) != str(stack.node)]
    assert [node["widgets_values"][0] for node in copies] == [list(THREE)]
    page.evaluate("(id) => app.graph.remove(app.graph.getNodeById(id))", copies[0]["id"])
    # What is opened begins a history of its own.
    workbench.load(workbench.saved())
    workbench.settle(300)

    stack.click(0, "switch")
    stack.click(0, "remove")
    assert undone(stack, 20) == [row("qwen/light", 0.8, False), *THREE[1:]]
    # What else the frontend has noted meanwhile, the node's size for one, is a step of its own.
    for _ in range(2):
        if stack.rows != list(THREE):
            undone(stack, 2)
    assert stack.rows == list(THREE)

    page.evaluate("(id) => app.graph.getNodeById(id).collapse()", stack.node)
    page.locator("qwenlora-rows:visible").first.wait_for(state="hidden")
    assert page.locator("qwenlora-rows:visible").count() == 0
    page.evaluate("(id) => app.graph.getNodeById(id).collapse()", stack.node)
    page.locator("qwenlora-rows:visible").first.wait_for()
    assert len(stack.shown) == 3

    page.evaluate(
        "(id) => { app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])); }", stack.node
    )
    workbench.settle(100)
    assert prompted(workbench) == list(THREE)
    saved = workbench.saved()
    assert workbench.problems == []
    workbench.reset()
    workbench.load(saved)
    assert prompted(workbench) == list(THREE)
    assert workbench.problems == []


def undone(stack, seconds):
    """The rows after a step back, for which the page has so much time."""
    before = stack.rows
    stack.line(0).focus()
    stack.keys("Control+z")
    end = time.monotonic() + seconds
    while stack.rows == before and time.monotonic() < end:
        stack.bench.settle()
    stack.bench.settle()
    return stack.rows


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_the_node_has_room_for_its_rows(workbench):
    stack = Stack.add(workbench)
    heights = []
    for count in (1, 20, 2):
        rows = [row("style")] * count
        script = "([id, rows]) => { app.graph.getNodeById(id).widgets[0].value = rows; }"
        workbench.page.evaluate(script, [stack.node, rows])
        workbench.settle(100)
        _, top, _, height = workbench.box(stack.node)
        stack.element.locator(".qwenlora-add").wait_for()
        last = stack.element.locator(".qwenlora-add").bounding_box()
        assert last["y"] + last["height"] <= top + height
        heights.append(height)
        assert stack.element.locator(".qwenlora-add").is_enabled() == (count < 20)
    workbench.load(workbench.saved())
    workbench.settle(100)
    assert workbench.box(stack.node)[3] == pytest.approx(heights[2], abs=2)
    scale = workbench.page.evaluate("() => app.canvas.ds.scale")
    assert heights[1] - heights[0] == pytest.approx(19 * 26 * scale, abs=2)
    assert heights[2] - heights[0] == pytest.approx(26 * scale, abs=2)


@pytest.mark.parametrize("way", BOTH, indirect=True)
def test_a_file_that_is_opened_again_and_again_keeps_its_size(workbench):
    stack = Stack.add(workbench, *THREE)
    natural = saved_node(workbench, stack.node)["size"]
    taller = [natural[0] + 90, natural[1] + 100]
    for size in (natural, taller):
        workbench.page.evaluate(
            "([id, size]) => app.graph.getNodeById(id).setSize(size)", [stack.node, size]
        )
        workbench.settle()
        for _ in range(3):
            workbench.load(workbench.saved())
            workbench.settle()
            assert saved_node(workbench, stack.node)["size"] == pytest.approx(size, abs=1)
    file = workbench.saved()
    file["nodes"][0]["size"] = [100, 40]
    workbench.load(file)
    opened = saved_node(workbench, stack.node)["size"]
    assert natural[1] - 30 < opened[1] <= natural[1] + 1
    # Rows that come after that make room for themselves.
    workbench.fit()
    stack.add_row()
    stack.keys("Escape")
    assert saved_node(workbench, stack.node)["size"][1] == pytest.approx(opened[1] + 26, abs=1)


@pytest.mark.parametrize("way", BOTH, indirect=True)
def test_the_panel_beside_the_canvas_has_them_too(workbench):
    page = workbench.page
    stack = Stack.add(workbench, *THREE)
    left, top, width, _ = workbench.box(stack.node)
    page.mouse.click(left + 120, top + 12)
    workbench.settle(100)
    if not page.locator(".widget-item").count():
        page.get_by_role("button", name="Toggle properties panel").first.click()
    page.wait_for_selector(".widget-item qwenlora-rows")
    panel = Stack(workbench, stack.node, ".widget-item")
    on_node = ".dom-widget" if workbench.renderer is Renderer.CANVAS else "[data-node-id]"
    on_node = Stack(workbench, stack.node, on_node)
    assert panel.shown == on_node.shown
    assert len(panel.shown) == 3
    panel.add_row()
    panel.choose("style")
    panel.click(0, "remove")
    on_node.click(0, "switch")
    assert stack.rows == [row("style"), row("character", -0.5), row("style")]
    assert panel.shown == on_node.shown
    box = on_node.element.bounding_box()
    left, _, width, _ = workbench.box(stack.node)
    assert box["x"] >= left
    assert box["x"] + box["width"] <= left + width
    assert workbench.problems == []
    page.get_by_role("button", name="Toggle properties panel").first.click()
    page.locator(".widget-item").first.wait_for(state="detached")


def test_thousands_of_files_are_found_at_once(workbench, loras):
    stack = Stack.add(workbench, row("style"))
    folder = loras / "many"
    folder.mkdir()
    for number in range(3000):
        (folder / f"some_lora_{number:04}.safetensors").touch()
    (folder / "2999.safetensors").touch()
    workbench.page.mouse.click(200, 800)
    stack.keys("r")
    workbench.page.wait_for_function(
        "(id) => app.graph.getNodeById(id).widgets[0].element.list.names.all.length > 3000",
        arg=stack.node,
    )
    begun = time.monotonic()
    stack.click(0, "file")
    options = workbench.page.get_by_role("option")
    assert options.count() == 200
    assert options.nth(0).text_content() == "None"
    assert options.nth(1).text_content() == "style"
    stack.keys(*"299")
    found = [option.text_content() for option in options.all()]
    # First where a name begins with it, then where a part of a name does.
    assert found[:2] == ["many/2999", "many/some_lora_2990"]
    assert found[-1] == "many/some_lora_2299"
    assert len(found) == 14
    stack.keys("Enter")
    assert stack.rows == [row("many/2999")]
    assert time.monotonic() - begun < 10


def test_rows_that_cannot_be_applied_are_marked(workbench):
    stack = Stack.add(workbench, row("style"), row("gone/away"), row("qwen\\light"))
    assert stack.line(1).get_attribute("class").split() == ["qwenlora-line", "missing"]
    assert "not in ComfyUI's list" in stack.part(1, "file").get_attribute("title")
    # The other system's separators are the same file.
    assert stack.line(2).get_attribute("class") == "qwenlora-line"
    workbench.chain(stack.node)
    done = workbench.try_queue()
    assert done["status"]["status_str"] == "error"
    workbench.page.wait_for_selector(".qwenlora-line.fault")
    assert "fault" in stack.line(1).get_attribute("class")
    assert "gone/away" in stack.part(1, "file").get_attribute("title")
    workbench.page.keyboard.press("Escape")
    stack.click(1, "remove")
    assert workbench.page.locator(".qwenlora-line.fault").count() == 0


@pytest.mark.parametrize("way", ENDS, indirect=True)
def test_without_an_element_the_rows_are_kept(workbench):
    script = """(rows) => {
        const own = LGraphNode.prototype.addDOMWidget;
        LGraphNode.prototype.addDOMWidget = () => { throw new Error("not here"); };
        const node = LiteGraph.createNode("QwenLoraStack");
        LGraphNode.prototype.addDOMWidget = own;
        app.graph.add(node);
        node.widgets[0].value = rows;
        return node.id;
    }"""
    node = workbench.page.evaluate(script, list(THREE))
    assert workbench.values(node)["loras"] == list(THREE)
    assert saved_node(workbench, node)["widgets_values"][0] == list(THREE)
    assert prompted(workbench) == list(THREE)
    assert workbench.problems == []
