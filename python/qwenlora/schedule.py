"""A LoRA's strength over the course of sampling: factors by the share of the course."""

from __future__ import annotations

import enum
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenlora.entries import Piece, factor_of, number_of, number_text, sections, shown
from qwenlora.errors import ScheduleError

if TYPE_CHECKING:
    from typing import TypeAlias

__all__ = ["ONE_THROUGHOUT", "Keyframes", "Schedule", "ScheduleMode", "course_of"]

Keyframes: TypeAlias = "str | Schedule | Iterable[tuple[float, float]]"
"""Every form in which a schedule is given."""

_MOST_KEYFRAMES = 10_000
_PERCENT = "%"
_WAY_OUT = "\nhint: for example `0:1, 0.5:0.3`, or `0%:1, 50%:0.3; steps`"


class ScheduleMode(enum.Enum):
    """The factor between two keyframes."""

    LINEAR = "linear"
    """On the straight line from one to the next."""

    STEPS = "steps"
    """That of the one before, up to the next."""


@dataclass(frozen=True)
class Schedule:
    """Factors on a LoRA's strength over the course of sampling. Immutable and hashable.

    A keyframe is a share of the course, from 0 (pure noise) to 1 (the finished image), and the
    factor that is reached there. Before the first keyframe its own factor holds, behind the last
    one that one's. Keyframes beside others of the same factor are left out where they have no
    effect, and a factor that never changes is one keyframe at 0. So schedules of mode "steps" are
    equal exactly where all their factors are. Made by `parse` and `of`.

    Attributes:
        keyframes: (share, factor), ascending by share; at least one.
        mode: The factor between them.
    """

    keyframes: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    mode: ScheduleMode = ScheduleMode.LINEAR

    @classmethod
    def parse(cls, text: str, *, mode: ScheduleMode = ScheduleMode.LINEAR) -> Schedule:
        """Read the text form.

        Entries are divided by `,`. An entry is a share from 0 to 1, or a percentage, then `:` and a
        factor. A section behind a `;` may name the mode. White space is free, and the order, too. A
        text without an entry is 1 throughout.

        Args:
            text: The text.
            mode: The mode where the text names none.

        Raises:
            ScheduleError: The text is of another form, a share is there twice or outside of the
                course, or a factor is not finite.
        """
        found: list[tuple[float, float]] = []
        shares: dict[float, Piece] = {}
        named: Piece | None = None
        for entry in (entry for section in sections(text) for entry in section):
            if entry.text.lower() in _MODES:
                if named is not None:
                    raise _wrong(entry, "is a second mode", "name the mode once")
                named = entry
                continue
            place, number = _split(entry)
            share = _share(place)
            if share in shares:
                raise _wrong(place, f"is `{shown(shares[share].text)}` again", "name it once")
            shares[share] = place
            found.append((share, factor_of(number, _wrong)))
        if len(found) > _MOST_KEYFRAMES:
            raise ScheduleError(
                f"a schedule of {len(found)} keyframes: at most {_MOST_KEYFRAMES} are read"
            )
        return cls._canonical(found, mode if named is None else _MODES[named.text.lower()])

    @classmethod
    def of(cls, value: Keyframes | None, *, mode: ScheduleMode = ScheduleMode.LINEAR) -> Schedule:
        """Bring every accepted form to a schedule; None is 1 throughout.

        Args:
            value: Text, a schedule, or pairs of a share and a factor.
            mode: The mode where the value has none.

        Raises:
            ScheduleError: A text or a pair is of another form.
            TypeError: It is none of these.
        """
        if value is None:
            return ONE_THROUGHOUT
        if isinstance(value, Schedule):
            return value
        if isinstance(value, str):
            return cls.parse(value, mode=mode)
        if not isinstance(value, Iterable):
            raise _not_a_schedule(value)
        return cls.parse(", ".join(map(_pair_text, value)), mode=mode)

    def __str__(self) -> str:
        """The canonical text; empty where it is 1 throughout."""
        if not self:
            return ""
        text = ", ".join(
            f"{number_text(share)}:{number_text(factor)}" for share, factor in self.keyframes
        )
        return text if self.mode is ScheduleMode.LINEAR else f"{text}; {self.mode.value}"

    def __bool__(self) -> bool:
        """True where some factor is not 1."""
        return any(factor != 1 for _, factor in self.keyframes)

    @property
    def is_zero(self) -> bool:
        """True where every factor is 0."""
        return all(factor == 0 for _, factor in self.keyframes)

    def factor(self, share: float) -> float:
        """The factor at a share of the course, in float64; shares outside of it are its ends'.

        Raises:
            ValueError: The share is no number.
        """
        if math.isnan(share):
            raise ValueError("the share of the course is not a number")
        keyframes = self.keyframes
        behind = bisect_right(keyframes, share, key=lambda keyframe: keyframe[0])
        begin, factor = keyframes[max(behind - 1, 0)]
        if self.mode is ScheduleMode.STEPS or behind in (0, len(keyframes)) or share == begin:
            return factor
        end, other = keyframes[behind]
        part = (share - begin) / (end - begin)
        # Rounding must not lead past a keyframe, and zero has one sign.
        value = (1 - part) * factor + part * other
        return min(max(value, min(factor, other)), max(factor, other)) + 0.0

    @classmethod
    def _canonical(cls, found: Iterable[tuple[float, float]], mode: ScheduleMode) -> Schedule:
        keyframes = sorted(found)
        factors = [factor for _, factor in keyframes]
        if len({*factors}) < 2:
            return cls(((0.0, factors[0] if factors else 1.0),))
        kept = [own for at, own in enumerate(keyframes) if not _is_idle(factors, at, mode)]
        if mode is ScheduleMode.STEPS:
            kept[0] = (0.0, kept[0][1])
        return cls(tuple(kept), mode)


ONE_THROUGHOUT = Schedule()
"""Every factor is 1."""


def course_of(scheduler: Any) -> Callable[[], float]:
    """What tells the share of the course that a scheduler of diffusers is at.

    That is the steps before the current one over all steps of its schedule. A pipeline that starts
    from an image begins behind 0.

    Args:
        scheduler: A scheduler that a pipeline runs: with `timesteps`, `step_index`, `begin_index`.

    Raises:
        TypeError: It has not all of these.
    """
    missing = [name for name in _OF_SCHEDULER if not hasattr(scheduler, name)]
    if missing:
        raise TypeError(
            f"{type(scheduler).__name__} has no `{missing[0]}`: a scheduler of diffusers tells the"
            " course by it"
        )

    def course() -> float:
        step = scheduler.step_index
        # None before the first step is made.
        if step is None:
            step = scheduler.begin_index or 0
        return float(step) / max(len(scheduler.timesteps), 1)

    return course


_OF_SCHEDULER = ("timesteps", "step_index", "begin_index")
_MODES = {mode.value: mode for mode in ScheduleMode}


def _is_idle(factors: list[float], at: int, mode: ScheduleMode) -> bool:
    """Tell if a keyframe is without effect: its neighbours have its factor."""
    same_before = at > 0 and factors[at - 1] == factors[at]
    if mode is ScheduleMode.STEPS:
        return same_before
    same_behind = at + 1 < len(factors) and factors[at + 1] == factors[at]
    is_last = at + 1 == len(factors)
    return (same_before or at == 0) and (same_behind or (is_last and at > 0))


def _split(entry: Piece) -> tuple[Piece, Piece]:
    if not entry.text:
        raise _wrong(entry, "is an empty entry", "leave out one comma")
    parts = entry.split()
    if parts is None:
        modes = " and ".join(_MODES)
        raise _wrong(entry, "has no factor", f"write it behind a colon; the modes are {modes}")
    return parts


def _share(place: Piece) -> float:
    is_percentage = place.text.endswith(_PERCENT)
    share = number_of(place.text.removesuffix(_PERCENT).rstrip())
    if share is None:
        raise _wrong(place, "is no share of the course", "write `0.5` or `50%`")
    share = share / 100 if is_percentage else share
    if not 0 <= share <= 1:
        raise _wrong(place, "is outside of the course", "it goes from 0 to 1, or from 0% to 100%")
    return share


def _pair_text(pair: object) -> str:
    """A keyframe of numbers as an entry of the text form."""
    if not isinstance(pair, Iterable) or isinstance(pair, (str, bytes)):
        raise _not_a_schedule(pair)
    numbers = list(pair)
    if len(numbers) != 2:
        raise _not_a_schedule(pair)
    try:
        share, factor = map(float, numbers)
    except (TypeError, ValueError, OverflowError) as error:
        raise _not_a_schedule(pair) from error
    return f"{share!r}:{factor!r}"


def _not_a_schedule(value: object) -> TypeError:
    return TypeError(
        "a schedule is text such as `0:1, 0.5:0.3`, pairs of a share and a factor, or a Schedule,"
        f" not {shown(repr(value))}"
    )


def _wrong(piece: Piece, what: str, way_out: str) -> ScheduleError:
    return ScheduleError(
        f"`{shown(piece.text)}` at character {piece.begin + 1} {what}: {way_out}{_WAY_OUT}",
        part=piece.text,
        position=piece.begin,
    )
