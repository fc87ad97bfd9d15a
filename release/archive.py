"""What a wheel and an sdist must hold, and what they must not."""

from __future__ import annotations

import base64
import configparser
import email
import hashlib
import json
import re
import tarfile
import zipfile
from typing import TYPE_CHECKING

from refusal import Refused

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from targets import Target

PROGRAMS = {"qwenlora": "qwenlora.cli:main", "qwenlora-keys": "qwenlora.cli:keys_main"}
LARGEST_WHEEL = 8 << 20
LARGEST_SDIST = 2 << 20
"""Past them something is inside that should not be."""

# Where people and build machines keep their files. Rust's own sources are below /rustc.
_HOME = re.compile(rb"(?:/home/|/root/|/Users/|[A-Za-z]:\\+Users\\+)[\w.-]+")

# What maturin packs as licenses: ours, and those of the crates.
_LICENSE = re.compile(r"LICENSE[-\w.]*")

# All that a build reads. `Cargo.toml` names the benchmark, and cargo looks whether it is there.
_BUILT_FROM = re.compile(
    r"(Cargo\.(toml|lock)|LICENSE[-\w.]*|PKG-INFO|README\.md|pyproject\.toml)"
    r"|python/qwenlora/.+"
    r"|rust/\w+/(Cargo\.toml|src/.+)|rust/core/benches/plan\.rs"
)
_NEEDED = ("Cargo.lock", "Cargo.toml", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml")


def check_wheel(
    path: Path,
    *,
    target: Target,
    version: str,
    tracked: Collection[str],
    folders: Iterable[Path | str],
) -> int:
    """Check a wheel; the number of its files.

    Args:
        path: The wheel.
        target: The system that it is for.
        version: The release's.
        tracked: The files that git has, from the root, with slashes.
        folders: Folders of this machine, whose paths must not be inside.

    Raises:
        Refused: it is not as a release needs it.
    """
    _check_name(path, target.wheel(version))
    _check_size(path, LARGEST_WHEEL)
    members = read_wheel(path)
    info = f"qwenlora-{version}.dist-info"
    library = "qwenlora/_core.pyd" if target.tag.startswith("win") else "qwenlora/_core.abi3.so"
    sbom = f"{info}/sboms/qwenlora-py.cyclonedx.json"
    licenses = {"LICENSE", *(name for name in tracked if _LICENSE.fullmatch(name))}
    parts = (
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        *(f"licenses/{n}" for n in licenses),
    )
    sources = {name[len("python/") :] for name in tracked if name.startswith("python/")}
    expected = {library, sbom, *sources, *(f"{info}/{part}" for part in parts)}
    _check_members(path, set(members), expected)
    _check_line_ends(path, {name: members[name] for name in sources})
    _check_tag(path, members[f"{info}/WHEEL"], target.tag)
    _check_metadata(path, members[f"{info}/METADATA"], version)
    _check_programs(path, members[f"{info}/entry_points.txt"])
    _check_sbom(path, sbom, members[sbom])
    for name in (library, sbom):
        check_paths(path, name, members[name], folders)
    return len(members)


def check_sdist(path: Path, *, version: str, tracked: Collection[str]) -> int:
    """Check an sdist; the number of its files.

    Raises:
        Refused: it is not as a release needs it.
    """
    _check_name(path, f"qwenlora-{version}.tar.gz")
    _check_size(path, LARGEST_SDIST)
    names = set(_sdist_members(path, f"qwenlora-{version}/"))
    files = set(tracked)
    needed = {name for name in files if _BUILT_FROM.fullmatch(name)}
    _check_missing(path, names, {*needed, *_NEEDED})
    for name in sorted(names):
        if name != "PKG-INFO" and name not in files:
            raise Refused(f"`{path.name}` holds `{name}`, which git does not have")
        if not _BUILT_FROM.fullmatch(name):
            raise Refused(
                f"`{path.name}` holds `{name}`, which no build needs:"
                " leave it out in `[tool.maturin] exclude` of pyproject.toml"
            )
    return len(names)


def check_paths(path: Path, name: str, data: bytes, folders: Iterable[Path | str]) -> None:
    """Refuse a member of a wheel that holds a path of the machine that built it."""
    forms = {form for own in folders for form in (str(own), str(own).replace("\\", "/"))}
    found = _HOME.search(data)
    held = [found[0].decode()] if found else [form for form in forms if form.encode() in data]
    if held:
        raise Refused(f"`{path.name}` holds a path of this machine in `{name}`: `{held[0]}`")


def read_wheel(path: Path) -> dict[str, bytes]:
    """A wheel's files."""
    try:
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise Refused(f"`{path.name}` cannot be read as a wheel: {error}") from error


def replace_in_wheel(path: Path, changes: Mapping[str, bytes]) -> None:
    """Write a wheel anew with other contents of some files, which RECORD then lists."""
    members = {**read_wheel(path), **changes}
    with zipfile.ZipFile(path) as wheel:
        entries = wheel.infolist()
    record = next(entry.filename for entry in entries if entry.filename.endswith("/RECORD"))
    rows = members[record].decode().splitlines()
    changed = {name: record_row(name, data) for name, data in changes.items()}
    rows = [changed.get(row.rsplit(",", 2)[0], row) for row in rows]
    members[record] = "\n".join([*rows, ""]).encode()
    with zipfile.ZipFile(path, "w") as wheel:
        for entry in entries:
            wheel.writestr(entry, members[entry.filename])


def record_row(name: str, data: bytes) -> str:
    """A file's row in a wheel's RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def _sdist_members(path: Path, folder: str) -> list[str]:
    try:
        with tarfile.open(path, "r:gz") as sdist:
            members = sdist.getmembers()
    except (OSError, tarfile.TarError) as error:
        raise Refused(f"`{path.name}` cannot be read as an sdist: {error}") from error
    for member in members:
        if not member.isfile() or not member.name.startswith(folder):
            raise Refused(f"`{path.name}` holds `{member.name}`, which is no file in `{folder}`")
    return [member.name[len(folder) :] for member in members]


def _check_name(path: Path, name: str) -> None:
    if path.name != name:
        raise Refused(f"`{path.name}` must be called `{name}`")


def _check_size(path: Path, largest: int) -> None:
    size = path.stat().st_size
    if size > largest:
        raise Refused(f"`{path.name}` has {size} bytes, more than {largest}: what is inside?")


def _check_members(path: Path, names: set[str], expected: set[str]) -> None:
    _check_missing(path, names, expected)
    if names - expected:
        raise Refused(f"`{path.name}` holds `{min(names - expected)}`, which no user needs")


def _check_missing(path: Path, names: set[str], expected: set[str]) -> None:
    if expected - names:
        raise Refused(f"`{path.name}` lacks `{min(expected - names)}`")


def _check_line_ends(path: Path, sources: Mapping[str, bytes]) -> None:
    """A checkout on Windows must not make other files of the same commit."""
    for name, data in sources.items():
        if b"\r\n" in data:
            raise Refused(
                f"`{path.name}` holds `{name}` with Windows' line ends, which git has not"
            )


def _check_tag(path: Path, data: bytes, tag: str) -> None:
    tags = email.message_from_bytes(data).get_all("Tag", [])
    if tags != [f"cp310-abi3-{tag}"]:
        raise Refused(f"`{path.name}` is tagged {tags} inside, not `cp310-abi3-{tag}`")


def _check_metadata(path: Path, data: bytes, version: str) -> None:
    metadata = email.message_from_bytes(data)
    for field, value in (("Name", "qwenlora"), ("Version", version), ("Requires-Python", ">=3.10")):
        if metadata[field] != value:
            raise Refused(f"`{path.name}` says {field}: `{metadata[field]}`, not `{value}`")
    for requirement in metadata.get_all("Requires-Dist", []):
        if "extra ==" not in requirement:
            raise Refused(
                f"`{path.name}` requires `{requirement}`: what it runs on is its host's,"
                " and belongs into an extra"
            )


def _check_programs(path: Path, data: bytes) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(data.decode())
    programs = dict(parser["console_scripts"]) if "console_scripts" in parser else {}
    if programs != PROGRAMS:
        raise Refused(f"`{path.name}` installs the programs {programs}, not {PROGRAMS}")


def _check_sbom(path: Path, name: str, data: bytes) -> None:
    try:
        document = json.loads(data)
    except ValueError as error:
        raise Refused(f"`{name}` of `{path.name}` cannot be read: {error}") from error
    # These three are what attestations on GitHub know one by.
    for field in ("bomFormat", "specVersion", "serialNumber"):
        if not document.get(field):
            raise Refused(f"`{name}` of `{path.name}` has no `{field}`")
    if not document.get("components"):
        raise Refused(f"`{name}` of `{path.name}` lists no crate")
