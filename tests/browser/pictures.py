"""Makes the pictures of the example workflows and of `docs/`, in a real ComfyUI and Chromium.

Run as `python -m tests.browser.pictures` from the repository's root.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import LoraDraft

from .comfy_process import REPOSITORY, ComfyProcess
from .frontends import Frontend, Renderer
from .started import comfy_and_browser
from .workbench import Workbench

if TYPE_CHECKING:
    from playwright.sync_api import Browser

EXAMPLES = REPOSITORY / "example_workflows"
DOCS = REPOSITORY / "docs" / "pictures"
_WIDE = {"width": 1280, "height": 720}
_MARGIN = 30
_NO_MENUS = {
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
_NAMED = {
    "CLIPLoader": "models/text_encoders",
    "VAELoader": "models/vae",
    "LoadImage": "input",
}
_FOCUS = "() => { app.extensionManager.focusMode = true; }"
_FIT = """([width, height, margin, most]) => {
    const boxes = app.graph.nodes.map((own) => [own.pos[0], own.pos[1] - 30,
        own.pos[0] + own.size[0], own.pos[1] + own.size[1]]);
    const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((own) => own[i])) - margin);
    const [right, bottom] = [2, 3].map((i) => Math.max(...boxes.map((own) => own[i])) + margin);
    const scale = Math.min(most, width / (right - left), height / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [-left, -top];
    app.canvas.setDirty(true, true);
    return [(right - left) * scale, (bottom - top) * scale];
}"""
ROWS = [
    {"lora_name": "style.safetensors", "strength": 0.8, "enabled": True},
    {"lora_name": "qwen/light.safetensors", "strength": 1.0, "enabled": True},
    {"lora_name": "character.safetensors", "strength": 0.5, "enabled": False},
]


def shoot(bench: Workbench, path: Path, *, most: float = 1.0) -> None:
    """Write the part of the canvas that has nodes: as PNG, or small as JPEG."""
    bench.page.evaluate(_FOCUS)
    size = bench.page.evaluate(_FIT, [_WIDE["width"], _WIDE["height"], _MARGIN, most])
    bench.settle(1500)
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1]}
    kind: dict[str, Any] = {"type": "jpeg", "quality": 70} if path.suffix == ".jpg" else {}
    bench.page.screenshot(path=str(path), clip=clip, **kind)


def shoot_examples(bench: Workbench) -> None:
    """Each example workflow, beside its file."""
    for path in sorted(EXAMPLES.glob("*.json")):
        bench.load(json.loads(path.read_text()))
        bench.page.keyboard.press("Escape")
        shoot(bench, path.with_suffix(".jpg"))


def shoot_rows(bench: Workbench, path: Path) -> None:
    """A stack with rows, after a run."""
    stack = bench.add("QwenLoraStack", (400, 100), loras=ROWS)
    bench.chain(stack)
    bench.queue()
    bench.settle(1500)
    keep(bench, stack)
    shoot(bench, path, most=1.3)


def shoot_report(bench: Workbench, path: Path) -> None:
    """A loader that says that something was left out, with the whole of its report."""
    loader = bench.add("QwenLoraLoader", (400, 100), lora_name="part.safetensors")
    bench.chain(loader)
    bench.queue()
    bench.settle(1500)
    keep(bench, loader)
    shoot(bench, path, most=1.3)


def keep(bench: Workbench, node: Any) -> None:
    """Take all other nodes off the canvas."""
    bench.page.evaluate(
        "(id) => { for (const own of [...app.graph.nodes]) if (String(own.id) !== String(id))"
        " app.graph.remove(own); }",
        node,
    )


def put_loras(folder: Path) -> None:
    """The files that the pictures name; of `part` something cannot be applied."""
    for name, seed in (("style", 1), ("character", 2), ("qwen/light", 3), ("part", 4)):
        draft = LoraDraft.full(seed, rank=4, blocks=2)
        if name == "part":
            draft.put("transformer_blocks.0.attn.to_q", "diff_b", 5)
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        draft.save(path)


def put_named(comfy: ComfyProcess) -> None:
    """Empty files where the examples name some, so that the page marks none as missing."""
    for path in EXAMPLES.glob("*.json"):
        for node in json.loads(path.read_text())["nodes"]:
            name, *_ = node.get("widgets_values") or [None]
            if folder := _NAMED.get(node["type"]):
                (comfy.base / folder).mkdir(parents=True, exist_ok=True)
                (comfy.base / folder / name).touch()
            elif node["type"] == "QwenLoraStack":
                for row in name:
                    (comfy.loras / row["lora_name"]).touch()


def make_all(comfy: ComfyProcess, browser: Browser) -> None:
    """Make every picture."""
    put_named(comfy)
    put_loras(comfy.loras)
    comfy.choose(**_NO_MENUS)
    DOCS.mkdir(exist_ok=True)
    for renderer, shots in (
        (Renderer.CANVAS, {"rows.png": shoot_rows, "report.png": shoot_report}),
        (Renderer.NODES_2, {"nodes-2.png": shoot_rows}),
    ):
        for name, shot in shots.items():
            bench = Workbench.open(comfy, browser, Frontend.NEWEST, renderer)
            bench.page.set_viewport_size(_WIDE)
            shot(bench, DOCS / name)
            bench.close()
    bench = Workbench.open(comfy, browser, Frontend.NEWEST, Renderer.CANVAS)
    bench.page.set_viewport_size(_WIDE)
    shoot_examples(bench)
    bench.close()


def main() -> None:
    """Start ComfyUI and a browser, and make every picture."""
    with comfy_and_browser() as (comfy, browser):
        make_all(comfy, browser)


if __name__ == "__main__":
    main()
