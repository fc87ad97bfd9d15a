"""A ComfyUI as a user has it: a folder, and in it a Python that has what ComfyUI needs, no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..browser.comfy_process import ComfyProcess
from ..host.comfy_host import comfy_root
from .environment import Environment

COMPILERS = ("cc", "gcc", "clang", "cargo", "rustc", "cl")
# Settings of the package around it, and packs of its makers.
_NOT_A_USERS = shutil.ignore_patterns("extra_model_paths.yaml", "custom_nodes")
# The engine, and what only tests and scripts of it need.
_NOT_COMFYUIS = ("qwenlora*", "*.pth", "cache_dit*", "diffusers*", "horde*", "lycoris*", "mypy*")
_NOT_COMFYUIS += ("peft*", "playwright*", "ray*")
_PACKAGES = sysconfig.get_path("purelib")


def _link(source: str, target: str) -> None:
    """Put the same file at another place: whoever replaces or deletes it there leaves it here."""
    try:
        os.link(source, target)
    except OSError:  # the places are on two disks
        os.symlink(source, target)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What of the packages is no part of a user's ComfyUI; nobody compiles, so C's headers go."""
    patterns = _NOT_COMFYUIS if folder == _PACKAGES else ("include",)
    return shutil.ignore_patterns(*patterns)(folder, names)


@dataclass(frozen=True)
class Installation:
    """A ComfyUI 0.3.75 and its Python.

    Attributes:
        root: ComfyUI's folder.
        home: The user's folder.
        wheels: A folder of wheels, which stands for the index.
    """

    root: Path
    home: Path
    wheels: Path

    @classmethod
    def make(cls, root: Path, home: Path, wheels: Path) -> Installation:
        """Make it in a folder that is not there yet.

        Raises:
            ModuleNotFoundError: ComfyUI is not installed.
        """
        shutil.copytree(comfy_root(), root, copy_function=_link, ignore=_NOT_A_USERS)
        (root / "custom_nodes").mkdir()
        (root / "models" / "loras").mkdir(exist_ok=True)
        home.mkdir()
        site = Environment.create(root / ".venv").site
        shutil.copytree(_PACKAGES, site, copy_function=_link, ignore=_left_out, dirs_exist_ok=True)
        return cls(root, home, wheels)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return Environment(self.root / ".venv").python

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables of all that runs in it: a path without compilers, no index."""
        return {
            "PATH": str(self.python.parent),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
        }

    def run(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run its Python."""
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.root,
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def packages(self) -> set[tuple[str, str]]:
        """Names and versions of what its Python has."""
        return Environment(self.root / ".venv").packages()

    def install(self, pack: Path, name: str) -> Path:
        """Install a registry's zip as ComfyUI-Manager 4.3 does; returns its folder.

        It names the folder by the registry's id, keeps a list of the files, and gives each line of
        the requirements to a pip of its own.
        """
        folder = self.root / "custom_nodes" / name
        with zipfile.ZipFile(pack) as file:
            file.extractall(folder)
            (folder / ".tracking").write_text("\n".join(file.namelist()), encoding="utf-8")
        for line in (folder / "requirements.txt").read_text().splitlines():
            wanted = line.partition("#")[0].strip()
            if wanted:
                self.run("-m", "pip", "install", wanted)
        return folder

    def start(self, frontend: Path) -> ComfyProcess:
        """Start ComfyUI."""
        command = [str(self.python), "main.py", "--front-end-root", str(frontend)]
        return ComfyProcess.launch(self.root, command, self.environ)

    def files(self) -> set[str]:
        """All files below the user's two folders, but for the bytecode of Python."""
        found = (path for top in (self.root, self.home) for path in top.rglob("*"))
        return {str(path) for path in found if "__pycache__" not in path.parts}
