"""The wheel of qwenlora that fits a Python, or why there is none, or why the one there does not.

This file is there twice, byte for byte: the nodes need it where the package is missing, and
`qwenlora.doctor` where it looks at another Python. It needs nothing else, and runs on old Pythons.
"""

from __future__ import annotations

import os
import platform
import re
import struct
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Fit", "Interpreter", "fault_of", "fit_of", "running_interpreter"]

_OLDEST_PYTHON = (3, 10)
_OLDEST_GLIBC = (2, 28)
# By system, C library and machine, each as `Interpreter` has them.
_TAGS = {
    ("linux", "glibc", "x86_64"): "manylinux_2_28_x86_64",
    ("linux", "glibc", "aarch64"): "manylinux_2_28_aarch64",
    ("linux", "musl", "x86_64"): "musllinux_1_2_x86_64",
    ("linux", "musl", "aarch64"): "musllinux_1_2_aarch64",
    ("win32", "", "amd64"): "win_amd64",
    ("win32", "", "arm64"): "win_arm64",
    ("darwin", "", "arm64"): "macosx_11_0_arm64",
    ("darwin", "", "x86_64"): "macosx_10_12_x86_64",
}
_SYSTEMS = {"win32": "win_", "darwin": "macosx_"}
_CORE = "_core"
_ELF = b"\x7fELF"
_BUILD = "build it from its sources, which needs Rust (rustup.rs)"


class Interpreter(NamedTuple):
    """What of a Python decides which wheels it can load.

    Attributes:
        implementation: As `sys.implementation.name` has it.
        version: Major and minor.
        is_free_threaded: Whether it is built without the lock.
        bits: 32 or 64.
        system: As `sys.platform` has it.
        machine: In lower case; on Windows what the program is built for, not what it runs on.
        libc: "glibc" or "musl" on Linux; empty elsewhere, or where it is another one.
        libc_version: That of glibc; empty otherwise.
        suffixes: How the names of extensions end that it can load.
    """

    implementation: str
    version: tuple[int, int]
    is_free_threaded: bool
    bits: int
    system: str
    machine: str
    libc: str = ""
    libc_version: tuple[int, ...] = ()
    suffixes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name and version for people: `Python 3.14t`."""
        kind = "Python" if self.implementation == "cpython" else self.implementation
        threaded = "t" if self.is_free_threaded else ""
        return f"{kind} {self.version[0]}.{self.version[1]}{threaded}"


class Fit(NamedTuple):
    """The wheel for a Python, or why there is none.

    Attributes:
        file: The name of the wheel's file; empty where there is none.
        why: Why there is none, as the rest of a sentence; empty where there is one.
        instead: What to do then.
        is_built: Whether that is to build it.
    """

    file: str
    why: str = ""
    instead: str = ""
    is_built: bool = False

    @property
    def text(self) -> str:
        """All of it as one sentence."""
        if self.file:
            return f"The file for this system and Python is {self.file}"
        return f"No wheel fits, because {self.why}: {self.instead}"


def running_interpreter() -> Interpreter:
    """The Python that runs this."""
    machine = platform.machine()
    if sys.platform == "win32":
        # One that is emulated is told of the real machine.
        machine = sysconfig.get_platform().rpartition("-")[2]
    libc, libc_version = _libc() if sys.platform == "linux" else ("", ())
    return Interpreter(
        implementation=sys.implementation.name,
        version=(sys.version_info[0], sys.version_info[1]),
        is_free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        bits=struct.calcsize("P") * 8,
        system=sys.platform,
        machine=machine.lower(),
        libc=libc,
        libc_version=libc_version,
        suffixes=tuple(EXTENSION_SUFFIXES),
    )


def fit_of(python: Interpreter, version: str) -> Fit:
    """The wheel of a version of qwenlora that fits a Python."""
    why, instead = _unfit_python(python)
    if why:
        return Fit("", why, instead)
    tag = _TAGS.get((python.system, python.libc, python.machine))
    if tag is None:
        system = " ".join(filter(None, (python.system, python.libc, python.machine)))
        return Fit("", f"none is made for this system ({system})", _BUILD, is_built=True)
    if python.libc == "glibc" and python.libc_version < _OLDEST_GLIBC:
        found, needed = _dotted(python.libc_version), _dotted(_OLDEST_GLIBC)
        why = f"this system has glibc {found}, and {needed} or newer is needed"
        return Fit("", why, _BUILD, is_built=True)
    return Fit(f"qwenlora-{version}-cp310-abi3-{tag}.whl")


def fault_of(folder: Path, python: Interpreter) -> str:
    """Why a Python cannot load the Rust part of an installed qwenlora, as far as files tell.

    Empty where they tell nothing: then loading it does.
    """
    cores = sorted(folder.glob(f"{_CORE}.*"))
    built = [core for core in cores if core.name.endswith((".so", ".pyd"))]
    if not built:
        return f"qwenlora lacks its Rust part, in {folder}"
    tag = _tag_of(folder)
    loaded = [core for core in built if core.name[len(_CORE) :] in python.suffixes]
    if not loaded or (tag and not _is_for(tag, python)):
        return f"qwenlora is that of another system or Python ({tag or built[0].name}), in {folder}"
    return f"qwenlora is cut off, in {loaded[0]}" if _is_cut_off(loaded[0]) else ""


def _tag_of(folder: Path) -> str:
    """The tag of the wheel that a package came in, by the metadata beside it; or empty."""
    for metadata in folder.parent.glob("qwenlora-*.dist-info/WHEEL"):
        text = metadata.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^Tag: (\S+)", text, re.MULTILINE)
        if found:
            return found[1]
    return ""


def _is_for(tag: str, python: Interpreter) -> bool:
    """Tell by a wheel's tag if it is for a Python's system and machine."""
    system = _SYSTEMS.get(python.system, "linux")
    # A 32-bit Python has another machine than its system.
    machines = (python.machine, "universal2") if python.bits == 64 else ("",)
    platform_tag = tag.rpartition("-")[2]
    return system in platform_tag and platform_tag.endswith(machines)


def _is_cut_off(library: Path) -> bool:
    """Tell if a library ends before its own table of contents, which stands at its end.

    Only Linux loads such a file all the same, and ends the process at the first page that is not
    there. Other systems refuse it.
    """
    with library.open("rb") as file:
        header = file.read(64)
    if not header.startswith(_ELF) or len(header) < 64:
        return header.startswith(_ELF)
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return bool(library.stat().st_size < table + entry_size * entries)


def _unfit_python(python: Interpreter) -> tuple[str, str]:
    """Why a Python can load no wheel on whichever system, and what to do."""
    if python.implementation != "cpython":
        return f"this is {python.name}", "run ComfyUI with CPython"
    if python.version < _OLDEST_PYTHON:
        needed = _dotted(_OLDEST_PYTHON)
        return f"{python.name} is too old", f"run ComfyUI with Python {needed} or newer"
    if python.is_free_threaded:
        return (
            f"{python.name} is free-threaded and lacks the stable ABI that they are built for",
            "run ComfyUI with the usual Python",
        )
    if python.bits != 64:
        return "this is a 32-bit Python", "run ComfyUI with a 64-bit one"
    return "", ""


def _libc() -> tuple[str, tuple[int, ...]]:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        name = version = ""
    if name == "glibc":
        return name, tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    built_for = (sysconfig.get_config_var(key) for key in ("SOABI", "HOST_GNU_TYPE"))
    return ("musl" if any("musl" in str(value) for value in built_for) else ""), ()


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
