"""Standard error: errors, notes, and the progress while there is nothing else to see."""

from __future__ import annotations

import shutil
import sys
import time

from qwenlora.console import plain
from qwenlora.words import counted

__all__ = ["Talk"]

_SILENCE_S = 1.0
"""Work that is done by then shows no progress."""
_FRAME_S = 0.1
"""Time between two pictures of the progress."""
_HINT = "\nhint: "


class Talk:
    """Messages and progress on standard error."""

    def __init__(self, doing: str = "merging") -> None:
        """`doing` is what the progress calls the work."""
        self._doing = doing
        self._next = time.monotonic() + _SILENCE_S if sys.stderr.isatty() else None
        self._drawn = 0

    def say(self, kind: str, message: str) -> None:
        """A message: `error: …` or `note: …`, with its hint on a separate line."""
        self.erase()
        sys.stderr.write(f"{kind}: {_HINT.join(map(plain, message.split(_HINT)))}\n")
        sys.stderr.flush()

    def say_usage(self, error: Exception, command: str) -> None:
        """What is wrong with the arguments of a command, and where its help is."""
        text = str(error)
        hint = "" if _HINT in text else f"{_HINT}`{command} --help` shows how to call it"
        self.say("error", text + hint)

    def progress(self, done: int, everything: int) -> None:
        """Show how far the work is: on a terminal, if it has taken long, and not too often."""
        now = time.monotonic()
        if self._next is None or now < self._next:
            return
        self._next = now + _FRAME_S
        self.erase()
        # A terminal that is written to its last column may begin a new line.
        width = shutil.get_terminal_size().columns - 1
        text = f"{self._doing}: {done} of {counted(everything, 'layer')}"[: max(0, width)]
        sys.stderr.write(text)
        sys.stderr.flush()
        self._drawn = len(text)

    def erase(self) -> None:
        """Take the progress away: with spaces, which every console obeys."""
        if self._drawn:
            sys.stderr.write(f"\r{' ' * self._drawn}\r")
            sys.stderr.flush()
            self._drawn = 0
