"""The program that packs nodes for ComfyUI's registry, as its own code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(sys.prefix, "comfy-cli")
INSTALL = "make test-python"

_PROGRAM = """
import json, sys

sys.path.insert(0, sys.argv[1])
from comfy_cli.file_utils import zip_files
from comfy_cli.registry.config_parser import extract_node_configuration

read = extract_node_configuration()
zip_files(sys.argv[2], includes=read.tool_comfy.includes)
print(json.dumps(read, default=vars))
"""


def pack_for_registry(root: Path, path: Path) -> dict[str, Any]:
    """Pack a repository as `comfy node publish` does; returns what it tells the registry of it."""
    if not FOLDER.is_dir():
        pytest.skip(f"needs comfy-cli: {INSTALL}")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, FOLDER, path],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Whatever it finds wrong it says on a line of its own, and goes on.
    (line,) = done.stdout.splitlines()
    read: dict[str, Any] = json.loads(line)
    return read
