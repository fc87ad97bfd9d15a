"""A LoRA in memory that nobody writes to: its identity is a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qwenlora.source.state_dict import StateDictSource

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
        self.token = _Token()

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
        return f"{type(self).__name__}({len(self)} tensors)"

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldTensors:
        return self


class HeldSource(StateDictSource):
    """The source of `HeldTensors`."""

    cacheable = True

    def __init__(self, tensors: HeldTensors, name: str) -> None:
        super().__init__(tensors, name)
        self._token = tensors.token

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
