"""`qwenlora doctor`: what is installed, what cannot work together, and the command that mends it.

Reached through `qwenlora.cli`. `gather` looks, `checks` judges, `screen` and `document` show. It
runs where torch is missing or broken, and asks no network.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora import console
from qwenlora.doctor.checks import judge
from qwenlora.doctor.document import to_json
from qwenlora.doctor.finding import Severity
from qwenlora.doctor.gather import gather_facts
from qwenlora.doctor.hosts import root_of
from qwenlora.doctor.screen import Palette, paint

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Exit", "main"]

HELP = """\
Says what is installed of all that LoRAs on 4-bit (Nunchaku) models need, what
of it cannot work together, and the exact command that mends it.

Usage: qwenlora doctor [OPTIONS]

Looks at the Python that runs it, and at the ComfyUIs in and above the working
folder, around that Python, and in ~/ComfyUI and ~/Documents/ComfyUI, each with
its own Python: `python_embeded` of the portable Windows build, or `.venv` or
`venv` in it or beside it. Run it with ComfyUI's own Python where you can:

  .\\python_embeded\\python.exe -s -m qwenlora doctor

It reads files and metadata, and asks each Python for its torch in a process of
its own. It changes nothing, asks no network, and imports no other package.

Options:
  --comfyui PATH              the ComfyUI at, in or around PATH, and no other;
                              may be given again
  --json                      one JSON object on one line (schema 1)
  --color auto|always|never   colour; auto: on a terminal, without NO_COLOR set
  -h, --help                  this text

What is found, and the exit status:
  ok          0   checked, and as it should be
  note        0   worth knowing; nothing is broken
  PROBLEM     1   something does not work; commands that mend it follow,
                  written for your shell, to be run in their order
             64   the arguments make no sense
             74   the report cannot be written

Example:
  qwenlora doctor --comfyui D:\\ComfyUI_windows_portable
"""


class Exit(IntEnum):
    """Exit statuses of `qwenlora doctor`."""

    FINE = 0
    PROBLEMS = 1
    USAGE = 64
    OUTPUT = 74


class _UsageError(Exception):
    """Arguments that make no sense."""


@dataclass
class _Options:
    comfyui: list[Path] = field(default_factory=list)
    is_json: bool = False
    is_help: bool = False
    color: str = "auto"


def main(args: Sequence[str] | None = None) -> int:
    """Run the doctor.

    Args:
        args: The arguments after `qwenlora doctor`.

    Returns:
        The exit status, an `Exit`.
    """
    try:
        options = _parse(list(args or ()))
    except _UsageError as error:
        _talk(f"{error}\nhint: `qwenlora doctor --help` shows how to call it")
        return Exit.USAGE
    if options.is_help:
        return _write(HELP, Exit.FINE)
    facts = gather_facts(options.comfyui, _talk if sys.stderr.isatty() else lambda _: None)
    findings = judge(facts)
    is_bad = any(finding.severity is Severity.PROBLEM for finding in findings)
    if options.is_json:
        text = to_json(facts, findings) + "\n"
    else:
        text = paint(facts, findings, _palette(options.color))
    return _write(text, Exit.PROBLEMS if is_bad else Exit.FINE)


def _parse(args: list[str]) -> _Options:
    options = _Options()
    while args:
        name, has_value, value = args.pop(0).partition("=")
        if name in ("-h", "--help"):
            options.is_help = True
        elif name == "--json" and not has_value:
            options.is_json = True
        elif name in ("--comfyui", "--color"):
            if not has_value and not args:
                raise _UsageError(f"`{name}` needs a value")
            _set(options, name, value if has_value else args.pop(0))
        else:
            raise _UsageError(f"unknown argument: `{name}`")
    return options


def _set(options: _Options, name: str, value: str) -> None:
    if name == "--comfyui":
        root = root_of(Path(value))
        if root is None:
            raise _UsageError(f"no ComfyUI is at, in or around this path: `{value}`")
        if root not in options.comfyui:
            options.comfyui.append(root)
    elif value in ("auto", "always", "never"):
        options.color = value
    else:
        raise _UsageError(f"`--color` is none of auto, always and never: `{value}`")


def _palette(color: str) -> Palette:
    # https://no-color.org: any value but the empty one counts.
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    # An old Windows console prints escape sequences instead of obeying them.
    auto = sys.stdout.isatty() and not plain and (os.name != "nt" or "WT_SESSION" in os.environ)
    return Palette.ANSI if color == "always" or (color == "auto" and auto) else Palette.PLAIN


def _write(text: str, status: Exit) -> Exit:
    try:
        console.write(text)
    except OSError as error:
        _talk(f"the report cannot be written: {error.strerror or error}")
        return Exit.OUTPUT
    return status


def _talk(text: str) -> None:
    sys.stderr.write(f"qwenlora doctor: {text}\n")
