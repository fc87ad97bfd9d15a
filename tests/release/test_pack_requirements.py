"""The stopgap requirements: wheels by their addresses, one for each system."""

from __future__ import annotations

import itertools
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

pytest.importorskip("tomllib", reason="needs Python 3.11")
import requirements
import targets

ROOT = Path(__file__).resolve().parents[2]
TEXT = requirements.requirements("0.1.0", "https://example.org/v0.1.0")
LINES = [line for line in TEXT.splitlines() if not line.startswith("#")]
HERE = (sys.platform, platform.machine())
SYSTEMS = ("linux", "win32", "darwin", "freebsd14", "cygwin")
MACHINES = ("x86_64", "aarch64", "AMD64", "ARM64", "arm64", "i686", "x86", "armv7l", "riscv64", "")
WHEELS = {
    ("linux", "x86_64"): "manylinux_2_28_x86_64",
    ("linux", "aarch64"): "manylinux_2_28_aarch64",
    ("win32", "AMD64"): "win_amd64",
    ("win32", "ARM64"): "win_arm64",
    ("darwin", "x86_64"): "macosx_10_12_x86_64",
    ("darwin", "arm64"): "macosx_11_0_arm64",
}


def lines_of(system: str, machine: str, lines: list[str]) -> list[Requirement]:
    """The lines that apply on a system."""
    environment = {"sys_platform": system, "platform_machine": machine}
    parsed = [Requirement(line) for line in lines]
    return [own for own in parsed if own.marker is None or own.marker.evaluate(environment)]


@pytest.mark.parametrize(("system", "machine"), [*itertools.product(SYSTEMS, MACHINES)])
def test_one_line_applies_on_every_system(system: str, machine: str) -> None:
    (line,) = lines_of(system, machine, LINES)
    tag = WHEELS.get((system, machine))
    if tag is None:
        assert (line.url, str(line.specifier)) == (None, ">=0.1.0")
    else:
        assert line.url == f"https://example.org/v0.1.0/qwenlora-0.1.0-cp310-abi3-{tag}.whl"


def test_every_wheel_that_a_marker_tells_has_a_line() -> None:
    named = [Requirement(line).url for line in LINES[:-1]]
    wheels = [own.wheel("0.1.0") for own in targets.TARGETS if own.marker is not None]
    assert [url.rpartition("/")[2] for url in named if url] == wheels
    for wheel in wheels:
        name, version, _, _ = parse_wheel_filename(wheel)
        assert (name, str(version)) == ("qwenlora", "0.1.0")


def test_lines_stay_whole_in_the_manager() -> None:
    """ComfyUI-Manager cuts lines at `#`, and hands each to pip as one argument."""
    assert not any("#" in line or line.startswith("-") or " --" in line for line in LINES)
    assert TEXT.isascii()


def test_an_address_may_end_with_a_slash() -> None:
    assert requirements.requirements("0.1.0", "https://example.org/v0.1.0/") == TEXT


def test_the_command_takes_no_option_for_an_address() -> None:
    command = [sys.executable, ROOT / "release" / "requirements.py", "--into"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_the_command_names_the_release_of_this_version() -> None:
    command = [sys.executable, ROOT / "release" / "requirements.py"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    project = requirements.project()
    folder = f"{project['urls']['Repository']}/releases/download/v{project['version']}"
    assert written == requirements.requirements(project["version"], folder)


@pytest.mark.slow
@pytest.mark.skipif(HERE not in WHEELS, reason="a release has no wheel for this system")
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_an_installer_takes_the_line_of_this_system(
    wheel: Path, new_environment, tmp_path: Path, installer: str
) -> None:
    version = wheel.name.split("-")[1]
    (target,) = [own for own in targets.TARGETS if own.tag == WHEELS[HERE]]
    folder = tmp_path / "wheels of a release"
    folder.mkdir()
    shutil.copy(wheel, folder / target.wheel(version))
    file = tmp_path / "requirements.txt"
    file.write_text(requirements.requirements(version, folder.as_uri()), encoding="ascii")
    environment = new_environment("fresh")
    getattr(environment, installer)("install", "--no-deps", "-r", file)
    assert ("qwenlora", version) in environment.packages()
