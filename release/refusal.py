"""How the programs that make a release say what is wrong."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LAST_LINES = 12
"""How many of a program's last lines say why it failed."""


class Refused(Exception):
    """A file of the release is not as it must be, or cannot be made. The text names it."""


def output(
    command: Sequence[str | Path],
    *,
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    """What a program prints.

    Raises:
        Refused: the program fails; with what it said last.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except OSError as error:
        raise Refused(f"`{command[0]}` cannot be run: {error}") from error
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        words = " ".join(str(word) for word in command)
        said = "\n".join(text.strip().splitlines()[-LAST_LINES:])
        raise Refused(f"`{words}` ends with status {done.returncode} and says:\n{said}")
    return text
