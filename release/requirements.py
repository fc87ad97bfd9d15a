"""Writes the `requirements.txt` of a pack whose wheels are on no index.

    python release/requirements.py [ADDRESS] > FILE

Each line is the address of one wheel below ADDRESS, by default the release of this version, with a
marker of the systems that it is for. On every system one line applies. Where there is no wheel,
that is the package's name, for which pip asks the index.

ComfyUI-Manager hands each line to pip on its own, and cuts it at `#`. So there are no options, and
no hashes of the wheels: their markers would be cut off with them. The release has SHA256SUMS. Linux
is glibc's here: no marker tells musl's, for which PyTorch has no wheels either.
"""

from __future__ import annotations

import argparse

from pack import project
from targets import TARGETS

_HEAD = """\
# What ComfyUI's Python needs for the nodes: the wheel of this release for its system.
# PyTorch, NumPy and safetensors are the host's: nothing here brings or changes them.
"""


def requirements(version: str, address: str) -> str:
    """The text of a `requirements.txt` whose wheels lie below an address."""
    address = address.rstrip("/")
    marked = [(own.wheel(version), own.marker) for own in TARGETS if own.marker is not None]
    lines = [f"qwenlora @ {address}/{wheel} ; {marker}" for wheel, marker in marked]
    others = " and ".join(f"({_negated(marker)})" for _, marker in marked)
    return "\n".join([_HEAD.rstrip(), *lines, f"qwenlora>={version} ; {others}", ""])


def _negated(marker: str) -> str:
    # Markers have no `not`. Those of the targets are equalities that all must hold.
    return marker.replace("==", "!=").replace(" and ", " or ")


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description="Writes requirements by addresses.")
    parser.add_argument("address", metavar="ADDRESS", nargs="?", help="below which the wheels lie")
    address = parser.parse_args().address
    own = project()
    version = own["version"]
    release = f"{own['urls']['Repository']}/releases/download/v{version}"
    print(requirements(version, address or release), end="")


if __name__ == "__main__":
    main()
