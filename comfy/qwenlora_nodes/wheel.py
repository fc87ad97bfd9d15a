"""The installed package, looked at before a node needs it: is it there, whole, and of this version?

Needs nothing but Python's own library.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .fitting import fault_of
from .install import Place, advice
from .version import __version__

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["difference", "fault_of_import", "find_fault"]

_NAME = "qwenlora"
_NODES = Path(__file__).parent
# What of ComfyUI the nodes import.
_HOSTS = frozenset({"comfy", "execution", "folder_paths", "nodes", "server"})
_REINSTALL = ("--force-reinstall", "--no-deps")
_UPGRADE = ("--upgrade", "--no-deps")


def find_fault(place: Place) -> str | None:
    """Why the package cannot be used at all, and what to do; None where it can.

    It is imported here, as far as that needs no torch.
    """
    python = place.interpreter
    if python.version < (3, 10):
        return f"qwenlora cannot run in ComfyUI's {python.name}. {advice(place)}"
    try:
        package = importlib.import_module(_NAME)
    except Exception as error:  # noqa: BLE001 - it may be another's, or a file that is cut off
        if isinstance(error, ImportError) and error.name == _NAME:
            return f"qwenlora is not installed in ComfyUI's {python.name}. {advice(place)}"
        return _broken(error, place)
    return _fault_of_folder(package, place) or _fault_of_core(package, place)


def fault_of_import(error: Exception, place: Place) -> str:
    """Why a module of ours cannot be imported though the package can, and what to do."""
    name = str(getattr(error, "name", None))
    lacking = isinstance(error, ImportError) and name.partition(".")[0] == _NAME
    versions = f"The nodes are {__version__}, qwenlora is {_version()}"
    if lacking and _is_older():
        return f"{versions}, which is too old for them. {advice(place, *_UPGRADE)}"
    if lacking and _is_newer():
        return f"{versions}, which is too new for them: update the nodes, then restart ComfyUI"
    if _is_of_nodes(error):
        return (
            f"the nodes' own files are broken, in {_NODES} ({_told(error)}): install or update"
            " the nodes anew, then restart ComfyUI"
        )
    if lacking or isinstance(error, SyntaxError):
        return _broken(error, place)
    if name.partition(".")[0] in _HOSTS:
        return f"this ComfyUI is too old or too new for the nodes ({_told(error)}): update both"
    # On torch it speaks for itself.
    return _sentence(error) if isinstance(error, ImportError) else _told(error)


def _is_of_nodes(error: Exception) -> bool:
    """Tell if a file of the nodes is missing, cut off, or of another version than the rest."""
    if isinstance(error, SyntaxError):
        return _NODES in Path(error.filename or "").parents
    own = __name__.rpartition(".")[0]
    return isinstance(error, ImportError) and str(error.name).startswith(f"{own}.")


def difference(place: Place) -> tuple[bool, str]:
    """Whether the package is older than the nodes, and how the versions differ; empty if not."""
    if _is_older():
        return True, (
            f"The nodes are {__version__}, qwenlora is {_version()}: they run, but it is older than"
            f" they are. {advice(place, *_UPGRADE)}"
        )
    if _is_newer():
        return False, (
            f"the nodes are {__version__}, qwenlora is {_version()}: they run; update them, too,"
            " for what is new"
        )
    return False, ""


def _fault_of_folder(package: ModuleType, place: Place) -> str | None:
    """Find that the name stands for another folder, or for one whose Rust part cannot be loaded."""
    folder = _folder_of(package)
    if not any(folder.glob("_core.*")):
        return (
            f"`import qwenlora` finds another, {folder}: give that another name if the package is"
            f" installed, too. {advice(place)}"
        )
    # One that is cut off would end the process when it is loaded.
    fault = fault_of(folder, place.interpreter)
    return f"{fault}. {advice(place, *_REINSTALL)}" if fault else None


def _fault_of_core(package: ModuleType, place: Place) -> str | None:
    """Find that the Rust part cannot be loaded."""
    try:
        _ = package.__version__
    except Exception as error:  # noqa: BLE001 - one that is another's, or half written, may say anything
        folder = _folder_of(package)
        text = f"qwenlora's Rust part cannot be loaded, in {folder} ({_sentence(error)})"
        return f"{text}. {advice(place, *_REINSTALL)}"
    return None


def _folder_of(package: ModuleType) -> Path:
    """The folder of a package, also of one without `__init__.py`; the file of a module."""
    places = [getattr(package, "__file__", None), *getattr(package, "__path__", ())]
    place = Path(next(filter(None, places), _NAME))
    return place.parent if place.name == "__init__.py" else place


def _broken(error: Exception, place: Place) -> str:
    return f"qwenlora is broken ({_told(error)}). {advice(place, *_REINSTALL)}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {_sentence(error)}"


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _version() -> str:
    return str(getattr(sys.modules.get(_NAME), "__version__", "unknown"))


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _is_older() -> bool:
    return _release(_version()) < _release(__version__)


def _is_newer() -> bool:
    return _release(_version()) > _release(__version__)
