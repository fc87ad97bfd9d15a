"""One version is said everywhere, and a tag is its name."""

from __future__ import annotations

import pytest

import notes
import versions

FILES = {
    "Cargo.toml": '[workspace]\nmembers = []\n\n[workspace.package]\nversion = "0.2.0"\n',
    "pyproject.toml": '[project]\nname = "qwenlora"\n# Why.\nversion = "0.2.0"\n\n[tool.other]\n',
    "comfy/qwenlora_nodes/version.py": '"""The version."""\n\n__version__ = "0.2.0"\n',
    "requirements.txt": "# Why.\nqwenlora>=0.2.0\n",
    "CHANGELOG.md": "## 0.2.0\n\n- New.\n",
}


def write(folder, **changed):
    for name, text in {**FILES, **changed}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


def test_this_repository_says_one_version():
    assert versions.read_version()


def test_a_tag_for_which_all_is_ready(tmp_path):
    assert versions.check_tag("v0.2.0", write(tmp_path)) == "0.2.0"


@pytest.mark.parametrize("name", list(versions.PLACES)[1:])
def test_a_place_that_says_another_version(tmp_path, name):
    write(tmp_path, **{name: FILES[name].replace("0.2.0", "0.1.0")})
    with pytest.raises(versions.VersionError, match=rf"{name} says version `0\.1\.0`, but Cargo"):
        versions.read_version(tmp_path)


@pytest.mark.parametrize("name", list(versions.PLACES))
def test_a_place_that_says_no_version(tmp_path, name):
    write(tmp_path, **{name: FILES[name].replace("version", "title").replace(">=", "==")})
    with pytest.raises(versions.VersionError, match=f"{name} says no version"):
        versions.read_version(tmp_path)


def test_the_version_of_another_table_is_not_the_project_s(tmp_path):
    text = '[project]\nname = "qwenlora"\n\n[tool.other]\nversion = "0.2.0"\n'
    write(tmp_path, **{"pyproject.toml": text})
    with pytest.raises(versions.VersionError, match=r"pyproject\.toml says no version"):
        versions.read_version(tmp_path)


def test_a_version_that_cargo_and_python_write_differently(tmp_path):
    places = {name: text.replace("0.2.0", "0.2.0-rc.1") for name, text in FILES.items()}
    with pytest.raises(versions.VersionError, match="three numbers are wanted"):
        versions.read_version(write(tmp_path, **places))


@pytest.mark.parametrize("tag", ["v0.2.1", "0.2.0", "v0.2.0-rc.1", ""])
def test_a_tag_of_another_version(tmp_path, tag):
    with pytest.raises(versions.VersionError, match=f"the tag is `{tag}`, but Cargo.toml says"):
        versions.check_tag(tag, write(tmp_path))


def test_a_tag_without_its_section(tmp_path):
    write(tmp_path, **{"CHANGELOG.md": "## Unreleased\n\n- New.\n"})
    with pytest.raises(notes.MissingSectionError, match=r"has no section `## 0\.2\.0`"):
        versions.check_tag("v0.2.0", tmp_path)
