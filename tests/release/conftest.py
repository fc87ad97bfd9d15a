"""The wheel of this tree, and fresh environments that it is installed into."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from .environment import Environment

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree; after `make setup` only its Python files are packed anew."""
    maturin = shutil.which("maturin", path=sysconfig.get_path("scripts"))
    if maturin is None:
        pytest.skip("needs maturin: make setup")
    folder = tmp_path_factory.mktemp("wheel")
    command = [maturin, "build", "--release", "--locked", "--interpreter", sys.executable]
    target = ROOT / "target"
    target.mkdir(exist_ok=True)
    # cargo keeps its own builds apart, maturin does not: it stages the library in one place.
    with FileLock(target / "wheel.lock"):
        done = subprocess.run(
            [*command, "--out", folder], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[str], Environment]:
    """Makes an environment in a folder of this name, with nothing installed in it."""
    return lambda name: Environment.create(tmp_path / name)
