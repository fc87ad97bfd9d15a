"""The installed package, looked at before a node needs it: is it there, whole, and of this version?

Needs nothing but Python's own library.
"""

from __future__ import annotations

import importlib
import re
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

from .install import Place, advice
from .version import __version__

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["difference", "fault_of_import", "find_fault"]

_NAME = "qwenlora"
_CORE = "_core"
_REINSTALL = ("--force-reinstall", "--no-deps")
_UPGRADE = ("--upgrade", "--no-deps")
_ELF = b"\x7fELF"


def find_fault(place: Place) -> str | None:
    """Why the package cannot be used at all, and what to do; None where it can.

    It is imported here, as far as that needs no torch.
    """
    python = place.interpreter
    if python.version < (3, 10):
        return f"qwenlora cannot run in ComfyUI's {python.name}. {advice(place)}"
    try:
        package = importlib.import_module(_NAME)
    except ImportError as error:
        if getattr(error, "name", None) == _NAME:
            return f"qwenlora is not installed in ComfyUI's {python.name}. {advice(place)}"
        return _sentence(error)
    return _fault_of_folder(package, place) or _fault_of_core(package, place)


def fault_of_import(error: ImportError, place: Place) -> str:
    """Why a module of ours cannot be imported though the package can, and what to do."""
    lacks_ours = str(getattr(error, "name", None) or "").partition(".")[0] == _NAME
    versions = f"The nodes are {__version__}, qwenlora is {_version()}"
    if lacks_ours and _is_older():
        return f"{versions}, which is too old for them. {advice(place, *_UPGRADE)}"
    if lacks_ours and _is_newer():
        return f"{versions}, which is too new for them: update the nodes, then restart ComfyUI"
    # On torch it speaks for itself.
    return _sentence(error)


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
    cores = sorted(folder.glob(f"{_CORE}.*"))
    if not cores:
        return (
            f"`import qwenlora` gives {folder}, which is no installed qwenlora: give it another"
            f" name, if it is another's. {advice(place)}"
        )
    built = [core for core in cores if core.name.endswith((".so", ".pyd"))]
    if not built:
        return f"qwenlora in {folder} lacks its Rust part. {advice(place, *_REINSTALL)}"
    loaded = [core for core in built if core.name[len(_CORE) :] in EXTENSION_SUFFIXES]
    if not loaded:
        return _of_another_system(folder, built[0].name, place)
    if _is_cut_off(loaded[0]):
        # Loading it would end the process.
        return f"{loaded[0]} is cut off. {advice(place, *_REINSTALL)}"
    return None


def _fault_of_core(package: ModuleType, place: Place) -> str | None:
    """Find that the Rust part cannot be loaded."""
    try:
        _ = package.__version__
    except ImportError as error:
        folder = _folder_of(package)
        tag = _tag_of(folder)
        if tag and not _is_of_this_system(tag, place):
            return _of_another_system(folder, tag, place)
        text = f"The Rust part of qwenlora in {folder} cannot be loaded ({_sentence(error)})"
        return f"{text}. {advice(place, *_REINSTALL)}"
    return None


def _of_another_system(folder: Path, what: str, place: Place) -> str:
    return (
        f"qwenlora in {folder} is for another system or Python ({_tag_of(folder) or what})."
        f" {advice(place, *_REINSTALL)}"
    )


def _folder_of(package: ModuleType) -> Path:
    """The folder of a package, also of one without `__init__.py`."""
    places = [getattr(package, "__file__", None), *getattr(package, "__path__", ())]
    place = Path(next(filter(None, places), _NAME))
    return place.parent if place.suffix == ".py" else place


def _tag_of(folder: Path) -> str:
    """The tag of the wheel that a package came in, by the metadata beside it; or empty."""
    for metadata in folder.parent.glob(f"{_NAME}-*.dist-info/WHEEL"):
        found = re.search(r"^Tag: (\S+)", metadata.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return ""


def _is_of_this_system(tag: str, place: Place) -> bool:
    """Tell by a tag if a wheel is for this system and machine; for this Python it is then."""
    system = {"win32": "win", "darwin": "macosx"}.get(place.interpreter.system, "linux")
    platform = tag.rpartition("-")[2]
    return system in platform and platform.endswith((place.interpreter.machine, "universal2"))


def _is_cut_off(library: Path) -> bool:
    """Tell if a library ends before its own table of contents, which stands at its end.

    Only Linux loads such a file all the same, and the process ends at the first page that is not
    there. Other systems refuse it.
    """
    with library.open("rb") as file:
        header = file.read(64)
    if not header.startswith(_ELF):
        return False
    if len(header) < 64:
        return True
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return bool(library.stat().st_size < table + entry_size * entries)


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
