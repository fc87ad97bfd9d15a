"""Makes the node pack that a release has for ComfyUI: `make pack`.

    python release/pack.py [--requirements FILE] [--into FOLDER]

It writes `ComfyUI-qwenlora-VERSION.zip` into `dist`: one folder, for ComfyUI's `custom_nodes`. Its
files are those that ComfyUI's registry would pack: what git has, but for what `.comfyignore` leaves
out. `--requirements` puts another `requirements.txt` in, as `release/requirements.py` writes it.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path
from typing import Any

import tomllib

from refusal import Refused, output

ROOT = Path(__file__).resolve().parents[1]
NAME = "ComfyUI-qwenlora"
REQUIREMENTS = "requirements.txt"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The time of every file in the pack: the same files make the same bytes."""
_MODE = 0o100644 << 16


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def pack_files() -> list[str]:
    """The files of the pack, from the root, with slashes."""
    left_out = _git_files("--ignored", "--exclude-from=.comfyignore")
    return sorted(_git_files() - left_out)


def write_pack(path: Path, requirements: str | None = None) -> None:
    """Write the pack, with other requirements than the repository's if they are given."""
    # All is read first: what is refused leaves no half of a pack behind.
    contents = {name: (ROOT / name).read_bytes() for name in pack_files()}
    if requirements is not None:
        contents[REQUIREMENTS] = requirements.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as pack:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(f"{NAME}/{name}", _LONG_AGO)
            entry.external_attr = _MODE
            pack.writestr(entry, data, zipfile.ZIP_DEFLATED)


def _git_files(*options: str) -> set[str]:
    listed = output(["git", "ls-files", "-z", "--cached", *options], folder=ROOT)
    return set(listed.rstrip("\0").split("\0"))


def main() -> int:
    """Write the pack."""
    parser = argparse.ArgumentParser(description="Makes the node pack of a release.")
    parser.add_argument("--requirements", type=Path, help="what its requirements.txt says")
    parser.add_argument("--into", type=Path, default=ROOT / "dist", help="the folder it comes into")
    arguments = parser.parse_args()
    path: Path = arguments.into / f"{NAME}-{project()['version']}.zip"
    own = arguments.requirements
    try:
        write_pack(path, None if own is None else own.read_text("utf-8"))
    except (Refused, OSError) as error:
        print(f"pack: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
