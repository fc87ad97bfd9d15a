"""The screen of the light demo: a line for each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.demo.screen import Screen, worst_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qwenlora.demo.files import LoraFile
    from qwenlora.demo.measure import Errors
    from qwenlora.emulation import EmulatedQwenImageTransformer

__all__ = ["LightScreen"]

_NAME_WIDTH = 48


class LightScreen(Screen):
    """Writes to standard output, a line at a time."""

    def title(self) -> None:
        """Say what is about to happen, and what is not."""
        self._line("qwenlora demo --light: LoRAs composed into a quantized model, and measured")
        self._line()

    def setting(
        self,
        model: EmulatedQwenImageTransformer,
        files: Sequence[LoraFile],
        kept: Path | None,
        seconds: float,
    ) -> None:
        """Describe the model and the files."""
        self._model(model)
        where = "" if kept is None else f", kept in {kept}"
        self._text(f"Its LoRA files, in {len(files)} spellings{where}:")
        for file in files:
            self._line(f"    {file.example}")
        self._text("Errors are the worst of all layers, against the files in dense float64.")
        self._line()
        self._row("", f"{'slot':>12}{'output':>12}")

    def step(self, what: str, stack: str, summary: str, seconds: float) -> int:
        """Begin a step; its number."""
        self._steps += 1
        self._what = f"{self._steps}. {what}"
        return self._steps

    def table(self, errors: Sequence[Errors]) -> None:
        """Show the errors of a step."""
        self._row(self._what, worst_of(errors))

    def reset(self, moved: float, tensors: int, different: Sequence[str]) -> None:
        """Show what a reset left behind."""
        self._row(self._what, f"{'bit-exact' if not different else 'NOT bit-exact':>24}")

    def mistakes(self) -> None:
        """Begin the section on what the measure would show."""
        self._text("what mistakes would show")

    def mistake(self, what: str, errors: Sequence[Errors]) -> None:
        """Show the errors that one mistake would give."""
        self._row(what, worst_of(errors))

    def verdict(self, failures: Sequence[str]) -> None:
        """Close."""
        self._line()
        self._text(
            "This is the light form. `qwenlora demo` also measures a file that PEFT and diffusers"
            " wrote, and a diffusers pipeline. It needs more packages:"
        )
        self._line('    pip install "qwenlora[demo]"')
        self._line()
        super().verdict(failures)

    def _row(self, what: str, cells: str) -> None:
        self._line(f"  {what:<{_NAME_WIDTH}}{cells}".rstrip())
