"""Where and when a node's LoRAs act: strength by block, and over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from qwenlora import BlockFactors, Schedule, ScheduleMode
from qwenlora.blocks import ALL_ONES
from qwenlora.errors import BlockFactorsError, ScheduleError
from qwenlora.schedule import ONE_THROUGHOUT

from .presets import ALL, CUSTOM, PRESETS
from .rows import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EVERYWHERE", "Control"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Control:
    """The choices of one node, for all its LoRAs.

    Attributes:
        preset: A name out of `PRESETS`, or `CUSTOM`.
        custom: The factors by block of `CUSTOM`; without effect in a preset.
        schedule: The factors over the steps.
    """

    preset: str = ALL
    custom: BlockFactors = ALL_ONES
    schedule: Schedule = ONE_THROUGHOUT

    @classmethod
    def read(cls, inputs: Mapping[str, Any]) -> Control:
        """Find the choices among a node's inputs; None and what is not there is the default.

        Raises:
            InputError: A value is of no use; its input is named.
        """
        preset = _text(inputs, "blocks") or ALL
        if preset not in (*PRESETS, CUSTOM):
            known = ", ".join(map(repr, (*PRESETS, CUSTOM)))
            raise InputError(f"blocks: there is no preset {preset!r}: choose out of {known}")
        mode = _text(inputs, "schedule_mode") or ScheduleMode.LINEAR.value
        if mode not in {own.value for own in ScheduleMode}:
            known = " or ".join(repr(own.value) for own in ScheduleMode)
            raise InputError(f"schedule_mode: it is {mode!r}, which must be {known}")
        return cls(
            preset,
            _parsed("custom_blocks", BlockFactors.parse, inputs),
            _parsed("schedule", lambda text: Schedule.parse(text, mode=ScheduleMode(mode)), inputs),
        )

    @property
    def fingerprint(self) -> list[str]:
        """Equal for choices of one effect."""
        custom = str(self.custom) if self.preset == CUSTOM else ""
        return [self.preset, custom, str(self.schedule)]

    @property
    def note(self) -> str:
        """What a person may have meant otherwise; empty where there is nothing."""
        if self.preset == CUSTOM or not self.custom:
            return ""
        return f"`custom_blocks` has no effect: `blocks` is '{self.preset}', not '{CUSTOM}'"

    def factors(self, block_count: int) -> BlockFactors:
        """The factors for a model of so many numbered blocks."""
        return self.custom if self.preset == CUSTOM else PRESETS[self.preset].factors(block_count)


EVERYWHERE = Control()
"""All blocks, all steps."""


def _parsed(name: str, parse: Callable[[str], _T], inputs: Mapping[str, Any]) -> _T:
    try:
        return parse(_text(inputs, name))
    except (BlockFactorsError, ScheduleError) as error:
        raise InputError(f"{name}: {error}") from error


def _text(inputs: Mapping[str, Any], name: str) -> str:
    value = inputs.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{name}: it is {value!r}, which must be text")
    return value
