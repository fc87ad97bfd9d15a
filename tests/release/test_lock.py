"""`requirements-dev.lock` has all that `pyproject.toml` asks for, in its ranges, with hashes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENTRY = re.compile(
    r"""^(?P<name>[\w.-]+)==(?P<version>\S+)(?:\ ;\ [^\\\n]+?)?\ \\\n
    (?:\ {4}--hash=sha256:[0-9a-f]{64}.*\n)+""",
    re.VERBOSE | re.MULTILINE,
)


def locked() -> dict[str, list[str]]:
    """The versions of each package: there may be one for each Python."""
    found: dict[str, list[str]] = {}
    for entry in ENTRY.finditer(LOCK):
        found.setdefault(canonicalize_name(entry["name"]), []).append(entry["version"])
    return found


def asked_for() -> dict[str, list[str]]:
    """What the package, its extras and all groups need."""
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    lists = {"dependencies": project.get("dependencies", [])}
    lists |= project["optional-dependencies"] | groups
    return {name: [own for own in needed if isinstance(own, str)] for name, needed in lists.items()}


@pytest.mark.parametrize("kind", asked_for())
def test_all_that_is_asked_for_is_locked(kind: str) -> None:
    known = locked()
    for text in asked_for()[kind]:
        needed = Requirement(text)
        if canonicalize_name(needed.name) == canonicalize_name(PROJECT["project"]["name"]):
            continue
        versions = known.get(canonicalize_name(needed.name), [])
        assert versions, f"`{text}` is not locked: make lock"
        outside = [own for own in versions if not needed.specifier.contains(own, prereleases=True)]
        assert outside == [], f"`{text}` is locked as {outside}: make lock"


def test_every_entry_has_hashes_and_nothing_else_is_there() -> None:
    rest = (line.strip() for line in ENTRY.sub("", LOCK).splitlines())
    assert [line for line in rest if line and not line.startswith("#")] == []


def test_no_host_of_packages_is_named() -> None:
    assert "://" not in LOCK
    assert "--index" not in LOCK
    assert "--find-links" not in LOCK
