"""Builds and checks what a release publishes: `make dist`.

    python release/dist.py all                      # this system's wheels and the sdist, tried
    python release/dist.py wheel TRIPLE [--again]   # one wheel, of a system in release/targets.py
    python release/dist.py sdist
    python release/dist.py try WHEEL [--python 3.10 …] [--torch oldest|newest]
    python release/dist.py sums                     # SHA256SUMS

Files come into `dist`. Each check is one line: `ok`, or `not run` with the reason. `all` goes on
without a Python that is not to be had, `try` does not. The first check that fails ends the program
with status 1 and a sentence that names the file.

It needs cargo, git and the group `release` of pyproject.toml. Wheels for Linux are linked by zig,
which has the libc of every release: any system can build them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import builder
from archive import check_sdist, check_wheel
from refusal import Refused, output
from targets import TARGETS, Target, by_triple
from trial import PYTHONS, NoInterpreter, try_wheel
from versions import read_version

if TYPE_CHECKING:
    from collections.abc import Sequence

SUMS = "SHA256SUMS"


class Screen:
    """What the program has done, a line each."""

    def __init__(self) -> None:
        self._passed = 0
        self._not_run: list[str] = []

    def made(self, path: Path, more: str) -> None:
        """A file was made."""
        self._line("made", f"{path.name}, {more}")

    def passed(self, what: str) -> None:
        """A check has passed."""
        self._passed += 1
        self._line("ok", what)

    def not_run(self, what: str, reason: str) -> None:
        """A check could not be run here."""
        self._not_run.append(what)
        self._line("not run", f"{what}: {reason}")

    def close(self) -> None:
        """Say what it came to."""
        missing = f", not run: {', '.join(self._not_run)}" if self._not_run else ""
        print(f"dist: {self._passed} checks passed{missing}")

    def _line(self, mark: str, text: str) -> None:
        print(f"{mark:8} {text}", flush=True)


class Release(NamedTuple):
    """What is built, and where to."""

    out: Path
    version: str
    tracked: frozenset[str]
    screen: Screen


def make_wheel(release: Release, target: Target, *, again: bool = False) -> Path:
    """Build and check a system's wheel."""
    wheel = builder.build_wheel(target.triple, target.tag, release.out)
    release.screen.made(wheel, _size(wheel))
    files = check_wheel(
        wheel,
        target=target,
        version=release.version,
        tracked=release.tracked,
        folders=builder.home_folders(),
    )
    release.screen.passed(f"holds what it must and nothing else: {files} files")
    release.screen.passed("names no folder of this machine, in the library and in the SBOM")
    _check_with_tools(release.screen, wheel, target)
    if again:
        _check_again(release.screen, wheel, target)
    return wheel


def make_sdist(release: Release) -> Path:
    """Build the sdist, and a wheel from it alone."""
    sdist = builder.build_sdist(release.out)
    release.screen.made(sdist, _size(sdist))
    files = check_sdist(sdist, version=release.version, tracked=release.tracked)
    release.screen.passed(f"holds what it must and nothing else: {files} files")
    _tool("twine", "check", "--strict", sdist)
    release.screen.passed("twine check --strict")
    with tempfile.TemporaryDirectory() as name:
        wheel = builder.build_from_sdist(sdist, Path(name))
        ran = try_wheel(wheel, sys.executable, Path(name))
    release.screen.passed(f"builds a wheel by itself, which works: {ran}")
    return sdist


def try_wheels(screen: Screen, wheel: Path, pythons: Sequence[str], torch: str | None) -> None:
    """Install a wheel into fresh environments and try it in each.

    Raises:
        NoInterpreter: this system has not all of these Pythons.
        Refused: the wheel does not work on one.
    """
    for python in pythons:
        with tempfile.TemporaryDirectory() as name:
            ran = try_wheel(wheel, python, Path(name), torch=torch)
        screen.passed(f"installed and works: {ran}")


def try_all(screen: Screen, wheel: Path, torch: str | None) -> None:
    """Try a wheel on each Python that is to be had here."""
    for python in PYTHONS:
        try:
            try_wheels(screen, wheel, [python], torch)
        except NoInterpreter as reason:
            screen.not_run(f"Python {python}", str(reason))


def make_all(release: Release, torch: str | None) -> None:
    """Build what this system can build, and try what it can run."""
    changes = builder.changed_files()
    if changes:
        release.screen.not_run("a clean tree", f"{changes[0].strip()} and more are not committed")
    for target in native():
        if not _has_std(target.triple):
            reason = f"no Rust for it: rustup target add {target.triple}"
            release.screen.not_run(target.tag, reason)
            continue
        wheel = make_wheel(release, target)
        if "musl" not in target.triple:
            try_all(release.screen, wheel, torch)
    make_sdist(release)
    write_sums(release.out, release.screen)


def write_sums(out: Path, screen: Screen) -> None:
    """Write the checksums of all files in the folder."""
    files = sorted(path for path in out.iterdir() if path.is_file() and path.name != SUMS)
    rows = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    path = out / SUMS
    path.write_text("".join(rows), "utf-8", newline="\n")
    screen.made(path, f"{len(files)} files")


def _check_with_tools(screen: Screen, wheel: Path, target: Target) -> None:
    _tool("twine", "check", "--strict", wheel)
    screen.passed("twine check --strict")
    if "-linux-" in target.triple:
        screen.passed(f"auditwheel show: {_audited(wheel, target)}")
    _tool("abi3audit", "--strict", wheel)
    screen.passed("abi3audit --strict: only what every Python from 3.10 on has")


def _audited(wheel: Path, target: Target) -> str:
    if not target.triple.endswith("-musl"):
        return met_tag(wheel.name, target, _tool("auditwheel", "show", wheel))
    with tempfile.TemporaryDirectory() as nothing:
        # Among glibc's files it would take a script of the linker for musl's library.
        told = _tool("auditwheel", "show", "--json", "--ldpaths", nothing, wheel)
    return met_musl_tag(wheel.name, target, told)


def met_musl_tag(wheel: str, target: Target, told: str) -> str:
    """The tag that a wheel for musl meets.

    `auditwheel` knows musl by the library's name in Alpine, and the linker's is `libc.so`. musl's
    loader takes every name that begins with `libc.` for itself.

    Args:
        wheel: The wheel's name.
        target: The system that it is for.
        told: What `auditwheel show --json` says of it.

    Raises:
        Refused: it needs another library, or a symbol of a version.
    """
    facts = json.loads(told[told.index("{") :])
    others = sorted(facts["external_libs"].keys() - {"libc.so"})
    if others or facts["versioned_symbols"] or facts["sym_tag"] != target.tag:
        raise Refused(f"`{wheel}` does not meet its tag, says auditwheel:\n{told.strip()}")
    return f"{target.tag}, needs libc.so alone"


def met_tag(wheel: str, target: Target, told: str) -> str:
    """The oldest Linux that a wheel runs on, which must be the tag's or older.

    Args:
        wheel: The wheel's name.
        target: The system that it is for.
        told: What `auditwheel show` says of it.

    Raises:
        Refused: it needs a newer one, or another.
    """
    libc, machine = target.tag.split("_")[0], target.triple.split("-")[0]
    pattern = rf'following platform tag:\s+"({libc}_(\d+)_(\d+)_{machine})"'
    found, meant = re.search(pattern, told), re.match(r"\w+?_(\d+)_(\d+)", target.tag)
    if not found or not meant or _numbers(found.group(2, 3)) > _numbers(meant.groups()):
        raise Refused(f"`{wheel}` does not meet its tag, says auditwheel:\n{told.strip()}")
    return found[1]


def _numbers(texts: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(text) for text in texts)


def _check_again(screen: Screen, wheel: Path, target: Target) -> None:
    """Build a second time, in a clone in another folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve() / "another folder"
        output(["git", "clone", "--quiet", builder.ROOT, root])
        second = builder.build_wheel(target.triple, target.tag, Path(name) / "out", root=root)
        if second.read_bytes() != wheel.read_bytes():
            raise Refused(f"`{wheel.name}` has other bytes when it is built in another folder")
    screen.passed("has the same bytes when it is built in another folder")


def native() -> list[Target]:
    """The targets that are this system's."""
    system = {"Linux": "-linux-", "Windows": "-windows-", "Darwin": "-darwin"}[platform.system()]
    machine = {"AMD64": "x86_64", "arm64": "aarch64", "ARM64": "aarch64"}
    prefix = machine.get(platform.machine(), platform.machine())
    return [own for own in TARGETS if own.triple.startswith(prefix) and system in own.triple]


def _has_std(triple: str) -> bool:
    """Whether Rust can build for a target."""
    folder = output(["rustc", "--print", "target-libdir", "--target", triple], folder=builder.ROOT)
    return any(Path(folder.strip()).glob("libstd-*"))


def _tool(module: str, *words: str | Path) -> str:
    return output([sys.executable, "-m", module, *words])


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Builds and checks what a release publishes.")
    parser.add_argument("--out", type=Path, default=builder.ROOT / "dist", help="where files come")
    verbs = parser.add_subparsers(dest="verb", required=True)
    whole = verbs.add_parser("all", help="this system's wheels and the sdist, tried")
    wheel = verbs.add_parser("wheel", help="one wheel")
    wheel.add_argument("triple", metavar="TRIPLE", help="the system, as Rust calls it")
    wheel.add_argument("--again", action="store_true", help="build it twice and compare")
    verbs.add_parser("sdist", help="the sdist, and a wheel from it")
    trial = verbs.add_parser("try", help="a wheel in fresh environments")
    trial.add_argument("wheel", type=Path, metavar="WHEEL")
    trial.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION")
    for verb in (whole, trial):
        verb.add_argument("--torch", choices=("oldest", "newest"), help="with PyTorch, too")
    verbs.add_parser("sums", help="the checksums")
    return parser.parse_args()


def _run(arguments: argparse.Namespace, screen: Screen) -> None:
    if arguments.verb == "try":
        return try_wheels(screen, arguments.wheel.resolve(), arguments.python, arguments.torch)
    out = arguments.out.resolve()
    if arguments.verb == "sums":
        return write_sums(out, screen)
    release = Release(out, read_version(), builder.tracked_files(), screen)
    if arguments.verb == "wheel":
        make_wheel(release, by_triple(arguments.triple), again=arguments.again)
    elif arguments.verb == "sdist":
        make_sdist(release)
    else:
        make_all(release, arguments.torch)


def main() -> int:
    """Do what the arguments say."""
    screen = Screen()
    try:
        _run(_arguments(), screen)
    except (Refused, NoInterpreter, ValueError, OSError) as error:
        print(f"dist: {error}", file=sys.stderr)
        return 1
    screen.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
