"""The demo's screen: plain ASCII text, 80 columns, no colour."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

from qwenlora.demo.measure import BOUND, Errors
from qwenlora.demo.model import BASE_RANK
from qwenlora.demo.pipeline import PICTURE_BOUND
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qwenlora.demo.files import LoraFile
    from qwenlora.demo.pipeline import Picture
    from qwenlora.emulation import EmulatedQwenImageTransformer

__all__ = ["Screen", "worst_of"]

_WIDTH = 80
_KIND_WIDTH = 20
_MANY_DIFFERENCES = 5
_BOUND = f"{BOUND:.0e}".replace("e-0", "e-")


class Screen:
    """Writes to standard output, a section at a time."""

    def __init__(self) -> None:
        self._steps = 0

    def title(self) -> None:
        """Say what is about to happen; importing diffusers takes some seconds."""
        self._line("qwenlora demo: LoRAs composed into a quantized model, and measured")
        self._line()

    def setting(
        self,
        model: EmulatedQwenImageTransformer,
        files: Sequence[LoraFile],
        kept: Path | None,
        seconds: float,
    ) -> None:
        """Describe the model and the files."""
        self._heading("set-up", seconds)
        self._model(model)
        self._text(
            "LoRA files, drawn as strong as the layers they change, "
            + ("deleted at the end:" if kept is None else f"for this width only, kept in {kept}:")
        )
        for file in files:
            self._line(f"    {file.path.stem:<10} {file.wrote}")
            self._line(f"    {'':<10} {file.facts}")
            self._line(f"    {'':<10} {file.example}")
        self._line()
        self._text(
            "Errors are |measured - expected| / |expected|, the worst of each kind of layer, of the"
            " slot (unpacked) and of the layer's output. The expected is computed from the files in"
            " dense float64; for PEFT's file by PEFT. Slots that a stack leaves alone must be the"
            " base, bit for bit."
        )
        self._line()

    def step(self, what: str, stack: str, summary: str, seconds: float) -> int:
        """Begin a step; its number."""
        self._steps += 1
        self._heading(f"{self._steps}. {what}", seconds)
        self._text(f"stack   {stack}", hanging=8)
        self._text(f"report  {summary}", hanging=8)
        self._line()
        return self._steps

    def table(self, errors: Sequence[Errors]) -> None:
        """Show the errors of a step."""
        self._line(f"    {'':<{_KIND_WIDTH}}{'slots':>9}{'slot error':>15}{'output error':>15}")
        for row in errors:
            self._line(f"    {row.kind.value:<{_KIND_WIDTH}}{_count(row):>9}{_cells(row)}")
        self._line()

    def reset(self, moved: float, tensors: int, different: Sequence[str]) -> None:
        """Show what a reset left behind."""
        self._text(f"before  the model's output is {moved:.1%} away from the base's", hanging=8)
        if not different:
            self._text(
                f"after   {counted(tensors, 'tensor')} and the model's output are the base's, bit"
                " for bit; no hook is left",
                hanging=8,
            )
        else:
            shown = ", ".join(different[:_MANY_DIFFERENCES])
            more = ", ..." if len(different) > _MANY_DIFFERENCES else ""
            found = counted(len(different), "DIFFERENCE", "DIFFERENCES")
            self._text(f"after   {found}: {shown}{more}", hanging=8)
        self._line()

    def mistakes(self) -> None:
        """Begin the section on what the measure would show."""
        self._heading("what mistakes would show", None)
        self._line(f"    {'':<{_KIND_WIDTH}}{'':>9}{'slot error':>15}{'output error':>15}")

    def mistake(self, what: str, errors: Sequence[Errors]) -> None:
        """Show the errors that one mistake would give."""
        self._line(f"  {what}")
        for row in errors:
            self._line(f"    {row.kind.value:<{_KIND_WIDTH}}{'':>9}{_cells(row)}")
        self._line()

    def pipeline(self, picture: Picture, seconds: float) -> int:
        """Show what a pipeline made with LoRAs by name; the step's number."""
        self._steps += 1
        self._heading(f"{self._steps}. the same by name, in a diffusers pipeline", seconds)
        self._text("diffusers' own pipeline, transformer and 4-bit layers, kernels emulated")
        for call in picture.calls:
            self._line(f"    {call}")
        self._text(f"report  {picture.report}", hanging=8)
        self._text(
            f"latents error {picture.error:.1e} against the dense model with the files in its"
            f" weights (bound {PICTURE_BOUND:.0e})",
            hanging=8,
        )
        again = "the base's, bit for bit" if picture.is_base_again else "NOT the base's"
        self._text(f"after   unload_lora_weights(): the latents are {again}", hanging=8)
        self._line()
        return self._steps

    def no_pipeline(self, reason: str) -> None:
        """Say why the pipeline's step is left out."""
        self._heading("by name, in a diffusers pipeline: left out", None)
        self._text(reason)
        self._line()

    def verdict(self, failures: Sequence[str]) -> None:
        """Close."""
        if not failures:
            self._line(f"all within bf16 rounding ({_BOUND}); reset is bit-exact")
            return
        self._line(f"FAILED (bound {_BOUND})")
        for failure in failures:
            self._text(failure)

    def _model(self, model: EmulatedQwenImageTransformer) -> None:
        config = model.config
        self._text(
            f"An emulated Qwen-Image transformer: {config.num_layers} blocks, {config.channels}"
            f" wide, int4 (W4A4) and bfloat16 in Nunchaku's layouts, base rank {BASE_RANK}."
        )

    def _heading(self, what: str, seconds: float | None) -> None:
        time = "" if seconds is None else f"{seconds:.2f} s"
        self._line(f"{what}{time:>{_WIDTH - len(what)}}".rstrip())

    def _text(self, text: str, *, hanging: int = 0) -> None:
        indent = "  "
        lines = textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=indent,
            subsequent_indent=indent + " " * hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines:
            self._line(line)

    def _line(self, text: str = "") -> None:
        # A kept folder's name may hold what the console cannot show.
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(f"{text}\n".encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def worst_of(errors: Sequence[Errors]) -> str:
    """The worst slot and output error of several kinds, in two columns."""
    return "".join(
        f"{_shown(max(values)):>12}"
        for values in ((row.slot for row in errors), (row.output for row in errors))
    )


def _count(errors: Errors) -> str:
    return f"{errors.carrying} of {errors.slots}"


def _cells(errors: Errors) -> str:
    return f"{_number(errors, errors.slot):>15}{_number(errors, errors.output):>15}"


def _number(errors: Errors, value: float) -> str:
    if errors.carrying == 0 and value == 0:
        return "bit-exact"
    return _shown(value)


def _shown(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"
