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

FOLDER = REPOSITORY / "example_workflows"
EXAMPLES = sorted(FOLDER.glob("*.json"))
LIGHTNING = "Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors"
WITHOUT_INPUTS = {"MarkdownNote"}
"""Nodes of the page alone."""

TITLE = 30
TEXTS = ("CLIPTextEncode", "TextEncodeQwenImageEditPlus", "ConditioningZeroOut")
NEEDS_MODELS = {*TEXTS, "CLIPLoader", "VAELoader", "VAEEncode", "VAEDecode", "SaveImage"}
NEEDS_MODELS |= {"LoadImage", "ImageScaleToTotalPixels", "EmptySD3LatentImage"}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
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
    for node in read(path)["nodes"]:
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


def run(bench, prompt: dict[str, Any]) -> dict[str, Any]:
    """Queue a prompt and wait; returns its entry of the history."""
    number = bench.comfy.request("/prompt", {"prompt": prompt})["prompt_id"]
    for _ in range(600):
        done = bench.comfy.request(f"/history/{number}").get(number)
        if done:
            return done
        bench.settle(100)
    raise AssertionError("it did not end")


@pytest.mark.parametrize(
    "way",
    [
        pytest.param((Frontend.NEWEST, Renderer.CANVAS), id="newest-canvas"),
        pytest.param((Frontend.OLDEST, Renderer.CANVAS), id="oldest-canvas"),
    ],
    indirect=True,
)
def test_they_open_and_run(workbench, loras):
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
        done = run(bench, small)
        assert done["status"]["status_str"] == "success", (path.stem, done["status"])
        assert len(done["outputs"]["hash"]["text"][0]) == 8
    assert bench.problems == []
