"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, word: str, words: str | None = None) -> str:
    """A number with its noun: `1 slot`, `2 slots`.

    Args:
        number: How many.
        word: The noun for one.
        words: The noun for others, where it is not `word` with an s.
    """
    return f"{number} {word}" if number == 1 else f"{number} {words or word + 's'}"
