"""The packages that all but reading keys and the doctor run on, and the check that they are there.

The wheel requires none of them: in ComfyUI they are ComfyUI's, and a resolver must not put another
build of PyTorch in the place of the one that fits the GPU. The extra `torch` of the wheel names the
same versions.
"""

from __future__ import annotations

import importlib
import re
import sys

__all__ = ["OLDEST", "RequirementError", "release_of", "require"]

OLDEST = {"torch": "2.5", "numpy": "1.24", "safetensors": "0.4.3"}
"""The oldest version of each that will do."""

_EXTRA = 'run `pip install "qwenlora[torch]"`'
_HOST = "not in ComfyUI's Python, though: there it is ComfyUI's, and comes with its updates"


class RequirementError(ImportError):
    """A package that is needed is missing, too old, or cannot be imported."""


def require() -> None:
    """Check that all that is needed is there.

    Raises:
        RequirementError: A package is missing, too old, or cannot be imported.
    """
    for name, oldest in OLDEST.items():
        version = _version(name)
        if version is None or release_of(version) < release_of(oldest):
            found = "missing" if version is None else version
            raise RequirementError(
                f"{name} is {found} in {_python()}, and this needs {oldest} or newer:"
                f" {_way_out(name)} ({_HOST})",
                name=name,
            )


def release_of(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 9, 1) of `2.9.1+cu128`."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(number) for number in found[1].split(".")) if found else ()


def _python() -> str:
    # A program that Python is embedded in may not say where it is.
    return sys.executable or "this Python"


def _version(name: str) -> str | None:
    """The version of a package, None where it is missing."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise _broken(name, error) from error
    except (ImportError, OSError) as error:
        raise _broken(name, error) from error
    # A folder that an uninstallation left behind can be imported, but has no version.
    version = getattr(module, "__version__", None)
    return None if version is None else str(version)


def _broken(name: str, error: Exception) -> RequirementError:
    return RequirementError(
        f"{name} is installed in {_python()}, but cannot be imported: {error}", name=name
    )


def _way_out(name: str) -> str:
    if name == "torch":
        return f"install PyTorch for your GPU as https://pytorch.org/get-started says, or {_EXTRA}"
    return _EXTRA
