"""Values in memory that other threads may still be writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pending"]


T = TypeVar("T")
U = TypeVar("U")


class Pending(Generic[T]):
    """A value that comes out by waiting alone.

    Whoever holds one cannot read memory too early: there is no other way to the value.
    """

    __slots__ = ("_wait",)

    def __init__(self, wait: Callable[[], T]) -> None:
        """`wait` returns when nobody writes to the value's memory any more, each time anew."""
        self._wait = wait

    @classmethod
    def ready(cls, value: T) -> Pending[T]:
        """A value that no thread writes to."""
        return cls(lambda: value)

    def wait(self) -> T:
        """The value, complete; raises what writing it raised."""
        return self._wait()

    def then(self, change: Callable[[T], U]) -> Pending[U]:
        """Apply `change` to the value once it is complete."""
        return Pending(lambda: change(self.wait()))
