"""One version: `Cargo.toml` has it, the nodes carry it along."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import qwenlora

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no `tomllib`")

REPOSITORY = Path(__file__).parent.parent


def test_the_nodes_carry_the_version_of_the_workspace():
    workspace = tomllib.loads((REPOSITORY / "Cargo.toml").read_text(encoding="utf-8"))
    version = runpy.run_path(str(REPOSITORY / "comfy" / "qwenlora_nodes" / "version.py"))
    assert version["__version__"] == workspace["workspace"]["package"]["version"]


def test_the_wheel_has_the_version_of_the_workspace():
    workspace = tomllib.loads((REPOSITORY / "Cargo.toml").read_text(encoding="utf-8"))
    assert qwenlora.__version__ == workspace["workspace"]["package"]["version"]
