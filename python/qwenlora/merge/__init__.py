"""`qwenlora merge`: several LoRA files, of any kind, to one plain LoRA file.

Reached through `qwenlora.cli`. `arguments` parses, `plan` plans on the slots of the released model
that the sources are for, `job` goes through them, `combine` does the arithmetic, `writer` and
`output` write, `screen` shows.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from enum import IntEnum
from typing import TYPE_CHECKING

from qwenlora import console
from qwenlora.errors import (
    NothingToApplyError,
    OtherModelError,
    OutputError,
    QwenLoraError,
)
from qwenlora.merge.arguments import UsageError, parse
from qwenlora.merge.talk import Talk
from qwenlora.requirements import RequirementError, require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from qwenlora.merge.arguments import Arguments
    from qwenlora.merge.plan import MergeOptions

__all__ = ["Exit", "ending_on_sigterm", "main"]

HELP = """\
Adds LoRA files for Qwen-Image, or for Z-Image, each at its strength, and writes
one plain LoRA that ComfyUI, diffusers and qwenlora read alike. Needs no GPU and
no model.

Usage: qwenlora merge FILE[:STRENGTH] [--blocks TEXT]... -o FILE [OPTIONS]

A source is a .safetensors or .sft file of any trainer and kind (LoRA, LoKr,
LoHa, full), or a PEFT folder. Behind its last colon stands its strength, 1
where there is none; negative ones subtract. One source alone turns a LoKr, a
LoHa or a full delta into a plain LoRA.

Options:
  -o, --output FILE         the file to write; it must not exist
  -f, --force               replace it if it does
  --blocks TEXT             more factors for the file named before it, by block
                            and by kind of layer: `0-19:1, 20-39:0.5; mod:0`
                            (kinds: attn, mlp, mod, img, txt, rest)
  --base CHECKPOINT         the model, for what is made of its weights: DoRA,
                            GLoRA, IA3, HRA, OFT, BOFT and set_weight. A file,
                            an index of several or a folder of diffusers', in 16
                            bits or as Nunchaku quantizes it
  --rank N                  at most N ranks per module: the best such LoRA
  --energy SHARE            as few ranks per module as keep this share of its
                            energy, as 0.99
  --dtype bf16|fp16|fp32    of what is written; otherwise the narrowest that
                            holds the sources' values
  --diffs                   also write deltas of biases, norms and tables
                            (.diff_b, .diff): ComfyUI and qwenlora read them,
                            but diffusers refuses a file that has them
  --lokr-scale standard|network
                            LoKr of whole factors: scale 1, as its trainers
                            mean it, or ss_network_alpha / ss_network_dim
  --json                    the report as one JSON object (schema 1)
  -h, --help                this text

Without --rank and --energy the result is exact: ranks add up, equal halves are
shared, and only the rounding to the dtype is lost. LoKr of whole factors, full
deltas, DoRA, IA3, OFT and BOFT have full rank: exact files of them are large.
The energy of a delta is its squared Frobenius norm; what is lost is reported
and written into the file's metadata. There stand the sources' own entries, too:
those of one source as they were; of several what all agree on, and every
trigger phrase.

The file appears when it is whole: an error, a full disk or Ctrl-C leaves what
was there before. Memory stays near what one layer takes.

Exit status:
   0  all that the sources train is in the file
   1  a part is left out, as a text encoder's; the report says what and why
   2  nothing of a source can be merged, it is for a model that is not known, or
      for another one than the sources before it; no file
   3  a source cannot be read, is damaged, or too large for the dtype; no file
  64  the arguments make no sense
  69  torch, numpy or safetensors is missing or too old
  74  the file, or the report, cannot be written

Examples:
  qwenlora merge style.safetensors:0.8 C:\\loras\\b.safetensors -o ab.safetensors
  qwenlora merge lokr.safetensors -o plain.safetensors --energy 0.99
  qwenlora merge big.safetensors -o small.safetensors --rank 16 --dtype bf16
"""


class Exit(IntEnum):
    """Exit statuses of `qwenlora merge`; equal to those of `qwenlora-keys` where both have one."""

    MERGED = 0
    PARTIAL = 1
    REJECTED = 2
    UNREADABLE = 3
    USAGE = 64
    UNAVAILABLE = 69
    OUTPUT = 74
    INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Merge.

    Args:
        args: The arguments after `qwenlora merge`.

    Returns:
        The exit status, an `Exit`.
    """
    talk = Talk()
    try:
        arguments = parse(list(args or ()))
        if arguments.is_help:
            console.write(HELP)
            return Exit.MERGED
        with ending_on_sigterm():
            return _run(arguments, talk)
    except UsageError as error:
        talk.say_usage(error, "qwenlora merge")
        return Exit.USAGE
    except RequirementError as error:
        talk.say("error", str(error))
        return Exit.UNAVAILABLE
    except OSError as error:
        talk.say("error", _words(error))
        return Exit.UNREADABLE if _is_of_source(error) else Exit.OUTPUT
    except QwenLoraError as error:
        talk.say("error", str(error))
        is_rejected = isinstance(error, (NothingToApplyError, OtherModelError))
        return Exit.REJECTED if is_rejected else Exit.UNREADABLE
    except KeyboardInterrupt:
        talk.say("error", "interrupted")
        return Exit.INTERRUPTED


def _run(arguments: Arguments, talk: Talk) -> Exit:
    require()
    from qwenlora.merge.job import merge_loras
    from qwenlora.merge.screen import paint
    from qwenlora.spec import LoraSpec

    options = _options(arguments)
    assert arguments.output is not None, "`parse` requires it"
    try:
        report = merge_loras(
            [
                LoraSpec(path, strength, blocks=arguments.blocks.get(at))
                for at, (path, strength) in enumerate(arguments.sources)
            ],
            arguments.output,
            options,
            progress=talk.progress,
            note=lambda text: talk.say("note", text),
        )
    finally:
        talk.erase()
    console.write(report.to_json() + "\n" if arguments.is_json else paint(report, options.cut))
    return Exit.MERGED if report.complete else Exit.PARTIAL


def _options(arguments: Arguments) -> MergeOptions:
    import torch

    from qwenlora.merge.cut import Cut
    from qwenlora.merge.plan import MergeOptions

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}
    is_cut = arguments.rank is not None or arguments.energy is not None
    return MergeOptions(
        cut=Cut(rank=arguments.rank, energy=arguments.energy) if is_cut else None,
        dtype=dtypes[arguments.dtype],
        diffs=arguments.diffs,
        force=arguments.force,
        lokr_scale=arguments.lokr_scale,
        base=arguments.base,
    )


def _is_of_source(error: OSError) -> bool:
    return isinstance(error, QwenLoraError) and not isinstance(error, OutputError)


def _words(error: OSError) -> str:
    if isinstance(error, QwenLoraError):
        return str(error)
    return f"the report cannot be written: {error.strerror or error}"


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let a program that gets SIGTERM remove its unfinished file before it ends."""

    def end(_number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
