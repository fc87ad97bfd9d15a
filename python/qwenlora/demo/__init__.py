"""`qwenlora demo`: compose real LoRA files into an emulated model and measure the error.

Reached through `qwenlora.cli`. The files are written with the tools that people use, in the light
form as those would; what they mean is computed from them in dense float64, without any code
of the engine.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora.demo.extra import MissingExtraError
from qwenlora.errors import QwenLoraError
from qwenlora.requirements import RequirementError, require

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_USAGE = """\
usage: qwenlora demo [--light] [--keep DIR]   compose LoRAs into an emulated model and
                                              measure the error

  --light      do without diffusers and peft: the files are written by safetensors alone,
               and no pipeline is run
  --keep DIR   write the LoRA files to DIR and leave them there
"""
_EXIT_USAGE = 64


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        args: The arguments after `qwenlora demo`.

    Returns:
        The exit status: 0 where everything is within bf16 rounding and the reset is bit-exact,
        1 where it is not or the demo could not run, 64 for arguments that are not understood.
    """
    args = list(args or ())
    if args in (["-h"], ["--help"]):
        sys.stdout.write(_USAGE)
        return 0
    parsed = _parse(args)
    if parsed is None:
        sys.stderr.write(_USAGE)
        return _EXIT_USAGE
    try:
        return _run(*parsed)
    except BrokenPipeError:
        # The reader has seen enough; what is still buffered must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MissingExtraError, RequirementError, QwenLoraError, OSError) as error:
        sys.stderr.write(f"qwenlora demo: {error}\n")
        return 1


def _parse(args: list[str]) -> tuple[bool, Path | None] | None:
    """Whether it is the light form, and the folder to keep; None where it makes no sense."""
    is_light, keep = False, None
    while args:
        arg = args.pop(0)
        if arg == "--light":
            is_light = True
        elif arg == "--keep" and args:
            keep = Path(args.pop(0))
        else:
            return None
    return is_light, keep


def _run(is_light: bool, keep: Path | None) -> int:
    require()
    from qwenlora.demo import course

    run = course.run_light if is_light else course.run
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        return run(keep, kept=True)
    with tempfile.TemporaryDirectory(prefix="qwenlora-demo-", ignore_cleanup_errors=True) as name:
        return run(Path(name), kept=False)
