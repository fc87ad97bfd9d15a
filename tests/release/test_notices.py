"""The wheel carries the licenses of the crates that are built into it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTICES = (ROOT / "LICENSE-THIRD-PARTY.txt").read_text(encoding="utf-8")
OURS = {"qwenlora-core", "qwenlora-keys", "qwenlora-py"}


def test_every_crate_inside_is_named_and_no_other() -> None:
    cargo = shutil.which("cargo")
    if cargo is None:
        pytest.skip("needs cargo")
    command = [cargo, "tree", "--locked", "--package", "qwenlora-py", "--edges", "normal"]
    command += ["--target", "all", "--prefix", "none", "--format", "{p}"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    inside = {line.split()[0] for line in told.splitlines()} - OURS
    named = re.findall(r"^- ([\w-]+)", NOTICES, re.MULTILINE)
    assert len(named) > 20
    assert sorted(set(named)) == sorted(inside), "make notices"


def test_licenses_that_must_be_quoted_are() -> None:
    """All but Apache-2.0, whose text is LICENSE: they ask for the names of those who wrote it."""
    parts = re.split(r"^-{80}\n", NOTICES, flags=re.MULTILINE)[1:]
    assert parts
    for part in parts:
        name = part.partition(",")[0]
        is_quoted = "AS IS" in part and "copyright" in part.lower()
        assert is_quoted or name == "Apache License 2.0", name
