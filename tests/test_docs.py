"""The files that the documents name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "comfy/README.md"]
DOCUMENTS += ["examples/serve/README.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
PLACES = ["", "python/qwenlora", "rust/core/src", "tests"]
PLACES += ["comfy/qwenlora_nodes", "examples/serve", "examples/serve/qwenlora_serve"]
"""Folders that a name may begin in."""
TOP = "python|rust|comfy|tests|docs|benches|examples|fuzz|example_workflows"
NAME = re.compile(rf"[\w./*-]+\.(?:py|pyi|rs|md)|(?:{TOP})/[\w./-]*\w|[a-z_][\w/]*/")
"""A file of ours by its ending, a path from the root, or a folder by its slash."""
ELSEWHERE = {
    "main.py",  # ComfyUI's
    "models/linear.py",  # Nunchaku's
    "fuzz/corpus",  # made by the fuzzer, and not kept
}


def names_of(text: str) -> list[str]:
    """The files and folders that a text names in backticks or in blocks of commands."""
    quoted = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted += re.findall(r"`([^`]+)`", rest)
    words = {word.partition("::")[0] for span in quoted for word in span.split()}
    return sorted(word for word in words if NAME.fullmatch(word))


def is_there(name: str) -> bool:
    """Whether a name leads to a file or a folder; a star stands for a part of one."""
    return name in ELSEWHERE or any(any((ROOT / place).glob(name)) for place in PLACES)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_are_there(document: str) -> None:
    names = names_of((ROOT / document).read_text(encoding="utf-8"))
    assert [name for name in names if not is_there(name)] == []


def test_names_are_found() -> None:
    text = (
        "`slots/packed.py`, [x](other.md), `pytest tests/test_gpu.py::test_one`, `a/b`\n"
        "```sh\npython benches/bench_pack.py --json out.json\n```\n"
        "`fuzz/src`, `delta/`, `no/such.rs`\n"
    )
    names = names_of(text)
    assert names == [
        "benches/bench_pack.py",
        "delta/",
        "fuzz/src",
        "no/such.rs",
        "slots/packed.py",
        "tests/test_gpu.py",
    ]
    assert [name for name in names if not is_there(name)] == ["no/such.rs"]


@pytest.mark.parametrize("source", ["python/qwenlora", "rust/core/src"])
def test_every_stage_is_in_the_architecture(source: str) -> None:
    """A folder that nobody is told of is one that nobody finds."""
    names = names_of((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    sources = (ROOT / source).glob("*/**/*.[pr][ys]")
    folders = {path.relative_to(ROOT / source).parts[0] for path in sources}
    told = {part for name in names for part in Path(name).parts}
    assert sorted(folders - told) == []
