"""The packages that all but reading keys and the doctor run on, and the check that they are there.

The wheel requires none of them: in ComfyUI they are ComfyUI's, and a resolver must not put another
build of PyTorch in the place of the one that fits the GPU. The extra `torch` of the wheel names the
same versions.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OLDEST", "RequirementError", "release_of", "require"]

OLDEST = {"numpy": "1.24", "safetensors": "0.4.3", "torch": "2.5"}
"""The oldest version of each that will do. In this order: torch complains of a missing numpy."""

_EXTRA = 'run `pip install "qwenlora[torch]"`'
_TORCH = "install PyTorch for your GPU as https://pytorch.org/get-started says"
_HOST = "never into ComfyUI's Python: what is there is ComfyUI's, and comes with its updates"


class RequirementError(ImportError):
    """A package that is needed is missing, too old, or cannot be imported."""


def require() -> None:
    """Check that all that is needed is there.

    Raises:
        RequirementError: A package is missing, too old, or cannot be imported.
    """
    found = {name: _version(name) for name in OLDEST}
    faults = {name: version for name, version in found.items() if not _will_do(name, version)}
    if faults:
        raise RequirementError(_sentence(faults), name=next(reversed(faults)))


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
    except Exception as error:
        # A library that is missing is an OSError; other halves of a package raise anything.
        raise _broken(name, error) from error
    # A folder that an uninstallation left behind can be imported, but has no version.
    version = getattr(module, "__version__", None)
    return None if version is None else str(version)


def _broken(name: str, error: Exception) -> RequirementError:
    # The words of most others say little without their name.
    said = str(error) if isinstance(error, (ImportError, OSError)) else repr(error)
    return RequirementError(
        f"{name} is installed in {_python()}, but cannot be imported: {said}", name=name
    )


def _will_do(name: str, version: str | None) -> bool:
    return version is not None and release_of(version) >= release_of(OLDEST[name])


def _sentence(faults: dict[str, str | None]) -> str:
    """What is wrong with these packages, and the way out."""
    # The one that matters most is last in the table.
    names = [*reversed(faults)]
    missing = [name for name in names if faults[name] is None]
    wrong = []
    if missing:
        wrong.append(f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    wrong += [f"{name} is {faults[name]}" for name in names if faults[name] is not None]
    needed = _listed([f"{name} {OLDEST[name]}" for name in names])
    way_out = f"{_TORCH}, then {_EXTRA}" if "torch" in faults else _EXTRA
    return f"{_listed(wrong)} in {_python()}, and this needs {needed} or newer: {way_out} ({_HOST})"


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
