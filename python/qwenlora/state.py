"""What is applied to a transformer: kept by the transformer itself.

The state is an attribute, plain data by slot path, so that a deep copy of a composed transformer
knows its own base ranks and never reaches the original.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from qwenlora.errors import ModelStateError, UnsupportedModelError
from qwenlora.report import ComposeReport

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "EMPTY",
    "AppliedState",
    "SlotRecord",
    "check_intact",
    "lock_of",
    "read_state",
    "write_state",
]

_ATTRIBUTE = "_qwenlora_applied"
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


@dataclass(frozen=True)
class SlotRecord:
    """How a composed slot was left."""

    base_rank: int
    rank_added: int


@dataclass(frozen=True)
class AppliedState:
    """One composition. Immutable: a new one takes its place in one assignment.

    Attributes:
        stack: What was asked for; equal stacks need no work. None for the base and after a failure.
        records: Composed slots by path.
        report: What was done.
    """

    stack: Hashable
    records: Mapping[str, SlotRecord] = field(default_factory=lambda: MappingProxyType({}))
    report: ComposeReport = field(default_factory=lambda: ComposeReport((), (), 0, 0.0))

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedState:
        # Immutable throughout, hence shared with the copy of the transformer.
        return self

    @property
    def base_ranks(self) -> dict[str, int]:
        """Base ranks of the composed slots."""
        return {path: record.base_rank for path, record in self.records.items()}


EMPTY = AppliedState(stack=())
"""A model never touched."""


def read_state(model: nn.Module) -> AppliedState:
    """What is applied to the model."""
    state = model.__dict__.get(_ATTRIBUTE, EMPTY)
    assert isinstance(state, AppliedState)
    return state


def write_state(model: nn.Module, state: AppliedState) -> None:
    """Record what is applied; the base leaves no trace."""
    if state is EMPTY:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state


def lock_of(model: nn.Module) -> threading.RLock:
    """The one lock of a transformer.

    Raises:
        UnsupportedModelError: The model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(
            f"expected a transformer module, got {type(model).__name__}"
            "\nhint: with a diffusers pipeline, pass `pipeline.transformer`"
        )
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


def check_intact(state: AppliedState, added: Mapping[str, int]) -> None:
    """Check that composed slots are as they were left.

    Args:
        state: What is recorded.
        added: Ranks beyond the base that each recorded slot holds now, by path.

    Raises:
        ModelStateError: A slot was changed by something else.
    """
    for path, record in state.records.items():
        if added.get(path) != record.rank_added:
            found = f"it holds {added[path]}" if path in added else "it is gone"
            raise ModelStateError(
                f"`{path}` was left with {record.rank_added} ranks beyond its base, now {found}:"
                " something else changed the model\nhint: reload the model"
            )
