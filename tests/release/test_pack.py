"""What the node pack holds, and what it says of itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import toml

from .registry_tool import pack_for_registry

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
import pack  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FILES = pack.pack_files()
PROJECT = pack.project()
HOME = PROJECT["urls"]["Repository"]
RAW = HOME.replace("https://github.com", "https://raw.githubusercontent.com")
KINDS = {".py", ".js", ".css", ".md", ".json", ".jpg", ".toml", ".txt", ""}
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """What the registry is told, and the names that its zip holds."""
    path = tmp_path_factory.mktemp("registry") / "node.zip"
    told = pack_for_registry(ROOT, path)
    with zipfile.ZipFile(path) as file:
        return told, file.namelist()


def test_it_holds_what_the_nodes_need_and_nothing_else() -> None:
    tops = {name.partition("/")[0] for name in FILES}
    folders = {"comfy", "example_workflows", "locales", "subgraphs"}
    assert tops == folders | {"LICENSE", "__init__.py", "pyproject.toml", "requirements.txt"}
    for folder in folders:
        tracked = subprocess.run(
            ["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert set(tracked.stdout.split("\0")) - {""} <= set(FILES)
    assert {Path(name).suffix for name in FILES} <= KINDS
    # ComfyUI-Manager writes them down, and reads them, in the system's encoding.
    assert all(name.isascii() for name in FILES)


def test_it_is_what_the_registry_packs(registry) -> None:
    _, names = registry
    assert sorted(names) == FILES


def test_the_registry_understands_the_project(registry) -> None:
    told, _ = registry
    project, own = told["project"], told["tool_comfy"]
    assert (project["name"], project["version"]) == ("qwenlora", PROJECT["version"])
    assert project["description"] == PROJECT["description"]
    assert project["license"] == {"file": "", "text": "Apache-2.0"}
    assert project["urls"]["repository"] == HOME
    assert project["supported_os"] == ["Microsoft :: Windows", "POSIX :: Linux"]
    assert project["supported_accelerators"] == ["GPU :: NVIDIA CUDA"]
    assert project["supported_comfyui_version"] == ">=0.3.75"
    assert (own["publisher_id"], own["includes"], own["web"]) == ("qwenlora", [], "")
    for address in (own["icon"], own["banner_url"]):
        assert (ROOT / address.removeprefix(f"{RAW}/main/")).is_file()


def test_the_manager_understands_the_project() -> None:
    """It reads pyproject.toml by an old parser, and needs the version there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert toml.loads(text) == tomllib.loads(text)
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])


def test_every_version_is_the_engines() -> None:
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    version = cargo["workspace"]["package"]["version"]
    assert PROJECT["version"] == version
    lines = (ROOT / pack.REQUIREMENTS).read_text(encoding="ascii").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [f"qwenlora>={version}"]


def test_it_is_written_the_same_every_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "first.zip", tmp_path / "second.zip"
    pack.write_pack(first)
    pack.write_pack(second)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as file:
        assert file.namelist() == [f"ComfyUI-qwenlora/{name}" for name in FILES]
        for name in FILES:
            assert file.read(f"ComfyUI-qwenlora/{name}") == (ROOT / name).read_bytes()


def test_it_takes_other_requirements(tmp_path: Path) -> None:
    path = tmp_path / "pack.zip"
    pack.write_pack(path, "other\n")
    with zipfile.ZipFile(path) as file:
        assert file.read("ComfyUI-qwenlora/requirements.txt") == b"other\n"


def leads_somewhere(document: str, link: str) -> bool:
    """Whether a link is to a file of the pack, to one of ours at home, or to somebody else's."""
    address = link.partition("#")[0]
    for place in (f"{HOME}/blob/main/", f"{RAW}/main/"):
        if address.startswith(place):
            return (ROOT / address.removeprefix(place)).is_file()
    if "://" in address:
        return HOME not in address or address == f"{HOME}/releases"
    path = os.path.normpath(Path(document).parent / address)
    return Path(path).as_posix() in FILES


def test_no_link_of_its_documents_leads_nowhere() -> None:
    """What is not in the pack is linked at the project's home, where it is."""
    links = [
        (name, link)
        for name in FILES
        if name.endswith(".md")
        for link in LINK.findall((ROOT / name).read_text(encoding="utf-8"))
    ]
    assert len(links) > 5
    assert [own for own in links if not leads_somewhere(*own)] == []


def test_the_program_that_packs_here_is_the_one_that_publishes() -> None:
    installed = re.findall(r"comfy-cli==[\d.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert installed == (ROOT / "release" / "comfy-cli.in").read_text(encoding="utf-8").split()
    lock = (ROOT / "release" / "comfy-cli.txt").read_text(encoding="utf-8")
    assert f"\n{installed[0]} \\\n" in lock


def test_every_address_of_the_project_begins_alike() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert all(address.startswith(HOME) for address in PROJECT["urls"].values())
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert f"github.repository == '{HOME.removeprefix('https://github.com/')}'" in workflow
    assert all(tables["tool"]["comfy"][name].startswith(f"{RAW}/") for name in ("Icon", "Banner"))


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "release" / "pack.py", "--into", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    path = tmp_path / f"ComfyUI-qwenlora-{PROJECT['version']}.zip"
    assert done.stdout == f"{path}\n"
    assert zipfile.is_zipfile(path)


def test_what_cannot_be_packed_is_told_in_one_line(tmp_path) -> None:
    missing = tmp_path / "requirements.txt"
    command = [sys.executable, ROOT / "release" / "pack.py", "--into", tmp_path / "into"]
    done = subprocess.run(
        [*command, "--requirements", missing], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert re.match(rf"pack: .*{re.escape(str(missing))}", done.stderr)
    assert not (tmp_path / "into").exists()
