"""The wheels of a release: one list, read by whatever builds, checks or names them.

`python release/targets.py VERSION` prints the names of all files that a release has on PyPI.
"""

import sys
from typing import NamedTuple


class Target(NamedTuple):
    """A system that a release has a wheel for."""

    triple: str
    """What Rust calls it."""
    tag: str
    """What a wheel's name calls it: PEP 600 and PEP 656 on Linux, else the oldest system."""
    marker: str | None
    """What a line of requirements calls it (PEP 508), or None where no marker can tell it."""

    def wheel(self, version: str) -> str:
        """Name of the wheel file: one for every Python from 3.10 on (abi3)."""
        return f"qwenlora-{version}-cp310-abi3-{self.tag}.whl"


TARGETS = (
    Target(
        "x86_64-unknown-linux-gnu",
        "manylinux_2_28_x86_64",
        'sys_platform == "linux" and platform_machine == "x86_64"',
    ),
    Target(
        "aarch64-unknown-linux-gnu",
        "manylinux_2_28_aarch64",
        'sys_platform == "linux" and platform_machine == "aarch64"',
    ),
    # No marker tells musl from glibc: by these, only an index serves Alpine.
    Target("x86_64-unknown-linux-musl", "musllinux_1_2_x86_64", None),
    Target("aarch64-unknown-linux-musl", "musllinux_1_2_aarch64", None),
    Target(
        "x86_64-pc-windows-msvc",
        "win_amd64",
        'sys_platform == "win32" and platform_machine == "AMD64"',
    ),
    Target(
        "aarch64-pc-windows-msvc",
        "win_arm64",
        'sys_platform == "win32" and platform_machine == "ARM64"',
    ),
    Target(
        "aarch64-apple-darwin",
        "macosx_11_0_arm64",
        'sys_platform == "darwin" and platform_machine == "arm64"',
    ),
    Target(
        "x86_64-apple-darwin",
        "macosx_10_12_x86_64",
        'sys_platform == "darwin" and platform_machine == "x86_64"',
    ),
)


def by_triple(triple: str) -> Target:
    """The target of that triple.

    Raises:
        ValueError: no wheel is made for it.
    """
    for target in TARGETS:
        if target.triple == triple:
            return target
    raise ValueError(f"no wheel is made for `{triple}`: release/targets.py lists the systems")


def file_names(version: str) -> list[str]:
    """The names of a version's wheels and of its sdist."""
    return [*(target.wheel(version) for target in TARGETS), f"qwenlora-{version}.tar.gz"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: targets.py VERSION")
    print("\n".join(file_names(sys.argv[1])))
