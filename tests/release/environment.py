"""A virtual environment as a user has it, apart from the one that runs the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_LIST = """
import importlib.metadata, json
found = importlib.metadata.distributions()
print(json.dumps(sorted({(d.metadata["Name"], d.version) for d in found})))
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Environment:
        """Make one of this Python's version, without pip."""
        made = subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        return cls(folder)

    @property
    def scripts(self) -> Path:
        """Where its programs are."""
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.scripts / ("python.exe" if os.name == "nt" else "python")

    @property
    def site(self) -> Path:
        """Its `site-packages`."""
        return self.folder / (
            "Lib/site-packages"
            if os.name == "nt"
            else f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        )

    def run(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run its interpreter with these arguments, in its own folder."""
        return _run([self.python, *arguments], self.folder, check=check)

    def packages(self) -> set[tuple[str, str]]:
        """The names and versions of all that is installed."""
        return {(name, version) for name, version in json.loads(self.run("-c", _LIST).stdout)}

    def pip(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run pip on it; no index is asked."""
        if shutil.which("pip", path=sysconfig.get_path("scripts")) is None:
            pytest.skip("needs pip in the Python that runs the tests")
        verb, *rest = arguments
        options = ["--isolated", "--disable-pip-version-check", "--python", self.python]
        command = [sys.executable, "-m", "pip", *options, verb, "--no-index", *rest]
        return _run(command, self.folder, check=check)

    def uv(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `uv pip` on it; no index is asked."""
        uv = shutil.which("uv", path=sysconfig.get_path("scripts"))
        if uv is None:
            pytest.skip("needs uv: make setup")
        verb, *rest = arguments
        options = ["--no-config", "--no-cache", "--offline", "--no-index", "--python", self.python]
        return _run([uv, "pip", verb, *options, *rest], self.folder, check=check)


def _run(
    command: list[str | Path], folder: Path, *, check: bool
) -> subprocess.CompletedProcess[str]:
    # What the tests' own process was started with must not lead to other packages.
    strangers = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")
    environ = {name: value for name, value in os.environ.items() if name not in strangers}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
