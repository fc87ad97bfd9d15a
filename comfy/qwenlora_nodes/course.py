"""The course of sampling as ComfyUI counts it, and a set's strengths at a point of it.

The share of the course is that of hooks' keyframes and of `start_percent`: it follows the noise
level, not the number of the step. So it is the same in a sampler that evaluates the model several
times a step, in the second of two stages, and where an image is refined from half of the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import comfy.model_management

from qwenlora import LoraSet
from qwenlora.errors import ScheduleError
from qwenlora.runtime import OPTIONS_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["resolved", "share_of"]

_HALVINGS = 30
_DIGITS = 5
"""Decimals of a share: noise levels are float32, and a step that begins at a keyframe has it."""


def share_of(percent_to_sigma: Callable[[float], float], sigma: float) -> float:
    """The share of the course at which the noise is down to a level.

    Args:
        percent_to_sigma: The host's function from a share to its level, which falls.
        sigma: The level.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float(percent_to_sigma(middle)) >= sigma:
            low = middle
        else:
            high = middle
    return round(low, _DIGITS)


def resolved(model: Any, sigma: Any, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of one evaluation, the strengths of their set as they are at its noise level.

    Args:
        model: The host's model around the transformer.
        sigma: The noise levels of the batch, of which the first counts, as for hooks' keyframes.
        options: What the evaluation is given; it stays as it is.

    Raises:
        ScheduleError: Nothing tells the share of the course.
    """
    wanted = options.get(OPTIONS_KEY)
    if not isinstance(wanted, LoraSet) or not wanted.has_schedule:
        return options
    percent_to_sigma = getattr(model.model_sampling, "percent_to_sigma", None)
    if percent_to_sigma is None or sigma is None:
        raise ScheduleError(
            f"{type(model.model_sampling).__name__} does not tell how far sampling is, which a"
            " LoRA's schedule needs\nhint: leave `schedule` empty, or take out the node that"
            " changes the model's sampling"
        )
    level = float(sigma.reshape(-1)[0])
    now = wanted.at(share_of(percent_to_sigma, level))
    if _is_under_way(level, options.get("sample_sigmas")):
        now = replace(now, options=replace(now.options, progress=_stop_if_asked))
    return {**options, OPTIONS_KEY: now}


def _is_under_way(level: float, levels: Any) -> bool:
    """Tell if a run has made its first step."""
    return levels is not None and len(levels) > 0 and level < float(levels[0])


def _stop_if_asked(phase: str, done: int, total: int) -> None:
    """Compose out of sight: the node's bar shows the sampler's steps."""
    del phase, done, total
    comfy.model_management.throw_exception_if_processing_interrupted()
