"""A LoRA in memory that nobody writes to: its identity is a token."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qwenlora.cache import forget
from qwenlora.source.state_dict import StateDictSource
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

__all__ = ["HeldSource", "HeldTensors"]


class HeldTensors(Mapping[str, "torch.Tensor"]):
    """A state dict whose tensors its holder promises not to write to.

    It is the same LoRA as long as it is the same object, so a stack that is made of it again equals
    the one before, and its deltas are kept between compositions. Tensors that were loaded in
    inference mode do not count their changes: in a plain state dict each is another LoRA each time.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self._source: HeldSource | None = None
        self.token = _Token()
        # Nothing can ask for its deltas again.
        weakref.finalize(self, forget, self.token).atexit = False

    def source(self, name: str) -> HeldSource:
        """The source of these tensors, planned once for each name."""
        found = self._source
        if found is None or found.name != name:
            found = self._source = HeldSource(self._tensors, name, self.token)
        return found

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        # Not by values, as mappings do: tensors have no truth.
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({counted(len(self), 'tensor')})"

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldTensors:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (HeldTensors, (self._tensors,))


class HeldSource(StateDictSource):
    """The source of `HeldTensors`."""

    cacheable = True

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str, token: Hashable) -> None:
        super().__init__(tensors, name)
        self.name = name
        self._token = token

    @property
    def identity(self) -> Hashable:
        """The token."""
        return self._token


class _Token:
    """Equals itself alone, and in another process nothing."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Token, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Token:
        return self
