"""Prints what a release changes: `python release/notes.py VERSION [OTHER]`, from CHANGELOG.md.

The section of a version starts with `## VERSION`, after which a date may stand, and ends where the
next one starts. The section OTHER is printed where that of the version is not there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"
_HEAD = re.compile(r"^## +(?P<name>\S+)(?: .*)?$", re.MULTILINE)


class NotesError(ValueError):
    """The changelog has no text for a version."""


class MissingSectionError(NotesError):
    """No section has the version's name."""


class EmptySectionError(NotesError):
    """The version's section says nothing."""


class RepeatedSectionError(NotesError):
    """Two sections have the version's name."""


def section(changelog: str, version: str) -> str:
    """The text of a version's section, without its heading.

    Raises:
        MissingSectionError: there is none.
        RepeatedSectionError: there are two.
        EmptySectionError: it has no text.
    """
    heads = list(_HEAD.finditer(changelog))
    own = [number for number, head in enumerate(heads) if head["name"] == version]
    if not own:
        names = ", ".join(f"`{head['name']}`" for head in heads[:3]) or "none"
        raise MissingSectionError(
            f"CHANGELOG.md has no section `## {version}`; the newest are {names}"
        )
    if len(own) > 1:
        raise RepeatedSectionError(f"CHANGELOG.md has {len(own)} sections `## {version}`")
    begin = heads[own[0]].end()
    end = heads[own[0] + 1].start() if own[0] + 1 < len(heads) else len(changelog)
    text = changelog[begin:end].strip()
    if not text:
        raise EmptySectionError(f"the section `## {version}` of CHANGELOG.md is empty")
    return text


def _first_section(changelog: str, version: str, other: str | None) -> str:
    try:
        return section(changelog, version)
    except MissingSectionError:
        if other is None:
            raise
        return section(changelog, other)


def main(words: Sequence[str] | None = None) -> int:
    """Print the section."""
    parser = argparse.ArgumentParser(description="Prints what a release changes.")
    parser.add_argument("version", metavar="VERSION", help="such as 0.1.0")
    parser.add_argument(
        "other", metavar="OTHER", nargs="?", help="where there is none of that name"
    )
    arguments = parser.parse_args(words)
    changelog = CHANGELOG.read_text("utf-8")
    try:
        text = _first_section(changelog, arguments.version, arguments.other)
    except NotesError as error:
        print(f"notes: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(f"{text}\n".encode())  # on Windows, too
    return 0


if __name__ == "__main__":
    sys.exit(main())
