"""Installs a wheel into a fresh environment, and tries it there."""

from __future__ import annotations

import email
import os
import re
import sys
from pathlib import Path

from archive import read_wheel
from refusal import Refused, output

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
"""What wheels are tried on, the oldest first."""

SMOKE = Path(__file__).with_name("smoke.py")
_UV = [sys.executable, "-m", "uv"]
_OF_TORCH = re.compile(r"(.+?)\s*;\s*extra == [\"']torch[\"']")


class NoInterpreter(Exception):
    """This system has no such Python, and uv gets none."""


def try_wheel(wheel: Path, python: str, folder: Path, *, torch: str | None = None) -> str:
    """Install a wheel and run its smoke test; what it ran on, in words.

    Args:
        wheel: The wheel.
        python: Whose Python: a version, or what else `uv venv --python` takes.
        folder: An empty folder for the environment.
        torch: "oldest" or "newest" to install PyTorch and what the extra names beside it, too.

    Raises:
        NoInterpreter: there is no such Python.
        Refused: it cannot be installed, or does not work.
    """
    environment = folder / "environment"
    try:
        output([*_UV, "venv", "--no-project", "--python", python, environment], environ=_search())
    except Refused as refused:
        raise NoInterpreter(f"no Python `{python}`: {_reason(str(refused))}") from refused
    interpreter = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    output(_install(wheel, interpreter, torch), folder=folder, environ=_plain())
    smoke = [interpreter, SMOKE, *(["--torch"] if torch else [])]
    output(smoke, folder=folder, environ=_plain())
    said = output([interpreter, "-I", "-c", _WHAT], folder=folder, environ=_plain())
    return said.strip()


_WHAT = """
import platform, importlib.metadata
found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
names = [name for name in ("torch", "numpy", "safetensors") if name in found]
print(", ".join(["Python " + platform.python_version(), *(f"{n} {found[n]}" for n in names)]))
"""


def _install(wheel: Path, interpreter: Path, torch: str | None) -> list[str | Path]:
    command = [*_UV, "pip", "install", "--quiet", "--no-config", "--python", interpreter]
    if torch is None:
        # With no index to ask, an installation shows that nothing else is required.
        return [*command, "--no-index", wheel]
    # Named here, they are what "direct" means: the oldest that the extra allows.
    lowest = ["--resolution", "lowest-direct"] if torch == "oldest" else []
    return [*command, *lowest, wheel, *torch_requirements(wheel)]


def torch_requirements(wheel: Path) -> list[str]:
    """What the wheel's extra `torch` names."""
    members = read_wheel(wheel)
    (metadata,) = (data for name, data in members.items() if name.endswith(".dist-info/METADATA"))
    lines = email.message_from_bytes(metadata).get_all("Requires-Dist", [])
    found = [match[1] for line in lines if (match := _OF_TORCH.fullmatch(line))]
    if not any(requirement.startswith("torch") for requirement in found):
        raise Refused(f"`{wheel.name}` has no extra `torch` that requires torch")
    return found


def _search() -> dict[str, str]:
    """Where uv looks for interpreters: pyenv's, too, which are not on the path."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [str(folder) for folder in sorted(root.glob("versions/3.*/bin"))]
    environ = _plain()
    return {**environ, "PATH": os.pathsep.join([environ.get("PATH", ""), *folders])}


def _plain() -> dict[str, str]:
    """No variable may lead an interpreter to other packages."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"
    }


def _reason(text: str) -> str:
    """The line of uv's that says what it looked for."""
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if line.startswith(("error:", "cause:", "×"))), lines[-1])
