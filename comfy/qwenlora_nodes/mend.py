"""Commands that mend, and how each shell wants them written.

This file is there twice, byte for byte: in the nodes, which need it where the package is missing,
and in `qwenlora.doctor`. It needs nothing else, and runs on old Pythons.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Mend", "Move", "Run", "Shell", "spell"]


class Shell(Enum):
    """The shell that the user types commands into."""

    POSIX = "posix"
    CMD = "cmd"
    POWERSHELL = "powershell"

    @classmethod
    def of_user(cls, os_name: str, environ: Mapping[str, str]) -> Shell:
        """The shell, as far as the variables that it leaves to programs tell."""
        if os_name != "nt" or "MSYSTEM" in environ:
            return cls.POSIX
        # Only cmd sets its prompt as a variable.
        return cls.CMD if "PROMPT" in environ else cls.POWERSHELL

    @classmethod
    def current(cls) -> Shell:
        """The shell of this process."""
        return cls.of_user(os.name, os.environ)


@dataclass(frozen=True)
class Run:
    """A program with its arguments."""

    argv: tuple[str, ...]


@dataclass(frozen=True)
class Move:
    """A folder that gets another name."""

    source: Path
    target: Path


Mend = Union[Run, Move]  # noqa: UP007 - no `|` of classes before Python 3.10

_PLAIN_WORD = re.compile(r"[\w./:\\+-]+", re.ASCII)
_MOVES = {Shell.POSIX: "mv", Shell.CMD: "move", Shell.POWERSHELL: "Move-Item"}


def spell(mend: Mend, shell: Shell) -> str:
    """The command as one line for a shell."""
    if isinstance(mend, Move):
        words = (str(mend.source), str(mend.target))
        return " ".join([_MOVES[shell], *(_quote(word, shell) for word in words)])
    line = " ".join(_quote(word, shell) for word in mend.argv)
    # PowerShell takes a quoted program for a string unless it is called.
    return f"& {line}" if shell is Shell.POWERSHELL and line.startswith("'") else line


def _quote(word: str, shell: Shell) -> str:
    if shell is Shell.POSIX:
        return shlex.quote(word)
    if _PLAIN_WORD.fullmatch(word):
        return word
    if shell is Shell.POWERSHELL:
        # A typographic quote ends its strings, too.
        return "'" + re.sub("(['\u2018-\u201b])", r"\1\1", word) + "'"
    return f'"{word}"'
