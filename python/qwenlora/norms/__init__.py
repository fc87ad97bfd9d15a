"""`qwenlora norms`: exact norms of the weights of a 16-bit checkpoint, for DoRA on a quantized one.

Reached through `qwenlora.cli`. `arguments` parses, `checkpoint` reads, `modules` knows the keys,
`job` goes through them. `qwenlora.source.norms_file` reads the result.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from qwenlora import console
from qwenlora.errors import (
    NothingToApplyError,
    OtherModelError,
    OutputError,
    QwenLoraError,
    ShapeMismatchError,
    UnknownWeightError,
)
from qwenlora.merge import ending_on_sigterm
from qwenlora.merge.talk import Talk
from qwenlora.norms.arguments import UsageError, parse
from qwenlora.requirements import RequirementError, require
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.norms.arguments import Arguments
    from qwenlora.norms.job import NormsReport

__all__ = ["Exit", "main"]

HELP = """\
Computes the norms of the rows and columns of a model's weights from its 16-bit
checkpoint, and writes them to a file. A DoRA needs them. A quantized model has
rounded weights, so that their norms are estimates, 0.2 % off. With this file
they are exact. Needs no GPU, and as little memory as one part of a layer takes.

Usage: qwenlora norms CHECKPOINT [-o FILE] [OPTIONS]

A checkpoint is Qwen-Image's or Z-Image's transformer in bfloat16, float16 or
float32: a .safetensors file, the .safetensors.index.json of several, or a
folder of diffusers'. Files of ComfyUI are read as well. It must be the one that
the quantized model was made of: Qwen-Image-Edit's norms are not Qwen-Image's.

Options:
  -o, --output FILE         the file to write; it must not exist. Otherwise the
                            checkpoint's name with `.norms.safetensors`, in the
                            working folder
  -f, --force               replace it if it does
  --json                    the report as one JSON object (schema 1)
  -h, --help                this text

Exit status:
   0  norms of all weights are in the file
   1  the checkpoint lacks some weights; the report says which
   2  it is of another model, or quantized; no file
   3  it cannot be read, or is damaged; no file
  64  the arguments make no sense
  69  torch, numpy or safetensors is missing or too old
  74  the file, or the report, cannot be written

Example:
  qwenlora norms qwen_image_bf16.safetensors -o qwen_image.norms.safetensors
"""


class Exit(IntEnum):
    """Exit statuses of `qwenlora norms`; equal to those of `qwenlora merge`."""

    WRITTEN = 0
    PARTIAL = 1
    REJECTED = 2
    UNREADABLE = 3
    USAGE = 64
    UNAVAILABLE = 69
    OUTPUT = 74
    INTERRUPTED = 130


_REJECTED = (NothingToApplyError, OtherModelError, ShapeMismatchError, UnknownWeightError)


def main(args: Sequence[str] | None = None) -> int:
    """Compute norms.

    Args:
        args: The arguments after `qwenlora norms`.

    Returns:
        The exit status, an `Exit`.
    """
    talk = Talk("reading")
    try:
        arguments = parse(list(args or ()))
        if arguments.is_help:
            console.write(HELP)
            return Exit.WRITTEN
        with ending_on_sigterm():
            return _run(arguments, talk)
    except UsageError as error:
        talk.say_usage(error, "qwenlora norms")
        return Exit.USAGE
    except RequirementError as error:
        talk.say("error", str(error))
        return Exit.UNAVAILABLE
    except QwenLoraError as error:
        talk.say("error", str(error))
        if isinstance(error, OutputError):
            return Exit.OUTPUT
        return Exit.REJECTED if isinstance(error, _REJECTED) else Exit.UNREADABLE
    except OSError as error:
        talk.say("error", f"the report cannot be written: {error.strerror or error}")
        return Exit.OUTPUT
    except KeyboardInterrupt:
        talk.say("error", "interrupted")
        return Exit.INTERRUPTED


def _run(arguments: Arguments, talk: Talk) -> Exit:
    require()
    from qwenlora.norms.job import write_norms

    try:
        report = write_norms(
            arguments.checkpoint,
            arguments.output,
            force=arguments.force,
            progress=talk.progress,
        )
    finally:
        talk.erase()
    console.write(report.to_json() + "\n" if arguments.is_json else _paint(report))
    return Exit.WRITTEN if report.complete else Exit.PARTIAL


def _paint(report: NormsReport) -> str:
    """The screen, each line ended."""
    rows = [
        ("WRITTEN" if report.complete else "PARTIAL", report.path),
        ("  model", f"{report.model}, {counted(report.modules, 'module')}"),
    ]
    if report.missing:
        text = f"{counted(len(report.missing), 'module')}, e.g. {report.missing[0]}"
        rows.append(("  missing", text))
    rows.append(("  file", f"{console.size(report.size_bytes)}, in {report.seconds:.1f} s"))
    return "".join(f"{label:12}{console.plain(text)}\n" for label, text in rows)
