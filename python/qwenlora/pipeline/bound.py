"""Methods of one object alone."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import TYPE_CHECKING, Any

from qwenlora.errors import ModelStateError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Bound", "bind", "unbind"]


class Bound:
    """A function bound to an object as a method is, but without keeping the object alive.

    A real method in an object's own `__dict__` refers to the object, so that only the collector of
    cycles could free it: a transformer of 11 GB would outlive its last user. A deep copy or a
    pickle of the object gets methods of its own.

    Attributes:
        function: The function.
        replaced: The object's own method of this name that it took the place of, in a tuple; empty
            where there was none.
    """

    def __init__(
        self, function: Callable[..., Any], owner: object | None, replaced: tuple[Any, ...] = ()
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.replaced = replaced
        self._owner = None if owner is None else weakref.ref(owner)

    @property
    def owner(self) -> Any:
        """The object, or None where it is gone."""
        return None if self._owner is None else self._owner()

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(self.function)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the object first.

        Raises:
            ModelStateError: The object is gone.
        """
        owner = self.owner
        if owner is None:
            raise ModelStateError(
                f"`{self.function.__name__}` belongs to an object that is gone"
                "\nhint: call qwenlora.attach for the copy of it that is used now"
            )
        return self.function(owner, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever copies or pickles the owner knows its copy by the time this is asked for.
        return (Bound, (self.function, self.owner, self.replaced))

    def __repr__(self) -> str:
        return f"<bound {self.function.__name__} of {self.owner!r:.80}>"


def bind(owner: object, methods: dict[str, Callable[..., Any]]) -> None:
    """Put methods on an object, past its `__setattr__`; they remember whose place they took."""
    own = vars(owner)
    for name, function in methods.items():
        before = (own[name],) if name in own else ()
        if before and isinstance(before[0], Bound):
            before = before[0].replaced
        own[name] = Bound(function, owner, before)


def unbind(owner: object, methods: dict[str, Callable[..., Any]]) -> None:
    """Take away those that `bind` put there, so that the ones before, or the class's, answer."""
    own = vars(owner)
    for name, function in methods.items():
        found = own.get(name)
        if not isinstance(found, Bound) or found.function is not function:
            continue
        if found.replaced:
            (own[name],) = found.replaced
        else:
            del own[name]
