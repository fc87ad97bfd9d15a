"""The arguments of `qwenlora norms`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora.merge.arguments import UsageError
from qwenlora.source.module_names import SAFETENSORS_ENDINGS

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
    arguments, rest = Arguments(), list(args)
    named: list[str] = []
    output: str | None = None
    while rest:
        name = rest.pop(0)
        if name == "--":
            named += rest
            break
        if not name.startswith("-") or name == "-":
            named.append(name)
            continue
        name, has_value, value = name.partition("=") if name.startswith("--") else (name, "", "")
        if name in _FLAGS:
            if has_value:
                raise UsageError(f"`{name}` takes no value: `{value}`")
            setattr(arguments, _FLAGS[name], True)
        elif name in ("-o", "--output"):
            if not has_value and not rest:
                raise UsageError(f"`{name}` needs a value")
            output = value if has_value else rest.pop(0)
        else:
            raise UsageError(
                f"unknown option: `{name}`\nhint: a file of this name is written `./{name}`"
            )
    if not arguments.is_help:
        arguments.checkpoint = _only(named)
        arguments.output = _default(arguments.checkpoint) if output is None else _output(output)
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


def _output(value: str) -> Path:
    path = Path(value)
    if path.suffix.lower() not in SAFETENSORS_ENDINGS:
        raise UsageError(
            f"`{value}` does not end in {' or '.join(SAFETENSORS_ENDINGS)}"
            "\nhint: programs tell the format by the name"
        )
    return path


_FLAGS = {
    "--force": "force",
    "-f": "force",
    "--json": "is_json",
    "--help": "is_help",
    "-h": "is_help",
}
"""Options without a value, and what they set."""
