"""The README's ways to install, as they stand there, in a ComfyUI without compilers and network."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qwenlora

from .conftest import ROOT
from .installation import Installation

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

INSTALL = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Install\n")[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", INSTALL.partition("\n## ")[0], re.M | re.S)
(PORTABLE,) = (text for language, text in BLOCKS if language == "bat")
ELSEWHERE, SCRIPTS, FROM_SOURCES = (text for language, text in BLOCKS if language == "sh")
ADDRESS = "https://github.com/qwenlora/ComfyUI-qwenlora"
MACHINES_FAULTS = {"gpu-none", "no-loader", "nunchaku-missing"}
"""What the doctor says of any machine without a GPU and without Nunchaku."""


@pytest.fixture
def install(tmp_path: Path, wheel: Path) -> Callable[[Path], Installation]:
    """Makes a ComfyUI in a folder; its index has our wheel alone."""

    def made(root: Path) -> Installation:
        try:
            return Installation.make(root, tmp_path / "home", wheel.parent)
        except ModuleNotFoundError:
            pytest.skip("needs ComfyUI: make setup")

    return made


def run(block: str, folder: Path, comfyui: Installation, python: Path) -> list[str]:
    """Run the lines of a block in a folder, and give what each printed.

    The repository's address leads to this clone. `python` and what it installs are on the path,
    git, and `pip`, which every Python has, but no package.
    """
    git = shutil.which("git")
    if git is None:
        pytest.skip("needs git")
    programs = folder / "programs"
    programs.mkdir()
    (programs / "git").symlink_to(git)
    put_program(programs / "pip", python, "-m", "pip")
    environ = {**comfyui.environ, "PATH": f"{python.parent}{os.pathsep}{programs}"}
    return [_run_line(line, folder, environ) for line in block.splitlines()]


def put_program(path: Path, *command: Path | str) -> None:
    """Write a program that passes its arguments on to a command."""
    path.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n')
    path.chmod(0o755)


def _run_line(line: str, folder: Path, environ: dict[str, str]) -> str:
    words = shlex.split(line, comments=True)
    if words[:2] == ["git", "clone"]:
        assert words[2] == ADDRESS
        words[2] = str(ROOT)
    program = shutil.which(words[0], path=environ["PATH"]) or folder / words[0]
    done = subprocess.run(
        [program, *words[1:]], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    # The doctor's status is what it found, which each test looks at.
    assert done.returncode == 0 or "doctor" in words, done.stdout + done.stderr
    return done.stdout


def require_installed(comfyui: Installation, python: Path, said: str) -> None:
    """See that the doctor says so, and finds no fault but the machine's."""
    assert re.search(rf"^  qwenlora +{re.escape(qwenlora.__version__)}$", said, re.M), said
    ask = [python, "-s", "-m", "qwenlora", "doctor", "--json", "--comfyui", comfyui.root]
    told = subprocess.run(ask, env=comfyui.environ, capture_output=True, check=False).stdout
    findings = json.loads(told)["findings"]
    assert {own["code"] for own in findings if own["severity"] == "problem"} <= MACHINES_FAULTS
    assert "qwenlora" in {own["code"] for own in findings}


def test_in_the_portable_build(tmp_path: Path, install: Callable[[Path], Installation]) -> None:
    portable = tmp_path / "ComfyUI_windows_portable"
    comfyui = install(portable / "ComfyUI")
    embedded = portable / "python_embeded"
    (comfyui.root / ".venv").rename(embedded)
    python = embedded / "python.exe"
    put_program(python, embedded / "bin" / "python")
    *_, said = run(PORTABLE.replace("\\", "/"), portable, comfyui, python)
    require_installed(comfyui, python, said)


def test_elsewhere(tmp_path: Path, install: Callable[[Path], Installation]) -> None:
    comfyui = install(tmp_path / "ComfyUI")
    *_, said = run(ELSEWHERE, comfyui.root, comfyui, comfyui.python)
    require_installed(comfyui, comfyui.python, said)


def test_for_scripts(tmp_path: Path, install: Callable[[Path], Installation]) -> None:
    comfyui = install(tmp_path / "ComfyUI")
    before = comfyui.packages()
    _, said, shown = run(SCRIPTS, comfyui.root, comfyui, comfyui.python)
    assert comfyui.packages() - before == {("qwenlora", qwenlora.__version__)}
    assert "\n  qwenlora " in said
    assert shown.splitlines()[-1] == "all within bf16 rounding (1e-2); reset is bit-exact"


def test_blocks_are_all_tried() -> None:
    # `pip install .` is run by tests/test_readme.py.
    assert FROM_SOURCES == "pip install .\n"
