"""Names of files that are like one that is missing."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["nearest", "same_name"]

_MOST = 3
_ALIKE = 0.75
"""Least share of letters in common, of names that differ in more than folder, case and ending."""

_ENDING = re.compile(r"\.(safetensors|sft|ckpt|pt2?|pth|bin|pkl)$")
_BETWEEN_WORDS = re.compile(r"[\s._-]+")


def same_name(one: str, other: str) -> bool:
    """Tell if two spellings name one file: both systems' separators count."""
    return one.replace("\\", "/") == other.replace("\\", "/")


def nearest(asked: str, names: Iterable[str]) -> list[str]:
    """The names that a person may have meant, nearest first; at most three.

    The same file in another folder or in other case comes first, then with another ending or none,
    then names that are spelled alike.
    """
    found = {name: distance for name in names if (distance := _distance(asked, name)) is not None}
    return sorted(found, key=found.__getitem__)[:_MOST]


def _distance(asked: str, name: str) -> tuple[int, float, str] | None:
    """Measure how unlike two names are; None where they are too unlike.

    The first member says what differs, the others order names that differ in the same way.
    """
    (folder, file), (its_folder, its_file) = _split(asked), _split(name)
    apart = 1 - difflib.SequenceMatcher(None, folder, its_folder, autojunk=False).ratio()
    if file == its_file:
        return 0, apart, name
    stem, its_stem = _stem(file), _stem(its_file)
    if stem == its_stem:
        return 1, apart, name
    matcher = difflib.SequenceMatcher(None, stem, its_stem, autojunk=False)
    if matcher.real_quick_ratio() < _ALIKE or matcher.quick_ratio() < _ALIKE:
        return None
    ratio = matcher.ratio()
    return (2, 1 - ratio, name) if ratio >= _ALIKE else None


def _split(name: str) -> tuple[str, str]:
    folder, _, file = name.replace("\\", "/").casefold().rpartition("/")
    return folder, file


def _stem(file: str) -> str:
    return _BETWEEN_WORDS.sub(" ", _ENDING.sub("", file))
