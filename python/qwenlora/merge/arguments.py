"""The arguments of `qwenlora merge`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora.blocks import BlockFactors
from qwenlora.errors import BlockFactorsError
from qwenlora.source.module_names import SAFETENSORS_ENDINGS
from qwenlora.spec import LokrScale

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

__all__ = [
    "DTYPE_NAMES",
    "Arguments",
    "UsageError",
    "add_blocks",
    "one_of",
    "options_of",
    "output_path",
    "parse",
    "source_of",
]

DTYPE_NAMES = ("bf16", "fp16", "fp32")
"""The values that `--dtype` takes."""
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class UsageError(Exception):
    """Arguments that make no sense."""


@dataclass
class Arguments:
    """The parsed arguments.

    Attributes:
        sources: Files and PEFT folders with their strengths.
        blocks: Factors by block and kind, by the place of their source.
        output: The file to write.
        rank: Most ranks of a module.
        energy: Share of each module's energy to keep.
        dtype: One of `DTYPE_NAMES`; None is the sources' own.
        diffs: Whether deltas of biases, norms and tables are written, too.
        lokr_scale: The factor of a LoKr whose factors are both stored whole.
        base: The checkpoint that adapters such as DoRA are merged with.
        force: Whether a file that is there is replaced.
        is_json: Whether the report is JSON.
        is_help: Whether the help is asked for.
    """

    sources: list[tuple[Path, float]] = field(default_factory=list)
    blocks: dict[int, BlockFactors] = field(default_factory=dict)
    output: Path | None = None
    rank: int | None = None
    energy: float | None = None
    dtype: str | None = None
    diffs: bool = False
    lokr_scale: LokrScale = LokrScale.STANDARD
    base: Path | None = None
    force: bool = False
    is_json: bool = False
    is_help: bool = False


def parse(args: Sequence[str]) -> Arguments:
    """Parse the arguments after `qwenlora merge`.

    Raises:
        UsageError: They make no sense.
    """
    arguments = Arguments()
    for name, value in options_of(args, flags=_FLAGS, values=(*_VALUES, "--blocks")):
        if not name:
            arguments.sources.append(source_of(value))
        elif name in _FLAGS:
            setattr(arguments, _FLAGS[name], True)
        elif name == "--blocks":
            add_blocks(arguments.blocks, arguments.sources, value)
        else:
            attribute, read = _VALUES[name]
            setattr(arguments, attribute, read(name, value))
    if not arguments.is_help:
        _check(arguments)
    return arguments


def options_of(
    args: Sequence[str], *, flags: Container[str], values: Container[str]
) -> Iterator[tuple[str, str]]:
    """Options and their values, in order: ("", argument) for what is no option.

    Args:
        args: The arguments.
        flags: Options without a value; theirs is "".
        values: Options with one.

    Raises:
        UsageError: An option is unknown, lacks its value, or has one too many.
    """
    rest = list(args)
    while rest:
        name = rest.pop(0)
        if name == "--":
            yield from (("", own) for own in rest)
            return
        if not name.startswith("-") or name == "-":
            yield "", name
            continue
        name, has_value, value = name.partition("=") if name.startswith("--") else (name, "", "")
        if name in flags:
            if has_value:
                raise UsageError(f"`{name}` takes no value: `{value}`")
            yield name, ""
        elif name in values:
            if not has_value and not rest:
                raise UsageError(f"`{name}` needs a value")
            yield name, value if has_value else rest.pop(0)
        else:
            raise UsageError(
                f"unknown option: `{name}`\nhint: a file of this name is written `./{name}`"
            )


def _check(arguments: Arguments) -> None:
    if not arguments.sources:
        raise UsageError("no file is named")
    if arguments.output is None:
        raise UsageError("where to is not said\nhint: `-o merged.safetensors`")
    if arguments.rank is not None and arguments.energy is not None:
        raise UsageError("`--rank` and `--energy` cannot be used together")
    if all(strength == 0 for _, strength in arguments.sources):
        raise UsageError("every strength is 0: there is nothing to merge")


def add_blocks(
    blocks: dict[int, BlockFactors], sources: Sequence[tuple[Path, float]], text: str
) -> None:
    """Give factors by block to the source that is named before them.

    Args:
        blocks: The factors so far, by the place of their source.
        sources: The sources that are named so far.
        text: The factors.

    Raises:
        UsageError: They are of no form that is known, or for no source.
    """
    at = len(sources) - 1
    if at < 0:
        raise UsageError("`--blocks` stands behind the file that it is for")
    if at in blocks:
        raise UsageError(
            f"`--blocks` is given twice for `{sources[at][0]}`"
            "\nhint: one text has all factors, as `0-19:1, 20-39:0.5; mod:0`"
        )
    try:
        blocks[at] = BlockFactors.parse(text)
    except BlockFactorsError as error:
        raise UsageError(f"`--blocks`: {error}") from error


def source_of(text: str) -> tuple[Path, float]:
    r"""A path, and the strength behind its last colon where there is one.

    A colon may be the path's own, as in `C:\loras\a.safetensors`; what ends like a strength is
    one, unless only the whole names a file.

    Raises:
        UsageError: It is beyond any number, or a file's name ends in what is none.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or not head:
        return Path(text), 1.0
    if _NUMBER.fullmatch(tail):
        if Path(text).exists() and not Path(head).exists():
            return Path(text), 1.0
        strength = float(tail)
        if not math.isfinite(strength):
            raise UsageError(f"`{tail}` is no strength: it is beyond any number")
        return Path(head), strength
    if Path(head).exists() and not Path(text).exists():
        raise UsageError(
            f"`{tail}` is no strength, in `{text}`\nhint: a strength is a number such as 0.8 or -1"
        )
    return Path(text), 1.0


def output_path(value: str) -> Path:
    """The file to write.

    Raises:
        UsageError: It has another ending.
    """
    path = Path(value)
    if path.suffix.lower() not in SAFETENSORS_ENDINGS:
        raise UsageError(
            f"`{value}` does not end in {' or '.join(SAFETENSORS_ENDINGS)}"
            "\nhint: programs tell the format by the name"
        )
    return path


def _output(_: str, value: str) -> Path:
    return output_path(value)


def _path(_: str, value: str) -> Path:
    return Path(value)


def _rank(name: str, value: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", value) or int(value) == 0:
        raise UsageError(f"`{name}` is a whole number from 1: `{value}`")
    return int(value)


def _energy(name: str, value: str) -> float:
    share = float(value) if _NUMBER.fullmatch(value) else 0.0
    if not 0 < share <= 1:
        raise UsageError(f"`{name}` is a share above 0 and at most 1, as 0.99: `{value}`")
    return share


def one_of(values: Sequence[str]) -> Callable[[str, str], str]:
    """A reader of an option's value that is one of these words."""

    def read(name: str, value: str) -> str:
        if value not in values:
            *first, last = values
            raise UsageError(f"`{name}` is {', '.join(first)} or {last}: `{value}`")
        return value

    return read


def _lokr_scale(name: str, value: str) -> LokrScale:
    return LokrScale(one_of([scale.value for scale in LokrScale])(name, value))


_FLAGS = {
    "--diffs": "diffs",
    "--force": "force",
    "-f": "force",
    "--json": "is_json",
    "--help": "is_help",
    "-h": "is_help",
}
"""Options without a value, and what they set."""
_VALUES: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "--output": ("output", _output),
    "-o": ("output", _output),
    "--base": ("base", _path),
    "--rank": ("rank", _rank),
    "--energy": ("energy", _energy),
    "--dtype": ("dtype", one_of(DTYPE_NAMES)),
    "--lokr-scale": ("lokr_scale", _lokr_scale),
}
"""Options with a value: what they set, and how the value is read."""
