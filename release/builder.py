"""Builds the wheels and the sdist."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from archive import read_wheel, replace_in_wheel
from refusal import output
from sbom import portable

ROOT = Path(__file__).resolve().parents[1]


def tracked_files(root: Path = ROOT) -> frozenset[str]:
    """The files that git has, from the root, with slashes."""
    return frozenset(output(["git", "ls-files", "-z"], folder=root).rstrip("\0").split("\0"))


def changed_files(root: Path = ROOT) -> list[str]:
    """What differs from the last commit, new files included."""
    return output(["git", "status", "--porcelain"], folder=root).splitlines()


def build_wheel(triple: str, tag: str, out: Path, *, root: Path = ROOT) -> Path:
    """Build a system's wheel into a folder, with no path of this machine inside."""
    # zig links against the libc that the tag names, whatever this system has.
    linux = ["--zig", "--compatibility", tag.rsplit("_x86_64")[0].rsplit("_aarch64")[0]]
    options = linux if "-linux-" in triple else []
    command = ["build", "--release", "--locked", "--quiet", "--target", triple, *options]
    wheel = _maturin(command, out, root)
    sboms = {name: data for name, data in read_wheel(wheel).items() if "/sboms/" in name}
    replace_in_wheel(wheel, {name: portable(data, root) for name, data in sboms.items()})
    return wheel


def build_sdist(out: Path, *, root: Path = ROOT) -> Path:
    """Build the sdist into a folder."""
    return _maturin(["sdist"], out, root)


def build_from_sdist(sdist: Path, out: Path) -> Path:
    """Build a wheel into an empty folder as pip does, from what the sdist holds alone."""
    command = [sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", out, sdist]
    environ = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target" / "sdist")}
    output(command, folder=out, environ=environ)
    (wheel,) = out.glob("*.whl")
    return wheel


def home_folders(root: Path = ROOT) -> tuple[Path, ...]:
    """Folders of this machine that a compiler sees."""
    return root, cargo_home()


def cargo_home() -> Path:
    """Where cargo keeps the sources of crates."""
    return Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo")).resolve()


def _maturin(words: list[str], out: Path, root: Path) -> Path:
    """Run maturin, and move what it makes into a folder, over what is there."""
    manifest = root / "rust" / "py" / "Cargo.toml"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as made:
        command = [sys.executable, "-m", "maturin", *words, "--out", made]
        output([*command, "--manifest-path", manifest], folder=root, environ=_environ(root))
        (file,) = Path(made).iterdir()
        return file.replace(out / file.name)


def _environ(root: Path) -> dict[str, str]:
    """What makes two builds of one commit alike, wherever they run."""
    remapped = ((cargo_home(), "cargo"), (root, "."))
    flags = [f"--remap-path-prefix={folder}={name}" for folder, name in remapped]
    return {
        **os.environ,
        "CARGO_ENCODED_RUSTFLAGS": "\x1f".join(flags),
        "CARGO_ZIGBUILD_PYTHON_PATH": sys.executable,
        "SOURCE_DATE_EPOCH": output(["git", "log", "-1", "--format=%ct"], folder=root).strip(),
    }
