"""The course of the demo: what is composed in which step, and whether all of it held."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qwenlora import compose_loras, reset_loras
from qwenlora.demo.expected import weighted_sum
from qwenlora.demo.extra import MissingExtraError
from qwenlora.demo.files import (
    LoraFile,
    WrongFile,
    write_files,
    write_plain_files,
    write_wrong_files,
)
from qwenlora.demo.light_screen import LightScreen
from qwenlora.demo.measure import BOUND, Errors, Kind, Meter
from qwenlora.demo.model import dense_model, dense_sizes, drawn_model, emulated_model
from qwenlora.demo.pipeline import PICTURE_BOUND, measure_pipeline
from qwenlora.demo.screen import Screen

if TYPE_CHECKING:
    from pathlib import Path

    from qwenlora.emulation import EmulatedQwenImageTransformer
    from qwenlora.report import ComposeReport

__all__ = ["run", "run_light"]

_BITES = 10 * BOUND
"""A mistake must show as at least this, or the measure would be blind to it."""

_STRENGTHS = (1.0, 0.8, -0.6)
_Stack = Sequence[tuple[LoraFile, float]]


def run(folder: Path, *, kept: bool) -> int:
    """Run every step.

    Args:
        folder: Where the LoRA files are written.
        kept: Whether they stay there.

    Returns:
        0 where everything held, else 1.

    Raises:
        MissingExtraError: diffusers or peft is missing.
        QwenLoraError: The engine refused.
        OSError: The files cannot be written.
    """
    return _run(_full, Screen(), folder if kept else None, folder)


def run_light(folder: Path, *, kept: bool) -> int:
    """Run the steps that need neither diffusers nor peft.

    Args:
        folder: Where the LoRA files are written.
        kept: Whether they stay there.

    Returns:
        0 where everything held, else 1.

    Raises:
        QwenLoraError: The engine refused.
        OSError: The files cannot be written.
    """
    return _run(_light, LightScreen(), folder if kept else None, folder)


def _run(
    steps: Callable[[Screen, Path | None, Path], list[str]],
    screen: Screen,
    kept: Path | None,
    folder: Path,
) -> int:
    screen.title()
    with torch.no_grad(), _one_thread():
        failures = steps(screen, kept, folder)
    screen.verdict(failures)
    return 1 if failures else 0


def _full(screen: Screen, kept: Path | None, folder: Path) -> list[str]:
    started = time.perf_counter()
    dense = dense_model()
    model = emulated_model(dense)
    files = write_files(dense, dense_sizes(model), folder)
    screen.setting(model, files, kept, time.perf_counter() - started)
    course = _Course(model, screen)
    course.arithmetic(files, folder)
    course.pipeline(dense, list(zip(files, _STRENGTHS, strict=True)))
    return course.failures


def _light(screen: Screen, kept: Path | None, folder: Path) -> list[str]:
    started = time.perf_counter()
    model = drawn_model()
    files = write_plain_files(dense_sizes(model), folder)
    screen.setting(model, files, kept, time.perf_counter() - started)
    course = _Course(model, screen)
    course.arithmetic(files, folder)
    return course.failures


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: on matrices this small, more would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Course:
    """Steps on one model; what did not hold is collected."""

    def __init__(self, model: EmulatedQwenImageTransformer, screen: Screen) -> None:
        self.failures: list[str] = []
        self._model = model
        self._base = copy.deepcopy(model)
        self._meter = Meter(self._base)
        self._screen = screen

    def arithmetic(self, files: tuple[LoraFile, LoraFile, LoraFile], folder: Path) -> None:
        """Compose three files, change the stack, reset, and show what mistakes would give."""
        _, lightning, kohya = files
        stack = list(zip(files, _STRENGTHS, strict=True))
        self.compose("compose three", stack)
        self.compose("change one strength", [*stack[:2], (kohya, 1.2)])
        self.compose("remove one", stack[:2])
        self.reset()
        rows, alpha = write_wrong_files(lightning, kohya, folder)
        self._screen.mistakes()
        self.mistake(rows, (Kind.MODULATION,))
        self.mistake(alpha, (Kind.ATTENTION, Kind.MLP))

    def compose(self, what: str, stack: _Stack) -> None:
        """Bring the model to a stack and measure every slot."""
        report, seconds = self._composed(self._model, [(f.path, s) for f, s in stack])
        names = ", ".join(f"{file.path.stem} x {strength:g}" for file, strength in stack)
        expected = weighted_sum((file.deltas, strength) for file, strength in stack)
        errors = self._meter.errors(self._model, expected)
        step = self._screen.step(what, names, report.summary(), seconds)
        self._screen.table(errors)
        self.failures += [
            f"step {step}: {row.kind.value} is off by {max(row.slot, row.output):.2g}"
            for row in errors
            if not row.within_bound
        ]
        if not report.complete:
            self.failures.append(f"step {step}: something was left out")

    def reset(self) -> None:
        """Reset the model and compare it with the base to the bit."""
        moved = self._meter.moved(self._model)
        started = time.perf_counter()
        report = reset_loras(self._model)
        seconds = time.perf_counter() - started
        different = self._meter.differences(self._model)
        step = self._screen.step("reset", "no LoRA", report.summary(), seconds)
        self._screen.reset(moved, self._meter.tensors(), different)
        if different:
            self.failures.append(f"step {step}: the reset is not bit-exact")

    def mistake(self, wrong: WrongFile, kinds: Sequence[Kind]) -> None:
        """Compose a wrong file into a copy and measure it against the right one."""
        model = copy.deepcopy(self._base)
        self._composed(model, [(wrong.path, 1.0)])
        errors = self._meter.errors(model, wrong.original.deltas, kinds)
        self._screen.mistake(wrong.mistake, errors)
        self.failures += [
            f"the measure does not see this in {row.kind.value}: {wrong.mistake}"
            for row in errors
            if not _is_seen(row)
        ]

    def pipeline(self, dense: Any, stack: _Stack) -> None:
        """Do the same by the methods of a diffusers pipeline, on diffusers' own 4-bit layers."""
        started = time.perf_counter()
        try:
            picture = measure_pipeline(dense, stack)
        except MissingExtraError:
            raise
        except ImportError as error:
            self._screen.no_pipeline(str(error))
            return
        step = self._screen.pipeline(picture, time.perf_counter() - started)
        if picture.error > PICTURE_BOUND:
            self.failures.append(f"step {step}: the picture is off by {picture.error:.2g}")
        if not picture.is_base_again:
            self.failures.append(f"step {step}: what was unloaded is not all gone")

    def _composed(
        self, model: EmulatedQwenImageTransformer, loras: Sequence[tuple[Path, float]]
    ) -> tuple[ComposeReport, float]:
        started = time.perf_counter()
        report = compose_loras(model, list(loras))
        return report, time.perf_counter() - started


def _is_seen(errors: Errors) -> bool:
    return errors.slot >= _BITES and errors.output >= _BITES
