"""The arguments of `qwenlora map`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora.map.terminal import COLOR_CHOICES
from qwenlora.merge.arguments import UsageError, add_blocks, one_of, options_of, source_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.blocks import BlockFactors

__all__ = ["Arguments", "UsageError", "parse"]

_ENDINGS = (".png", ".svg")
_MOST_MAPS = 8


@dataclass
class Arguments:
    """The parsed arguments.

    Attributes:
        sources: Files and PEFT folders with their strengths.
        blocks: Factors by block and kind, by the place of their source.
        output: The picture to write; None draws on the terminal.
        color: When the terminal's map is coloured.
        is_sum: Whether the sources are summed to one map.
        force: Whether a file that is there is replaced.
        is_json: Whether the maps are JSON.
        is_help: Whether the help is asked for.
    """

    sources: list[tuple[Path, float]] = field(default_factory=list)
    blocks: dict[int, BlockFactors] = field(default_factory=dict)
    output: Path | None = None
    color: str = "auto"
    is_sum: bool = False
    force: bool = False
    is_json: bool = False
    is_help: bool = False


def parse(args: Sequence[str]) -> Arguments:
    """Parse the arguments after `qwenlora map`.

    Raises:
        UsageError: They make no sense.
    """
    arguments = Arguments()
    for name, value in options_of(args, flags=_FLAGS, values=_VALUES):
        if not name:
            arguments.sources.append(source_of(value))
        elif name in _FLAGS:
            setattr(arguments, _FLAGS[name], True)
        elif name == "--blocks":
            add_blocks(arguments.blocks, arguments.sources, value)
        elif name == "--color":
            arguments.color = one_of(COLOR_CHOICES)(name, value)
        else:
            arguments.output = _picture(value)
    if not arguments.is_help:
        _check(arguments)
    return arguments


def _check(arguments: Arguments) -> None:
    if not arguments.sources:
        raise UsageError("no file is named")
    if arguments.is_json and arguments.output is not None:
        raise UsageError("`--json` and `--output` cannot be used together")
    zeros = [strength == 0 for _, strength in arguments.sources]
    if all(zeros) if arguments.is_sum else any(zeros):
        raise UsageError("at strength 0 nothing is changed: there is nothing to map")
    if not arguments.is_sum and len(zeros) > _MOST_MAPS:
        raise UsageError(
            f"{len(zeros)} maps are more than a picture holds: {_MOST_MAPS} at most"
            "\nhint: `--sum` draws one map of them all together"
        )


def _picture(value: str) -> Path:
    path = Path(value)
    if path.suffix.lower() not in _ENDINGS:
        raise UsageError(
            f"`{value}` does not end in {' or '.join(_ENDINGS)}\nhint: it tells the format"
        )
    return path


_FLAGS = {
    "--sum": "is_sum",
    "--force": "force",
    "-f": "force",
    "--json": "is_json",
    "--help": "is_help",
    "-h": "is_help",
}
"""Options without a value, and what they set."""
_VALUES = ("-o", "--output", "--blocks", "--color")
