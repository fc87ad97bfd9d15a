"""What a wheel and an sdist must hold: each thing that can be wrong is refused by name."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

import archive
from refusal import Refused
from targets import TARGETS, by_triple

LINUX = by_triple("x86_64-unknown-linux-gnu")
WINDOWS = by_triple("aarch64-pc-windows-msvc")
VERSION = "1.2.3"
INFO = f"qwenlora-{VERSION}.dist-info"
SBOM = f"{INFO}/sboms/qwenlora-py.cyclonedx.json"
TRACKED = (
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "LICENSE-OF-CRATES.txt",
    "README.md",
    "pyproject.toml",
    "python/qwenlora/__init__.py",
    "python/qwenlora/_core.pyi",
    "python/qwenlora/py.typed",
    "rust/core/Cargo.toml",
    "rust/core/benches/plan.rs",
    "rust/core/src/lib.rs",
    "rust/core/tests/corpus.rs",
    "tests/data/large.json",
)
DOCUMENT = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.5",
    "serialNumber": "urn:uuid:0",
    "components": [{"bom-ref": "path+file:///rust/core#qwenlora-core@1.2.3"}],
}
METADATA = f"""\
Metadata-Version: 2.4
Name: qwenlora
Version: {VERSION}
Requires-Dist: torch>=2.5 ; extra == 'torch'
Requires-Python: >=3.10

The text of the README.
"""
PROGRAMS = """\
[console_scripts]
qwenlora=qwenlora.cli:main
qwenlora-keys=qwenlora.cli:keys_main
"""


def wheel_members(target=LINUX):
    library = "_core.pyd" if "windows" in target.triple else "_core.abi3.so"
    return {
        "qwenlora/__init__.py": b"'''Found in /home/somebody.'''",
        "qwenlora/_core.pyi": b"",
        "qwenlora/py.typed": b"",
        f"qwenlora/{library}": b"\x7fELF /rustc/0123/library/core/src/fmt.rs cargo/registry/src/x",
        f"{INFO}/METADATA": METADATA.encode(),
        f"{INFO}/WHEEL": f"Wheel-Version: 1.0\nTag: cp310-abi3-{target.tag}\n".encode(),
        f"{INFO}/entry_points.txt": PROGRAMS.encode(),
        f"{INFO}/licenses/LICENSE": b"Apache",
        f"{INFO}/licenses/LICENSE-OF-CRATES.txt": b"MIT",
        SBOM: json.dumps(DOCUMENT).encode(),
    }


def write_wheel(folder, changes=None, *, target=LINUX, name=None):
    members = {**wheel_members(target), **(changes or {})}
    rows = [archive.record_row(name, data) for name, data in members.items() if data is not None]
    members.setdefault(f"{INFO}/RECORD", "\n".join([*rows, f"{INFO}/RECORD,,", ""]).encode())
    path = folder / (name or target.wheel(VERSION))
    with zipfile.ZipFile(path, "w") as wheel:
        for member, data in members.items():
            if data is not None:
                wheel.writestr(member, data)
    return path


def check_wheel(path, *, target=LINUX, folders=()):
    return archive.check_wheel(
        path, target=target, version=VERSION, tracked=TRACKED, folders=folders
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.tag)
def test_a_good_wheel_of_each_system_passes(tmp_path, target):
    assert check_wheel(write_wheel(tmp_path, target=target), target=target) == 11


@pytest.mark.parametrize(
    "missing",
    [
        "qwenlora/py.typed",
        "qwenlora/_core.pyi",
        "qwenlora/_core.abi3.so",
        f"{INFO}/entry_points.txt",
        f"{INFO}/licenses/LICENSE",
        f"{INFO}/licenses/LICENSE-OF-CRATES.txt",
        SBOM,
    ],
)
def test_a_wheel_that_lacks_a_file(tmp_path, missing):
    with pytest.raises(Refused, match=rf"\.whl` lacks `{missing}`"):
        check_wheel(write_wheel(tmp_path, {missing: None}))


@pytest.mark.parametrize("stranger", ["qwenlora/notes.py", "tests/test_a.py", "qwenlora.libs/a.so"])
def test_a_wheel_that_holds_more(tmp_path, stranger):
    with pytest.raises(Refused, match=rf"holds `{stranger}`, which no user needs"):
        check_wheel(write_wheel(tmp_path, {stranger: b""}))


def test_a_wheel_with_the_line_ends_of_windows(tmp_path):
    path = write_wheel(tmp_path, {"qwenlora/__init__.py": b"import os\r\n"})
    with pytest.raises(Refused, match=r"`qwenlora/__init__\.py` with Windows' line ends"):
        check_wheel(path)


def test_a_wheel_whose_name_has_another_tag(tmp_path):
    path = write_wheel(tmp_path, name=f"qwenlora-{VERSION}-cp310-abi3-linux_x86_64.whl")
    with pytest.raises(Refused, match=r"linux_x86_64\.whl` must be called `.*manylinux_2_28"):
        check_wheel(path)


def test_a_wheel_that_is_tagged_otherwise_inside(tmp_path):
    path = write_wheel(tmp_path, {f"{INFO}/WHEEL": b"Tag: cp311-cp311-linux_x86_64\n"})
    with pytest.raises(Refused, match=r"tagged \['cp311-cp311-linux_x86_64'\] inside"):
        check_wheel(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Version: 1.2.3", "Version: 1.2.4", "says Version: `1.2.4`, not `1.2.3`"),
        (">=3.10", ">=3.11", "says Requires-Python: `>=3.11`"),
        (" ; extra == 'torch'", "", r"requires `torch>=2\.5`: .* belongs into an extra"),
    ],
)
def test_a_wheel_with_other_metadata(tmp_path, old, new, said):
    path = write_wheel(tmp_path, {f"{INFO}/METADATA": METADATA.replace(old, new).encode()})
    with pytest.raises(Refused, match=said):
        check_wheel(path)


@pytest.mark.parametrize("text", ["", PROGRAMS.replace("keys_main", "main")])
def test_a_wheel_with_other_programs(tmp_path, text):
    with pytest.raises(Refused, match="installs the programs"):
        check_wheel(write_wheel(tmp_path, {f"{INFO}/entry_points.txt": text.encode()}))


LIBRARY = "qwenlora/_core.abi3.so"


@pytest.mark.parametrize(
    ("held", "named"),
    [
        ("/home/anna/.cargo/registry", "/home/anna"),
        ("/root/.cargo/registry", "/root/.cargo"),
        ("/Users/runner/work", "/Users/runner"),
        (r"C:\Users\anna\.cargo", r"C:\Users\anna"),
        ("/data/clone/rust/py", "/data/clone"),
    ],
)
def test_a_library_with_a_path_of_the_machine(tmp_path, held, named):
    path = write_wheel(tmp_path, {LIBRARY: b"before " + held.encode() + b" behind"})
    with pytest.raises(Refused) as refused:
        check_wheel(path, folders=[Path("/data/clone")])
    assert str(refused.value).endswith(f"a path of this machine in `{LIBRARY}`: `{named}`")


@pytest.mark.parametrize("held", ["/home/anna/clone/rust/py", "/data/clone/rust", r"C:\Users\anna"])
def test_an_sbom_with_a_path_of_the_machine(tmp_path, held):
    document = {**DOCUMENT, "components": [{"bom-ref": f"path+file://{held}#qwenlora"}]}
    path = write_wheel(tmp_path, {SBOM: json.dumps(document).encode()})
    with pytest.raises(Refused, match=rf"a path of this machine in `{SBOM}`"):
        check_wheel(path, folders=[Path("/data/clone")])


@pytest.mark.parametrize("field", ["bomFormat", "specVersion", "serialNumber"])
def test_an_sbom_that_could_not_be_attested(tmp_path, field):
    path = write_wheel(tmp_path, {SBOM: json.dumps({**DOCUMENT, field: ""}).encode()})
    with pytest.raises(Refused, match=rf"{SBOM}` of `.*\.whl` has no `{field}`"):
        check_wheel(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("no JSON", "cannot be read"),
        (json.dumps({**DOCUMENT, "components": []}), "lists no crate"),
    ],
)
def test_an_sbom_that_says_nothing(tmp_path, data, said):
    with pytest.raises(Refused, match=said):
        check_wheel(write_wheel(tmp_path, {SBOM: data.encode()}))


def test_a_windows_path_with_either_slash(tmp_path):
    library = "qwenlora/_core.pyd"
    path = write_wheel(tmp_path, {library: rb"D:\a\clone\rust"}, target=WINDOWS)
    with pytest.raises(Refused, match=r"a path of this machine in `qwenlora/_core\.pyd`"):
        check_wheel(path, target=WINDOWS, folders=[r"D:\a\clone"])


def test_a_file_that_is_no_wheel(tmp_path):
    path = tmp_path / LINUX.wheel(VERSION)
    path.write_bytes(b"no zip")
    with pytest.raises(Refused, match=r"\.whl` cannot be read as a wheel"):
        check_wheel(path)


def test_a_wheel_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LARGEST_WHEEL", 100)
    with pytest.raises(Refused, match=r"\.whl` has \d+ bytes, more than 100"):
        check_wheel(write_wheel(tmp_path))


def test_a_member_replaced_keeps_the_record_true(tmp_path):
    path = write_wheel(tmp_path)
    replaced = json.dumps({**DOCUMENT, "version": 2}).encode()
    archive.replace_in_wheel(path, {SBOM: replaced})
    with zipfile.ZipFile(path) as wheel:
        rows = list(csv.reader(io.StringIO(wheel.read(f"{INFO}/RECORD").decode())))
        assert {row[0] for row in rows} == set(wheel.namelist())
        assert wheel.read(SBOM) == replaced
        for name, digest, size in rows[:-1]:
            data = wheel.read(name)
            hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={hashed}", str(len(data)))
    assert check_wheel(path) == 11


def write_sdist(folder, *, without=(), more=(), root=f"qwenlora-{VERSION}/"):
    names = [*TRACKED[:-2], "PKG-INFO", *more]
    path = folder / f"qwenlora-{VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as sdist:
        for name in names:
            if name not in without:
                sdist.addfile(tarfile.TarInfo(root + name))
    return path


def check_sdist(path):
    return archive.check_sdist(path, version=VERSION, tracked=TRACKED)


def test_a_good_sdist_passes(tmp_path):
    assert check_sdist(write_sdist(tmp_path)) == 13


@pytest.mark.parametrize(
    "missing",
    [
        "Cargo.lock",
        "LICENSE",
        "LICENSE-OF-CRATES.txt",
        "PKG-INFO",
        "rust/core/src/lib.rs",
        "python/qwenlora/py.typed",
    ],
)
def test_an_sdist_that_lacks_a_file(tmp_path, missing):
    with pytest.raises(Refused, match=rf"`qwenlora-1\.2\.3\.tar\.gz` lacks `{missing}`"):
        check_sdist(write_sdist(tmp_path, without=[missing]))


@pytest.mark.parametrize("stranger", ["rust/core/tests/corpus.rs", "tests/data/large.json"])
def test_an_sdist_that_holds_what_no_build_needs(tmp_path, stranger):
    with pytest.raises(Refused, match=rf"holds `{stranger}`, which no build needs"):
        check_sdist(write_sdist(tmp_path, more=[stranger]))


def test_an_sdist_that_holds_a_file_of_the_builder(tmp_path):
    with pytest.raises(Refused, match=r"holds `python/qwenlora/mine\.py`, which git does not have"):
        check_sdist(write_sdist(tmp_path, more=["python/qwenlora/mine.py"]))


def test_an_sdist_with_another_folder_inside(tmp_path):
    with pytest.raises(Refused, match=r"holds `other/Cargo\.lock`, which is no file in"):
        check_sdist(write_sdist(tmp_path, root="other/"))


def test_a_file_that_is_no_sdist(tmp_path):
    path = tmp_path / f"qwenlora-{VERSION}.tar.gz"
    path.write_bytes(b"no archive")
    with pytest.raises(Refused, match="cannot be read as an sdist"):
        check_sdist(path)
