"""Output of the subcommands: data on standard output, talk on standard error."""

from __future__ import annotations

import os
import sys

__all__ = ["plain", "size", "write"]


def write(text: str) -> None:
    """Write data to standard output, to its end.

    A pipe that its reader has closed ends quietly.

    Raises:
        OSError: It cannot be written, as on a full disk.
    """
    # A file's name may hold what the console cannot show.
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough; what is still buffered must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def size(count: float) -> str:
    """A number of bytes in words, as `qwenlora-keys` shows it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def plain(text: str) -> str:
    """Text on one line that cannot drive the terminal: it may come from files."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split("\n")))
