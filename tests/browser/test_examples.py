"""The example workflows and the blueprint: sound files that open in the page and run."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .comfy_process import REPOSITORY
from .frontends import Frontend, Renderer
from .stack import Stack

FOLDER = REPOSITORY / "example_workflows"
EXAMPLES = sorted(FOLDER.glob("*.json"))
STACK = FOLDER / "nunchaku-qwen-image-lora-stack.json"
NAME = "Nunchaku Qwen-Image with LoRAs"
BLUEPRINT = REPOSITORY / "subgraphs" / f"{NAME}.json"
LIGHTNING = "Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors"
WITHOUT_INPUTS = {"MarkdownNote"}
"""Nodes of the page alone."""

TITLE = 30
TEXTS = ("CLIPTextEncode", "TextEncodeQwenImageEditPlus", "ConditioningZeroOut")
NEEDS_MODELS = {*TEXTS, "CLIPLoader", "VAELoader", "VAEEncode", "VAEDecode", "SaveImage"}
NEEDS_MODELS |= {"LoadImage", "ImageScaleToTotalPixels", "EmptySD3LatentImage"}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def classes(comfy) -> dict[str, Any]:
    """What the server tells of nodes, by id."""
    return comfy.request("/object_info")


def widgets_of(info: dict[str, Any]) -> list[str]:
    """The names of a node's widgets in their order, those that the page adds included."""
    found = []
    for kind in ("required", "optional"):
        for name, (type_, *options) in info["input"].get(kind, {}).items():
            if isinstance(type_, list) or type_ in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                found.append(name)
            elif type_ == "QWENLORA_ROWS":
                found.append(name)
            if any(own.get("control_after_generate") for own in options):
                found.append(f"control after {name}")
            if any(own.get("image_upload") for own in options):
                found.append(f"upload {name}")
    return found


def test_there_are_four_each_with_a_picture():
    assert len(EXAMPLES) == 4
    pictures = {path.stem: path.stat().st_size for path in FOLDER.glob("*.jpg")}
    assert set(pictures) == {path.stem for path in EXAMPLES}
    assert max(pictures.values()) < 150_000
    # The template browser offers every file there.
    assert all("nodes" in read(path) for path in EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda own: own.stem)
def test_links_are_consistent(path):
    flow = read(path)
    nodes = {node["id"]: node for node in flow["nodes"]}
    assert len(nodes) == len(flow["nodes"])
    assert max(nodes) == flow["last_node_id"]
    links = {link[0]: link for link in flow["links"]}
    assert max(links) == flow["last_link_id"]
    for number, giver, output, taker, place, kind in links.values():
        out, into = nodes[giver]["outputs"][output], nodes[taker]["inputs"][place]
        assert number in out["links"]
        assert into["link"] == number
        assert out["type"] == into["type"] == kind
    ends = [own["link"] for node in nodes.values() for own in node["inputs"] if own["link"]]
    assert sorted(ends) == sorted(links)
    outputs = [out for node in nodes.values() for out in node["outputs"]]
    starts = [own for out in outputs for own in out["links"] or ()]
    assert sorted(starts) == sorted(links)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda own: own.stem)
def test_no_two_nodes_overlap(path):
    assert_apart(read(path))


def assert_apart(flow: dict[str, Any]) -> None:
    """Nodes have room, their titles included."""
    boxes = [
        (node["pos"][0], node["pos"][1] - TITLE, node["size"][0], node["size"][1] + TITLE)
        for node in flow["nodes"]
    ]
    for one, other in combinations(boxes, 2):
        apart = (
            one[0] + one[2] <= other[0]
            or other[0] + other[2] <= one[0]
            or one[1] + one[3] <= other[1]
            or other[1] + other[3] <= one[1]
        )
        assert apart, (one, other)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda own: own.stem)
def test_nodes_and_values_are_known(path, classes):
    assert_known(read(path)["nodes"], classes)


def assert_known(nodes: list[dict[str, Any]], classes: dict[str, Any]) -> None:
    """The server has these nodes, with these inputs, outputs and as many values."""
    for node in nodes:
        if node["type"] in WITHOUT_INPUTS:
            continue
        info = classes[node["type"]]
        known = info["input"].get("required", {}) | info["input"].get("optional", {})
        required = set(info["input"].get("required", {}))
        names = {own["name"] for own in node["inputs"]}
        assert names <= set(known), node["type"]
        linked = {own["name"] for own in node["inputs"] if own["link"]}
        assert required - set(widgets_of(info)) <= linked, node["type"]
        assert [own["type"] for own in node["outputs"]] == info["output"][: len(node["outputs"])]
        values = node.get("widgets_values") or []
        assert len(values) == len(widgets_of(info)), (node["type"], values, widgets_of(info))


def inside() -> dict[str, Any]:
    """What is in the blueprint's subgraph."""
    (definition,) = read(BLUEPRINT)["definitions"]["subgraphs"]
    return definition


def test_the_blueprint_is_one_node_that_has_all_inputs_of_its_subgraph():
    flow = read(BLUEPRINT)
    # The host reads it in its system's encoding.
    assert BLUEPRINT.read_bytes().isascii()
    (node,) = flow["nodes"]
    definition = inside()
    assert node["type"] == definition["id"]
    assert node["title"] == definition["name"] == NAME
    assert flow["last_node_id"] == node["id"]
    assert node["id"] not in [own["id"] for own in definition["nodes"]]
    for side in ("inputs", "outputs"):
        slots = [(own["name"], own["type"]) for own in definition[side]]
        assert [(own["name"], own["type"]) for own in node[side]] == slots
        assert len(set(slots)) == len(slots)
    widgets = [own["name"] for own in node["inputs"] if "widget" in own]
    assert list(node["widgets_values_named"]) == widgets
    assert list(node["widgets_values_named"].values()) == node["widgets_values"]


def test_links_in_the_blueprint_are_consistent():
    definition = inside()
    nodes = {node["id"]: node for node in definition["nodes"]}
    links = {link["id"]: link for link in definition["links"]}
    assert len(links) == len(definition["links"])
    assert max(links) == definition["state"]["lastLinkId"]
    assert max(nodes) <= definition["state"]["lastNodeId"]
    giver, taker = definition["inputNode"]["id"], definition["outputNode"]["id"]
    starts, ends = [], []
    for number, link in links.items():
        if link["origin_id"] == giver:
            out = definition["inputs"][link["origin_slot"]]
            assert out["linkIds"] == [number]
        else:
            out = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert number in out["links"]
        if link["target_id"] == taker:
            into = definition["outputs"][link["target_slot"]]
            assert into["linkIds"] == [number]
        else:
            into = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert into["link"] == number
        assert out["type"] == into["type"] == link["type"]
    for node in nodes.values():
        starts += [own for out in node["outputs"] for own in out["links"] or ()]
        ends += [own["link"] for own in node["inputs"] if own["link"]]
    starts += [own for slot in definition["inputs"] for own in slot["linkIds"]]
    ends += [own for slot in definition["outputs"] for own in slot["linkIds"]]
    assert sorted(starts) == sorted(ends) == sorted(links)
    assert_apart(definition)


@pytest.mark.slow
def test_the_blueprint_is_listed_and_its_nodes_are_known(comfy, classes):
    (key,) = [key for key, own in comfy.request("/global_subgraphs").items() if own["name"] == NAME]
    told = comfy.request(f"/global_subgraphs/{key}")
    assert told["info"]["node_pack"] == "custom_nodes.ComfyUI-qwenlora"
    assert json.loads(told["data"]) == read(BLUEPRINT)
    assert_known(inside()["nodes"], classes)


def in_small(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with all that needs a downloaded model in small; the MODEL's way is as it is."""
    small = {}
    kind = "z-image" if "NunchakuZImageDiTLoader" in str(prompt) else "qwen-image"
    latent = {"width": 64, "height": 64, "batch_size": 1}
    for number, (node_id, node) in enumerate(prompt.items()):
        if node["class_type"] in TEXTS:
            inputs = {"seed": number, "kind": kind}
            small[node_id] = {"class_type": "EmulatedText", "inputs": inputs}
        elif node["class_type"] in ("VAEEncode", "EmptySD3LatentImage"):
            small[node_id] = {"class_type": "EmptySD3LatentImage", "inputs": latent}
        elif node["class_type"] not in NEEDS_MODELS:
            small[node_id] = node
    sampler = next(own for own, node in small.items() if node["class_type"] == "KSampler")
    small[sampler]["inputs"]["steps"] = 2
    small["hash"] = {"class_type": "LatentHash", "inputs": {"samples": [sampler, 0]}}
    return small


def z_image_style(path: Path) -> None:
    """A LoRA of a few modules of the small Z-Image, in another's place."""
    tensors = {}
    for block in (0, 1):
        for part in ("q", "k", "v"):
            stem = f"diffusion_model.layers.{block}.attention.to_{part}"
            tensors[f"{stem}.lora_A.weight"] = torch.full((4, 384), 0.01)
            tensors[f"{stem}.lora_B.weight"] = torch.full((384, 4), 0.01)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def ran() -> dict[str, dict[str, Any]]:
    """What came of each prompt: one that several ways give alike is run once."""
    return {}


def run(bench, prompt: dict[str, Any], ran: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Queue a prompt, if it is new, and wait; returns its entry of the history."""
    key = json.dumps(prompt, sort_keys=True)
    if key not in ran:
        ran[key] = wait_for(bench, prompt)
    return ran[key]


def wait_for(bench, prompt: dict[str, Any]) -> dict[str, Any]:
    """Queue a prompt; returns its entry of the history once it is there."""
    number = bench.comfy.request("/prompt", {"prompt": prompt})["prompt_id"]
    # A model of a kind that is new to the process brings modules along: minutes on a busy machine.
    for _ in range(3000):
        done = bench.comfy.request(f"/history/{number}").get(number)
        if done:
            return done
        bench.settle(100)
    raise AssertionError("it did not end")


NEWEST = [
    pytest.param((Frontend.NEWEST, Renderer.CANVAS), id="newest-canvas"),
    pytest.param((Frontend.NEWEST, Renderer.NODES_2), id="newest-nodes2"),
]
OLDEST = pytest.param((Frontend.OLDEST, Renderer.CANVAS), id="oldest-canvas")


@pytest.mark.parametrize("way", [*NEWEST, OLDEST], indirect=True)
def test_they_open_and_run(workbench, loras, ran):
    bench = workbench
    shutil.copy(loras / "style.safetensors", loras / LIGHTNING)
    listed = bench.comfy.request("/workflow_templates")["ComfyUI-qwenlora"]
    assert sorted(listed) == [path.stem for path in EXAMPLES]
    for path in EXAMPLES:
        # As the template browser fetches it.
        bench.page.evaluate(
            "async (name) => app.loadGraphData(await (await fetch("
            "`/api/workflow_templates/ComfyUI-qwenlora/${name}.json`)).json())",
            path.stem,
        )
        bench.settle()
        opened = bench.saved()
        assert len(opened["nodes"]) == len(read(path)["nodes"])
        # A frontend makes nodes larger where it needs more room.
        assert_apart(opened)
        prompt = bench.prompt()
        stack = next((own for own in prompt.values() if own["class_type"] == "QwenLoraStack"), None)
        if stack is not None:
            rows = next(own for own in read(path)["nodes"] if own["type"] == "QwenLoraStack")
            assert stack["inputs"]["loras"]["__value__"] == rows["widgets_values"][0]
        small = in_small(prompt)
        if "z-image" in path.stem:
            z_image_style(loras / "style.safetensors")
        done = run(bench, small, ran)
        assert done["status"]["status_str"] == "success", (path.stem, done["status"])
        assert len(done["outputs"]["hash"]["text"][0]) == 8
    assert bench.problems == []


def test_the_template_browser_opens_one_by_clicks(workbench):
    page = workbench.page
    page.get_by_role("button", name="Templates").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("ComfyUI-qwenlora", exact=True).click()
    workbench.settle()
    cards = dialog.get_by_text("nunchaku-", exact=False)
    assert sorted(cards.all_text_contents()) == [path.stem for path in EXAMPLES]
    dialog.get_by_text(STACK.stem, exact=True).click()
    dialog.wait_for(state="hidden")
    workbench.until("(count) => app.graph.nodes.length === count", len(read(STACK)["nodes"]))
    opened = {own["type"] for own in workbench.saved()["nodes"]}
    assert opened == {own["type"] for own in read(STACK)["nodes"]}
    nodes = workbench.saved()["nodes"] + read(STACK)["nodes"]
    rows = [own["widgets_values"][0] for own in nodes if own["type"] == "QwenLoraStack"]
    assert rows[0] == rows[1]
    assert workbench.problems == []


def put_blueprint(bench) -> dict[str, Any]:
    """Find the blueprint as any node, by a double click and its name; returns the node."""
    # Blueprints are read after the page is there.
    bench.page.wait_for_load_state("networkidle")
    bench.settle()
    # On a busy machine the page may take Enter before it has the list.
    while not choose_blueprint(bench):
        bench.page.keyboard.press("Escape")
        bench.settle(300)
    (node,) = bench.saved()["nodes"]
    return node


def choose_blueprint(bench) -> bool:
    """Search for it once; whether it is in the workflow then."""
    page = bench.page
    page.mouse.dblclick(750, 800)
    bench.settle(300)
    page.keyboard.type("qwen-image with loras")
    page.get_by_text(NAME).first.wait_for()
    # The list is searched anew for each letter.
    bench.settle(600)
    page.keyboard.press("Enter")
    bench.settle(300)
    for _ in range(10):
        # The newest hangs it on the mouse until a click.
        page.mouse.click(500, 200)
        bench.settle(300)
        if bench.saved()["nodes"]:
            return True
    return False


def hash_of(bench, ran: dict[str, dict[str, Any]]) -> str:
    done = run(bench, in_small(bench.prompt()), ran)
    assert done["status"]["status_str"] == "success", done["status"]
    return done["outputs"]["hash"]["text"][0]


@pytest.mark.parametrize("way", NEWEST, indirect=True)
def test_the_blueprint_is_found_filled_and_run(workbench, ran):
    bench = workbench
    node = put_blueprint(bench)
    values = read(BLUEPRINT)["nodes"][0]["widgets_values_named"]
    assert bench.values(node["id"]) == values
    base = hash_of(bench, ran)
    bench.page.evaluate(
        """(id) => {
            const node = app.graph.getNodeById(id);
            for (const [name, value] of [["prompt", "a fox"], ["seed", 7], ["width", 512]])
                node.widgets.find((own) => own.name === name).value = value;
        }""",
        node["id"],
    )
    prompt = {own["_meta"]["title"]: own["inputs"] for own in bench.prompt().values()}
    assert prompt["Prompt"]["text"] == "a fox"
    assert prompt["KSampler"]["seed"] == 7
    assert prompt["EmptySD3LatentImage"]["width"] == 512
    other = hash_of(bench, ran)
    assert other != base
    # Inside, the rows are those of any stack.
    bench.page.evaluate(
        "(id) => app.canvas.openSubgraph(app.graph.getNodeById(id).subgraph,"
        " app.graph.getNodeById(id))",
        node["id"],
    )
    bench.settle(100)
    bench.fit()
    stack = next(own["id"] for own in inside()["nodes"] if own["type"] == "QwenLoraStack")
    rows = Stack(bench, stack)
    rows.click(0, "file")
    rows.choose("style")
    assert rows.shown == [("style", "1.00", True)]
    assert hash_of(bench, ran) not in (base, other)
    assert bench.problems == []
