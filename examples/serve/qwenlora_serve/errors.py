"""The one way in which a request is refused."""

from __future__ import annotations

__all__ = ["RequestError"]


class RequestError(Exception):
    """A request that cannot be carried out as it is.

    Attributes:
        status: The HTTP status that says so.
        reason: The same in words, with the way out.
    """

    def __init__(self, status: int, reason: str) -> None:
        """Take both."""
        super().__init__(status, reason)
        self.status = status
        self.reason = reason
