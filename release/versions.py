"""Checks that one version is said everywhere: `python release/versions.py [TAG]`.

With a tag, such as `v0.1.0`, that must be its name, too, and CHANGELOG.md must have its section.
It prints the version. Cargo checks the Cargo.lock files itself.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import notes

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "Cargo.toml"
PLACES = {
    SOURCE: re.compile(r'^\[workspace\.package\]\nversion = "(.*)"$', re.MULTILINE),
    "pyproject.toml": re.compile(r'^\[project\]\n(?:(?!\[).*\n)*?version = "(.*)"$', re.MULTILINE),
    "comfy/qwenlora_nodes/version.py": re.compile(r'^__version__ = "(.*)"$', re.MULTILINE),
    "requirements.txt": re.compile(r"^qwenlora>=(.*)$", re.MULTILINE),
}
"""Where the version stands, the source of it first."""

# Both Cargo and Python read it alike.
_PLAIN = re.compile(r"\d+\.\d+\.\d+")


class VersionError(ValueError):
    """The version is not the same everywhere, or not one that can be released."""


def read_version(root: Path = ROOT) -> str:
    """The version that all places say.

    Raises:
        VersionError: two differ, one has none, or it is no plain version.
    """
    said = {name: _read(root, name) for name in PLACES}
    version = said[SOURCE]
    for name, other in said.items():
        if other != version:
            raise VersionError(f"{name} says version `{other}`, but {SOURCE} `{version}`")
    if not _PLAIN.fullmatch(version):
        raise VersionError(f"{SOURCE} says version `{version}`: three numbers are wanted")
    return version


def check_tag(tag: str, root: Path = ROOT) -> str:
    """The version of a tag, for which everything is ready.

    Raises:
        VersionError: the tag is not that of the version.
        notes.NotesError: the changelog has no text for it.
    """
    version = read_version(root)
    if tag != f"v{version}":
        raise VersionError(f"the tag is `{tag}`, but {SOURCE} says version `{version}`")
    notes.section((root / "CHANGELOG.md").read_text("utf-8"), version)
    return version


def _read(root: Path, name: str) -> str:
    found = PLACES[name].search((root / name).read_text("utf-8"))
    if not found:
        raise VersionError(f"{name} says no version")
    return found[1]


def main() -> int:
    """Check, and print the version."""
    parser = argparse.ArgumentParser(description="Checks that one version is said everywhere.")
    parser.add_argument("tag", nargs="?", metavar="TAG", help="that of the release")
    tag = parser.parse_args().tag
    try:
        print(check_tag(tag) if tag else read_version())
    except (VersionError, notes.NotesError) as error:
        print(f"versions: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
