"""Makes the subgraph blueprint out of an example workflow, as a person does in the page.

Run as `python -m tests.browser.blueprint` from the repository's root.
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

from .comfy_process import REPOSITORY, ComfyProcess
from .frontends import Frontend, Renderer
from .started import comfy_and_browser
from .workbench import Workbench

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAME = "Nunchaku Qwen-Image with LoRAs"
PATH = REPOSITORY / "subgraphs" / f"{NAME}.json"
EXAMPLE = REPOSITORY / "example_workflows" / "nunchaku-qwen-image-lora-stack.json"
OUTSIDE = ("SaveImage", "MarkdownNote")
INPUTS = (
    ("lora_stack", "QwenLoraStack", "lora_stack"),
    ("prompt", "Prompt", "text"),
    ("negative_prompt", "Negative prompt", "text"),
    ("width", "EmptySD3LatentImage", "width"),
    ("height", "EmptySD3LatentImage", "height"),
    ("seed", "KSampler", "seed"),
    ("steps", "KSampler", "steps"),
    ("cfg", "KSampler", "cfg"),
    ("model_name", "NunchakuQwenImageDiTLoader", "model_name"),
    ("clip_name", "CLIPLoader", "clip_name"),
    ("vae_name", "VAELoader", "vae_name"),
)
"""Each input: its name, and the node (by its title or type) and the input that it leads to."""

EXTRA = {
    "BlueprintDescription": (
        "Text to image with Nunchaku's 4-bit Qwen-Image and a stack of LoRAs. "
        "Open the subgraph to choose the LoRAs, or give it a lora_stack."
    ),
    "BlueprintSearchAliases": ["nunchaku", "qwen image lora", "lora stack"],
}
SIZE = [400, 560]

_CONVERT = """([outside, inputs]) => {
    const inside = app.graph.nodes.filter((own) => !outside.includes(own.type));
    const {subgraph, node} = app.graph.convertToSubgraph(new Set(inside));
    // Inputs that the frontend chose by itself.
    for (const own of [...subgraph.inputs]) subgraph.removeInput(own);
    for (const [name, place, input] of inputs) {
        const taker = subgraph.nodes.find((own) => own.title === place || own.type === place);
        const slot = taker.inputs.find((own) => own.name === input);
        subgraph.addInput(name, String(slot.type)).connect(slot, taker);
    }
    app.canvas.select(node);
}"""
_PUBLISH = """(name) => app.extensionManager.command.execute(
    "Comfy.PublishSubgraph", {metadata: {name}})"""


def publish(bench: Workbench) -> dict[str, Any]:
    """Make a subgraph of the example's nodes, and save it to the node library; returns its file."""
    flow = json.loads(EXAMPLE.read_text())
    for node in flow["nodes"]:
        if node["type"] == "QwenLoraStack":
            node["widgets_values"][0] = [{"lora_name": "", "strength": 1, "enabled": True}]
    bench.load(flow)
    bench.page.evaluate(_CONVERT, [OUTSIDE, INPUTS])
    bench.settle()
    bench.page.evaluate(_PUBLISH, NAME)
    bench.settle(1000)
    (file,) = bench.comfy.base.glob(f"user/*/subgraphs/{NAME}.json")
    return json.loads(file.read_text())


def settled(flow: dict[str, Any]) -> dict[str, Any]:
    """The file without what is another each time that it is made."""
    (definition,) = flow["definitions"]["subgraphs"]
    (node,) = flow["nodes"]
    node |= {"pos": [0, 0], "size": SIZE, "order": 0}
    node["properties"] = {}
    for out in node["outputs"]:
        out["links"] = None
    flow |= {"last_node_id": node["id"], "extra": EXTRA}
    text = json.dumps(flow)
    slots = definition["inputs"] + definition["outputs"]
    for own in [definition, *slots]:
        name = f"qwenlora/{own['name']}" if own is not definition else "qwenlora"
        text = text.replace(own["id"], str(uuid.uuid5(uuid.NAMESPACE_URL, name)))
    result: dict[str, Any] = json.loads(text)
    return result


def make(comfy: ComfyProcess, browser: Browser) -> None:
    """Write the blueprint."""
    bench = Workbench.open(comfy, browser, Frontend.NEWEST, Renderer.CANVAS)
    # The host reads it in its system's encoding: other than ASCII would not be safe.
    text = json.dumps(settled(publish(bench)), indent=1, ensure_ascii=True)
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text + "\n", encoding="ascii")
    bench.close()


def main() -> None:
    """Start ComfyUI and a browser, and write the blueprint."""
    with comfy_and_browser() as (comfy, browser):
        make(comfy, browser)


if __name__ == "__main__":
    main()
