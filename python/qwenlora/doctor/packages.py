"""Packages installed on a `sys.path`, read from metadata and files: none is imported."""

from __future__ import annotations

import importlib.metadata
import re
from importlib.machinery import EXTENSION_SUFFIXES
from typing import TYPE_CHECKING

from qwenlora.doctor.facts import Distribution, NunchakuKind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["distributions", "has_extension", "import_places", "nunchaku_kind"]

# Another system's Python is looked at, too.
_SUFFIXES = tuple({*EXTENSION_SUFFIXES, ".so", ".pyd"})


def distributions(paths: Sequence[Path]) -> tuple[Distribution, ...]:
    """The installed packages in the order of the path; names in lower case, with hyphens."""
    found = {}
    for path in paths:
        for distribution in importlib.metadata.distributions(path=[str(path)]):
            # Broken metadata, as an interrupted installation leaves it, has no name.
            name = distribution.metadata["Name"]
            if name:
                canonical = re.sub(r"[-_.]+", "-", name).lower()
                version = distribution.metadata["Version"] or "unknown"
                found[canonical, path] = Distribution(name=canonical, version=version, folder=path)
    return tuple(found.values())


def import_places(name: str, paths: Sequence[Path]) -> tuple[Path, ...]:
    """Folders of packages with this name; the first is what an import gives."""
    places = (path / name for path in paths)
    return tuple(dict.fromkeys(p for p in places if (p / "__init__.py").is_file()))


def has_extension(package: Path, name: str) -> bool:
    """Tell if a package's folder holds an extension module."""
    return any(f.name.endswith(_SUFFIXES) for f in package.glob(f"{name}.*"))


def nunchaku_kind(paths: Sequence[Path]) -> NunchakuKind:
    """Which package `nunchaku` is."""
    places = import_places("nunchaku", paths)
    if not places:
        return NunchakuKind.ABSENT
    package = places[0]
    if not (package / "models" / "linear.py").is_file():
        return NunchakuKind.IMPOSTOR
    if not has_extension(package, "_C"):
        return NunchakuKind.NO_EXTENSION
    return NunchakuKind.ENGINE
