"""The arguments of `qwenlora norms`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora.merge.arguments import UsageError, options_of, output_path

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Arguments", "UsageError", "parse"]

_ENDING = ".norms.safetensors"


@dataclass
class Arguments:
    """The parsed arguments.

    Attributes:
        checkpoint: A file, an index of several, or a folder.
        output: The file to write.
        force: Whether a file that is there is replaced.
        is_json: Whether the report is JSON.
        is_help: Whether the help is asked for.
    """

    checkpoint: Path = Path()
    output: Path = Path()
    force: bool = False
    is_json: bool = False
    is_help: bool = False


def parse(args: Sequence[str]) -> Arguments:
    """Parse the arguments after `qwenlora norms`.

    Raises:
        UsageError: They make no sense.
    """
    arguments = Arguments()
    named: list[str] = []
    output: str | None = None
    for name, value in options_of(args, flags=_FLAGS, values=("-o", "--output")):
        if not name:
            named.append(value)
        elif name in _FLAGS:
            setattr(arguments, _FLAGS[name], True)
        else:
            output = value
    if not arguments.is_help:
        arguments.checkpoint = _only(named)
        arguments.output = _default(arguments.checkpoint) if output is None else output_path(output)
    return arguments


def _only(named: Sequence[str]) -> Path:
    if not named:
        raise UsageError("no checkpoint is named")
    if len(named) > 1:
        raise UsageError(
            f"one checkpoint at a time, got {len(named)}"
            "\nhint: of a checkpoint in several files name the index, or the folder"
        )
    return Path(named[0])


def _default(checkpoint: Path) -> Path:
    """The checkpoint's name with another ending, in the working folder."""
    name = checkpoint.resolve().name
    return Path(name.removesuffix(".index.json").removesuffix(".safetensors") + _ENDING)


_FLAGS = {
    "--force": "force",
    "-f": "force",
    "--json": "is_json",
    "--help": "is_help",
    "-h": "is_help",
}
"""Options without a value, and what they set."""
