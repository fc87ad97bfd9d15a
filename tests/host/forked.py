"""Loads our nodes in the real ComfyUI, each time in a process of its own.

A program: `python -S forked.py REQUEST`, a JSON file. ComfyUI is imported once, without qwenlora,
and each case runs in a copy of that process. What came of it is in `<result>/<case>.json`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from comfy_host import ComfyHost, Device, Graph, HostSource  # beside this file


class Lines(logging.Handler):
    """What our logger says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append([record.levelname, record.getMessage()])


def run(host: ComfyHost, case: dict[str, Any]) -> dict[str, Any]:
    """Load the pack of a case where its folders come first, and post its prompts."""
    import nodes
    import torch

    torch.__version__ = case.get("torch", torch.__version__)
    sys.path[:0] = case["path"]
    lines = Lines()
    logger = logging.getLogger("qwenlora")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    host.serve()
    graph = Graph(host)
    HostSource.objects["none"] = None
    before = list(sys.path)
    loaded = [sorted(graph.load_pack(Path(pack))) for pack in case["packs"]]
    ids = [name for name in nodes.NODE_CLASS_MAPPINGS if name in case["ids"]]
    info = host.request("GET", "/object_info")[1]
    done = [graph.run(prompt) for prompt in case["prompts"]]
    return {
        "loaded": loaded,
        "kept_path": sys.path == before,
        "lines": lines.lines,
        "info": {name: info[name] for name in ids},
        "aliases": {
            name: getattr(nodes.NODE_CLASS_MAPPINGS[name], "SEARCH_ALIASES", None) for name in ids
        },
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "qwenlora"),
        "routes": sorted({route.path for route in host.server.routes if hasattr(route, "path")}),
        "done": [
            {"status": own.status, "success": own.success, "error": own.error}
            | {"node_errors": own.node_errors}
            for own in done
        ],
    }


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if importlib.util.find_spec("qwenlora") is not None:
        sys.stderr.write("qwenlora lies in site-packages itself\n")
        return 3
    host = ComfyHost.imported(Path(request["base"]), Device.CPU)
    for lora in Path(request["loras"]).iterdir():
        shutil.copy(lora, host.loras)
    for name, case in request["cases"].items():
        child = os.fork()
        if child == 0:
            try:
                result = run(host, case)
            except BaseException:  # noqa: BLE001 - the parent has no other way to learn of it
                result = {"failed": traceback.format_exc()}
            Path(request["result"], f"{name}.json").write_text(json.dumps(result))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            text = json.dumps({"failed": f"the process ended with {status}"})
            Path(request["result"], f"{name}.json").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
