"""`qwenlora-keys --map`: maps below the screens, of the files whose names are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwenlora import console
from qwenlora.errors import QwenLoraError
from qwenlora.map.terminal import COLOR_CHOICES, colors_of, draw
from qwenlora.merge.arguments import UsageError, options_of
from qwenlora.merge.folder import PEFT_WEIGHTS
from qwenlora.merge.talk import Talk
from qwenlora.requirements import RequirementError, require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["keys_with_map"]

_MAP = "--map"
_FLAGS = (_MAP, "--all", "--json", "--help", "-h", "--version", "-V")
_VALUES = ("--explain", "--color", "--completions")
_OTHERS = frozenset(("--json", "--explain", "--help", "-h", "--version", "-V", "--completions"))
"""Options with which there is no screen, and so no map."""
_LEAST_ERROR = 64
_UNAVAILABLE = 69
_UNWRITABLE = 74


def keys_with_map(args: Sequence[str], keys: Callable[[list[str]], int]) -> int:
    """Run `qwenlora-keys`, then draw maps if they are asked for.

    Args:
        args: Its arguments.
        keys: The program, which draws no maps.

    Returns:
        The program's exit status; 69 where what measures is missing, 74 where a map cannot be
        written.
    """
    try:
        options = list(options_of(args, flags=_FLAGS, values=_VALUES))
    except UsageError:
        # The program says what is wrong in its own words.
        return keys(list(args))
    names = {name for name, _ in options}
    if _MAP not in names or names & _OTHERS:
        return keys(list(args))
    status = keys(_without_map(args))
    if status >= _LEAST_ERROR:
        return status
    color = next((value for name, value in reversed(options) if name == "--color"), "auto")
    assert color in COLOR_CHOICES, "the program has refused any other"
    try:
        _draw([Path(value) for name, value in options if not name], color)
    except RequirementError as error:
        Talk().say("error", str(error))
        return _UNAVAILABLE
    except OSError as error:
        Talk().say("error", f"the map cannot be written: {error.strerror or error}")
        return _UNWRITABLE
    return status


def _without_map(args: Sequence[str]) -> list[str]:
    """The arguments for a program that draws no maps; behind `--` there are files alone."""
    end = args.index("--") if "--" in args else len(args)
    return [arg for arg in args[:end] if arg != _MAP] + list(args[end:])


def _draw(paths: Sequence[Path], color: str) -> None:
    require()
    from qwenlora.map.job import map_loras
    from qwenlora.spec import LoraSpec

    talk = Talk("measuring")
    maps = []
    for path in paths:
        if path.is_dir() and not any((path / name).is_file() for name in PEFT_WEIGHTS):
            talk.say("note", f"`{path}` is a folder: maps are drawn of files that are named")
            continue
        try:
            maps.append(map_loras([LoraSpec(path)], progress=talk.progress))
        except QwenLoraError as error:
            talk.say("note", f"no map of `{path}`: {str(error).partition(chr(10))[0]}")
        finally:
            talk.erase()
    if maps:
        console.write("\n" + draw(maps, colors_of(color)))
