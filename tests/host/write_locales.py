"""Writes `locales/en/nodeDefs.json` from the nodes' own definitions: `make locales`.

The other languages are translations of that file, by hand; `test_words.py` says what they lack.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PACK = REPOSITORY / "comfy" / "qwenlora_nodes"
ENGLISH = REPOSITORY / "locales" / "en" / "nodeDefs.json"


def texts_of(info: dict[str, Any]) -> dict[str, Any]:
    """The texts of one node, of what `/object_info` says, as the frontend's locales have them."""
    kinds = [*info["input"].get("required", {}).items(), *info["input"].get("optional", {}).items()]
    inputs = {
        # The frontend does the same: a point would lead one level down.
        name.replace(".", "_"): _slot(name, (options[1:] or [{}])[0].get("tooltip"))
        for name, options in kinds
    }
    tips = info.get("output_tooltips") or [None] * len(info["output_name"])
    outputs = {
        str(index): _slot(name, tip)
        for index, (name, tip) in enumerate(zip(info["output_name"], tips, strict=True))
    }
    texts = {"display_name": info["display_name"], "description": info["description"]}
    return {**texts, "inputs": inputs, "outputs": outputs}


def _slot(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name, **({"tooltip": tooltip} if tooltip else {})}


def main() -> None:
    from comfy_host import ComfyHost, Device, Graph  # beside this file

    with tempfile.TemporaryDirectory() as folder:
        host = ComfyHost.start(Path(folder), Device.CPU)
        ids = Graph(host).load_pack(PACK)
        texts = {}
        for name in sorted(ids):
            _, info = host.request("GET", f"/object_info/{name}")
            texts[name] = texts_of(info[name])
        host.stop()
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
