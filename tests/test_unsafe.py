"""Every `unsafe` of our Rust sources has its row in `docs/unsafe.md`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for top in ("rust", "fuzz") for path in (ROOT / top).rglob("*.rs"))
DOCUMENT = (ROOT / "docs" / "unsafe.md").read_text(encoding="utf-8")
FREE = ["rust/core/src/lib.rs", "rust/cli/src/lib.rs", "rust/cli/src/main.rs", "fuzz/src/lib.rs"]
"""The roots of crates that the compiler keeps free of it."""

NO_CODE = re.compile(
    r"""//[^\n]*                       # a comment
    |/\*.*?\*/
    |b?r(?P<hashes>\#*)".*?"(?P=hashes) # a raw string
    |b?"(?:\\.|[^"\\])*"
    |b?'(?:\\.|[^'\\])'                 # a character, and no lifetime
    """,
    re.VERBOSE | re.DOTALL,
)
OWNER = re.compile(
    r"""^impl\b(?:<[^{]*?>)?\ (?:[^{]*?\ for\ )?(?P<type>\w+)  # whose functions follow, indented
    |^(?P<indent>\ *)(?:[a-z]\S*\ )*fn\ (?P<name>\w+)
    """,
    re.VERBOSE | re.MULTILINE,
)


def code_of(source: str) -> str:
    """A source with its comments, strings and characters left out."""
    return NO_CODE.sub("", source)


def functions_with_unsafe(source: str) -> Counter[str]:
    """How often each function says it, by the function's name with the type it belongs to."""
    code = code_of(source)
    found: Counter[str] = Counter()
    owner, places = "", []
    for match in OWNER.finditer(code):
        if match["type"]:
            owner = match["type"]
            continue
        name = f"{owner}::{match['name']}" if match["indent"] else match["name"]
        places.append((match.start(), name))
    for unsafe in re.finditer(r"\bunsafe\b", code):
        # A function's own `unsafe` stands on its line.
        known = [name for begin, name in places if begin <= unsafe.start()]
        found[known[-1] if known else "no function"] += 1
    return found


def rows() -> dict[tuple[str, str], int]:
    """The table: file, function and count of each row."""
    cells = re.findall(r"^\| `([^`]+\.rs)` \| `([^`]+)` \| (\d+) \|", DOCUMENT, re.MULTILINE)
    found = {(file, function): int(count) for file, function, count in cells}
    assert len(found) == len(cells)
    return found


def test_the_table_has_every_unsafe_and_no_other() -> None:
    counted = {
        (path.relative_to(ROOT).as_posix(), function): count
        for path in SOURCES
        for function, count in functions_with_unsafe(path.read_text(encoding="utf-8")).items()
    }
    assert counted == rows()
    assert counted


@pytest.mark.parametrize("root", FREE)
def test_the_rest_is_free_of_it(root: str) -> None:
    assert "#![forbid(unsafe_code)]" in (ROOT / root).read_text(encoding="utf-8")


def test_named_tests_are_there() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", DOCUMENT)
    assert named
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_what_counts() -> None:
    source = """
    // unsafe in a comment
    #![expect(unsafe_code, reason = "unsafe in a string")]
    impl<'a, T: Fn() -> u8> Tail for Lent<'a, T> {
        /// unsafe in a comment
        unsafe fn begin(&self) -> u8 {
            let quote = '"';
            unsafe { read(1) }
        }
    }
    impl Other {
        fn begin() { let raw = r#"unsafe "one" "#; }
    }
    fn alone() { unsafe { act() } }
    """
    lines = re.sub(r"^    ", "", source, flags=re.MULTILINE)
    assert functions_with_unsafe(lines) == {"Lent::begin": 2, "alone": 1}
