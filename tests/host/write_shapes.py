"""Writes `shapes.json`, by which stubs stand in for the nodes: `make shapes`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PACK = REPOSITORY / "comfy" / "qwenlora_nodes"
SHAPES = PACK / "shapes.json"

FILES = "files"
MARK = "of-qwenlora.safetensors"
"""How the name of a file ends that marks its folder, whose name comes before."""

FOLDERS = ("loras", "diffusion_models")
_ATTRIBUTES = (
    "RETURN_TYPES",
    "RETURN_NAMES",
    "OUTPUT_TOOLTIPS",
    "CATEGORY",
    "DESCRIPTION",
    "SEARCH_ALIASES",
    "DEPRECATED",
    "OUTPUT_NODE",
)


def shape_of(node: type) -> dict[str, Any]:
    """What a node tells the host of itself; where it lists files, there is the folder's name."""
    told = {name: getattr(node, name) for name in _ATTRIBUTES if hasattr(node, name)}
    shape = json.loads(json.dumps({"class": told, **node.INPUT_TYPES()}))
    return _without_files(shape)


def text_of(shapes: dict[str, Any]) -> str:
    """The file's text, one input a line."""

    def lines(members: dict[str, Any], depth: int) -> str:
        indent, is_last = "  " * depth, depth == 3
        texts = [
            f"{indent}{json.dumps(key)}: "
            + (json.dumps(own, ensure_ascii=False) if is_last else lines(own, depth + 1))
            for key, own in members.items()
        ]
        return "{\n" + ",\n".join(texts) + "\n" + "  " * (depth - 1) + "}"

    return lines(shapes, 1) + "\n"


def put_marks(models: Path) -> list[Path]:
    """Put a file that marks its folder into each folder that nodes list."""
    marks = [models / folder / f"{folder}-{MARK}" for folder in FOLDERS]
    for mark in marks:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return marks


def _without_files(value: Any) -> Any:
    marks = {f"{folder}-{MARK}": {FILES: folder} for folder in FOLDERS}
    if isinstance(value, str):
        return marks.get(value, value)
    if isinstance(value, list):
        return [_without_files(own) for own in value]
    if isinstance(value, dict):
        return {key: _without_files(own) for key, own in value.items()}
    return value


def main() -> None:
    from comfy_host import ComfyHost, Device, Graph  # beside this file

    with tempfile.TemporaryDirectory() as folder:
        host = ComfyHost.start(Path(folder), Device.CPU)
        import nodes  # ComfyUI's

        put_marks(Path(folder) / "models")
        ids = Graph(host).load_pack(PACK)
        shapes = {name: shape_of(nodes.NODE_CLASS_MAPPINGS[name]) for name in sorted(ids)}
        host.stop()
    SHAPES.write_text(text_of(shapes), encoding="utf-8")


if __name__ == "__main__":
    main()
