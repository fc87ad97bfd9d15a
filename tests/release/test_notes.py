"""A release's text is its section of the changelog."""

from __future__ import annotations

import pytest

import notes

CHANGELOG = """\
# Changelog

## Unreleased

- Not yet.

## 0.2.0 (2026-12-01)

- One thing,
  in two lines.

### For scripts

- Another.

## 0.1.1

## 0.1.0

- The first.
"""


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.2.0", "- One thing,\n  in two lines.\n\n### For scripts\n\n- Another."),
        ("0.1.0", "- The first."),
        ("Unreleased", "- Not yet."),
    ],
)
def test_the_section_of_a_version(version, text):
    assert notes.section(CHANGELOG, version) == text


@pytest.mark.parametrize("version", ["0.3.0", "0.2", "0.2.0.1", "0x2.0"])
def test_a_version_without_a_section(version):
    with pytest.raises(notes.MissingSectionError, match=r"the newest are `Unreleased`, `0\.2\.0`"):
        notes.section(CHANGELOG, version)


def test_an_empty_section():
    with pytest.raises(notes.EmptySectionError, match=r"`## 0\.1\.1` of CHANGELOG\.md is empty"):
        notes.section(CHANGELOG, "0.1.1")


def test_a_section_that_is_there_twice():
    with pytest.raises(notes.RepeatedSectionError, match=r"has 2 sections `## 0\.1\.0`"):
        notes.section(CHANGELOG + "\n## 0.1.0\n- Again.\n", "0.1.0")


def test_the_program(capsysbinary, monkeypatch, tmp_path):
    path = tmp_path / "CHANGELOG.md"
    path.write_text("## 1.0.0\n\n- A × B.\n", "utf-8")
    monkeypatch.setattr(notes, "CHANGELOG", path)
    assert notes.main(["1.0.0"]) == 0
    assert notes.main(["2.0.0"]) == 1
    out, err = capsysbinary.readouterr()
    assert out.decode() == "- A × B.\n"
    assert err.decode() == "notes: CHANGELOG.md has no section `## 2.0.0`; the newest are `1.0.0`\n"


def test_another_section_where_the_first_is_not_there(capsysbinary, monkeypatch, tmp_path):
    path = tmp_path / "CHANGELOG.md"
    path.write_text(CHANGELOG, "utf-8")
    monkeypatch.setattr(notes, "CHANGELOG", path)
    assert notes.main(["0.1.0", "Unreleased"]) == 0
    assert notes.main(["0.3.0", "Unreleased"]) == 0
    # One that is empty was forgotten: no other takes its place.
    assert notes.main(["0.1.1", "Unreleased"]) == 1
    assert capsysbinary.readouterr().out.decode() == "- The first.\n- Not yet.\n"


def test_this_repository_has_a_section_for_the_next_release():
    assert notes.section(notes.CHANGELOG.read_text("utf-8"), "Unreleased")
