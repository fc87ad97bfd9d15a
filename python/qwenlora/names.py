"""Names for the LoRAs of a stack: short, no two alike."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import PurePath

    from qwenlora.spec import LoraSpec

__all__ = ["names_of", "shortest_names"]


def names_of(specs: Sequence[LoraSpec]) -> tuple[str, ...]:
    """The names of a stack's LoRAs in reports and errors.

    A LoRA is called by its title. Files of one title take as much of their folders before it as
    tells them apart: trainers give one name to every file (`pytorch_lora_weights.safetensors`).
    What is still alike is numbered: one file twice, state dicts, names that the caller gave.
    """
    names = [spec.title for spec in specs]
    groups: dict[str, list[int]] = defaultdict(list)
    for at, name in enumerate(names):
        groups[name].append(at)
    for name, own in groups.items():
        files = {at: path for at in own if (path := _path_of(specs[at])) is not None}
        if len(own) > 1 and files:
            # A name that the caller gave is not changed for a file's sake.
            taken = (name,) if len(files) < len(own) else ()
            shortest = shortest_names(list(files.values()), taken=taken)
            for at, found in zip(files, shortest, strict=True):
                names[at] = found
    return tuple(_numbered(names))


def shortest_names(paths: Sequence[PurePath], *, taken: Sequence[str] = ()) -> list[str]:
    """Names of files, with as few folders before them as tell them apart.

    Args:
        paths: Absolute paths; equal ones get one name.
        taken: Names that none of them may get.

    Returns:
        A name for each path, folders parted by `/`.
    """
    spelled = {path: list(_spellings(path)) for path in dict.fromkeys(paths)}

    def shortest(path: PurePath) -> str:
        own = spelled[path]
        others = [names for other, names in spelled.items() if other != path]
        for level, name in enumerate(own):
            alike = any(name == names[level] for names in others if level < len(names))
            if not alike and name not in taken:
                return name
        return own[-1]

    return [shortest(path) for path in paths]


def _path_of(spec: LoraSpec) -> Path | None:
    """The file that gives a LoRA its name; None where something else does."""
    if spec.name is not None or isinstance(spec.source, Mapping):
        return None
    return Path(os.path.abspath(spec.source))


def _spellings(path: PurePath) -> Iterator[str]:
    """A path's names, from the stem to all of it."""
    *folders, name = path.parts
    for count in range(len(folders) + 1):
        head = [folder.rstrip("\\/") for folder in folders[len(folders) - count :]]
        for tail in (path.stem, name):
            # A file name need not be text; a report is.
            yield "/".join((*head, tail)).encode("utf-8", "backslashreplace").decode()


def _numbered(names: Sequence[str]) -> Iterator[str]:
    """The names, those that are alike with a number behind them."""
    counts, used = Counter(names), set(names)
    for name in names:
        if counts[name] == 1:
            yield name
            continue
        number = 1
        while f"{name} ({number})" in used:
            number += 1
        used.add(f"{name} ({number})")
        yield f"{name} ({number})"
