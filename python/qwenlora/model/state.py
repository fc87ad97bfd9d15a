"""The state that is applied to a transformer, kept by the transformer itself.

The state is an attribute, plain data by slot path, so that a deep copy of a composed transformer
knows its own base ranks and never reaches the original.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qwenlora.errors import ModelStateError
from qwenlora.lora_set import NO_LORAS
from qwenlora.report import NO_SLOTS, ComposeReport
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from typing import Any

    from torch import nn

    from qwenlora.lora_set import LoraSet, Unmakeable

__all__ = [
    "EMPTY",
    "AppliedState",
    "SlotRecord",
    "check_intact",
    "read_default",
    "read_state",
    "require_not_overwritten",
    "write_default",
    "write_state",
]


_ATTRIBUTE = "_qwenlora_applied"
_DEFAULT = "_qwenlora_default"


@dataclass(frozen=True)
class SlotRecord:
    """The ranks with which a composed slot was left."""

    base_rank: int
    rank_added: int


@dataclass(frozen=True)
class AppliedState:
    """One composition. Immutable: a new one takes its place in one assignment.

    Attributes:
        stack: What was asked for; equal stacks need no work. None after a failure.
        records: Composed slots by path.
        report: What was done.
        in_flight: Slots are being written. Seen by a later call only where the writing call could
            not even clean up: every slot is then brought to its base first.
        overwritten: A state was loaded over it: what the slots hold is not known.
    """

    stack: Hashable
    records: Mapping[str, SlotRecord] = field(default_factory=dict)
    report: ComposeReport = field(default_factory=lambda: ComposeReport((), NO_SLOTS, 0, 0.0))
    in_flight: bool = False
    overwritten: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedState:
        # Immutable throughout, hence shared with the copy of the transformer.
        return self

    def taken(self, seconds: float) -> AppliedState:
        """The same, with the time that it took; a model never touched has nothing to tell."""
        if self is EMPTY:
            return self
        return replace(self, report=replace(self.report, seconds=seconds))

    @property
    def base_ranks(self) -> dict[str, int]:
        """Base ranks of the composed slots."""
        return {path: record.base_rank for path, record in self.records.items()}


EMPTY = AppliedState(stack=())
"""A model never touched."""


def read_state(model: nn.Module) -> AppliedState:
    """Read the state that is applied to the model.

    Raises:
        ModelStateError: The attribute that holds it is somebody else's.
    """
    state = model.__dict__.get(_ATTRIBUTE, EMPTY)
    if not isinstance(state, AppliedState):
        raise ModelStateError(
            f"the model's attribute `{_ATTRIBUTE}` is a {type(state).__name__}:"
            " something else set it\nhint: reload the model"
        )
    return state


def write_state(model: nn.Module, state: AppliedState) -> None:
    """Record what is applied; the base leaves no trace."""
    if state.records:
        _notice_loading(model)
    if state is EMPTY:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state
    if not state.records:
        _forget_loading(model)


def _notice_loading(model: nn.Module) -> None:
    """Hear of `load_state_dict`, of the model or of a module around it."""
    if not _loading_hooks(model):
        model.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]


def _forget_loading(model: nn.Module) -> None:
    for key in _loading_hooks(model):
        del model._load_state_dict_pre_hooks[key]


def _loading_hooks(model: nn.Module) -> list[int]:
    """Keys of our hooks among those of `load_state_dict`; PyTorch wraps each."""
    hooks = model._load_state_dict_pre_hooks
    return [key for key, own in hooks.items() if getattr(own, "hook", own) is _before_loading]


def _before_loading(model: nn.Module, *_: object) -> None:
    """A state is about to be loaded over the model: it may stop half way."""
    state = model.__dict__.get(_ATTRIBUTE)
    if isinstance(state, AppliedState) and state.records and not state.in_flight:
        model.__dict__[_ATTRIBUTE] = replace(state, stack=None, overwritten=True)


def require_not_overwritten(state: AppliedState, what: str | None = None) -> None:
    """Check that no state was loaded over a composed model.

    Args:
        state: What is recorded.
        what: What was seen to be written to, where that is how it was noticed.

    Raises:
        ModelStateError: One was.
    """
    if state.overwritten or what is not None:
        raise ModelStateError(
            f"{what or 'the model was'} written to while LoRAs were composed, as by"
            " `load_state_dict`: what it holds is not known"
            "\nhint: reload the model; call reset_loras before its state is loaded"
        )


def read_default(model: nn.Module) -> LoraSet | Unmakeable:
    """The set of forwards that carry none."""
    default: LoraSet | Unmakeable = model.__dict__.get(_DEFAULT, NO_LORAS)
    return default


def write_default(model: nn.Module, default: LoraSet | Unmakeable) -> None:
    """Set it; an empty set leaves no trace."""
    if default.key == EMPTY.stack:
        model.__dict__.pop(_DEFAULT, None)
    else:
        model.__dict__[_DEFAULT] = default


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
                f"`{path}` was left with {counted(record.rank_added, 'rank')} beyond its base, now"
                f" {found}: something else changed the model\nhint: reload the model"
            )
