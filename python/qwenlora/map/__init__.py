"""`qwenlora map`: a picture of where a LoRA acts, and how strongly.

Reached through `qwenlora.cli`. `arguments` parses, `job` reads and `energy` measures; `change` is
what was found, `grid` and `scale` give it a place and a colour. `scene` is the picture, which `svg`
and `png` draw; `terminal` has its own. `keys` draws below the screens of `qwenlora-keys`.
"""

from __future__ import annotations

import json
from enum import IntEnum
from typing import TYPE_CHECKING

from qwenlora import console
from qwenlora.errors import NothingToApplyError, OtherModelError, OutputError, QwenLoraError
from qwenlora.map.arguments import UsageError, parse
from qwenlora.merge import ending_on_sigterm
from qwenlora.merge.talk import Talk
from qwenlora.requirements import RequirementError, require
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qwenlora.map.arguments import Arguments
    from qwenlora.map.change import DeltaMap

__all__ = ["Exit", "main"]

HELP = """\
Draws where LoRA files act, and how strongly: blocks by kinds of layer, on a
logarithmic scale. Needs no model and no GPU: sizes follow from the factors.

Usage: qwenlora map FILE[:STRENGTH]... [-o PICTURE] [OPTIONS]

Several files give maps one below the other, on one scale. A file is a
.safetensors or .sft file, or a PEFT folder; its strength is 1 unless given.

Options:
  -o, --output PICTURE      write a picture: .svg, or .png, which needs Pillow;
                            without it the map is drawn on the terminal
      --sum                 one map of all files together, at their strengths
      --blocks FACTORS      factors for the file before it, by block and kind of
                            layer: `0-19:1, 20-39:0.5; mod:0`
      --color WHEN          auto (a terminal without NO_COLOR), always or never
  -f, --force               replace the picture if it exists
      --json                each map as one JSON object, a line each (schema 1)
  -h, --help                this text

The number of a module is the rms of its delta, in shares of the rms that a
weight of its width typically has, 1 / sqrt(inputs). Deltas that are made of
the base weight, as DoRA's and OFT's, have no size without it, and are hatched.

Exit status:
   0  the size of all that is trained is in the maps
   1  some of it is hatched, not applied or damaged
   2  a file is for another model, or nothing of it is applied; no map
   3  a file cannot be read, or is damaged; no map
  64  the arguments make no sense
  69  torch, numpy or safetensors is missing or too old
  74  the picture, or the map, cannot be written

Examples:
  qwenlora map style.safetensors
  qwenlora map style.safetensors other.safetensors -o both.svg
  qwenlora map style.safetensors:0.8 lightning.safetensors --sum -o stack.png
"""


class Exit(IntEnum):
    """Exit statuses of `qwenlora map`; equal to those of `qwenlora merge`."""

    COMPLETE = 0
    PARTIAL = 1
    REJECTED = 2
    UNREADABLE = 3
    USAGE = 64
    UNAVAILABLE = 69
    OUTPUT = 74
    INTERRUPTED = 130


_SCHEMA = 1
_REJECTED = (NothingToApplyError, OtherModelError)


def main(args: Sequence[str] | None = None) -> int:
    """Draw maps.

    Args:
        args: The arguments after `qwenlora map`.

    Returns:
        The exit status, an `Exit`.
    """
    talk = Talk("measuring")
    try:
        arguments = parse(list(args or ()))
        if arguments.is_help:
            console.write(HELP)
            return Exit.COMPLETE
        with ending_on_sigterm():
            return _run(arguments, talk)
    except UsageError as error:
        talk.say_usage(error, "qwenlora map")
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
        talk.say("error", f"the map cannot be written: {error.strerror or error}")
        return Exit.OUTPUT
    except KeyboardInterrupt:
        talk.say("error", "interrupted")
        return Exit.INTERRUPTED


def _run(arguments: Arguments, talk: Talk) -> Exit:
    require()
    from qwenlora.merge.output import check_output

    if arguments.output is not None:
        sources = [path for path, _ in arguments.sources]
        check_output(arguments.output, sources, force=arguments.force)
    try:
        maps = _maps(arguments, talk)
    finally:
        talk.erase()
    if arguments.output is not None:
        _write(arguments.output, maps)
        console.write(f"{arguments.output}: {counted(len(maps), 'map')}\n")
    elif arguments.is_json:
        lines = (json.dumps({"schema": _SCHEMA, **own.to_document()}) for own in maps)
        console.write("".join(f"{line}\n" for line in lines))
    else:
        from qwenlora.map.terminal import colors_of, draw

        console.write(draw(maps, colors_of(arguments.color)))
    return Exit.COMPLETE if all(own.complete for own in maps) else Exit.PARTIAL


def _maps(arguments: Arguments, talk: Talk) -> list[DeltaMap]:
    from qwenlora.map.job import map_loras
    from qwenlora.spec import LoraSpec

    specs = [
        LoraSpec(path, strength, blocks=arguments.blocks.get(at))
        for at, (path, strength) in enumerate(arguments.sources)
    ]
    if arguments.is_sum:
        return [map_loras(specs, progress=talk.progress)]
    return [map_loras([spec], progress=talk.progress) for spec in specs]


def _write(output: Path, maps: Sequence[DeltaMap]) -> None:
    from qwenlora.map.scene import scene_of
    from qwenlora.merge.output import atomic_file, writing

    scene = scene_of(maps)
    if output.suffix.lower() == ".svg":
        from qwenlora.map.svg import to_svg

        data = to_svg(scene).encode("utf-8", "replace")
    else:
        from qwenlora.map.png import to_png

        data = to_png(scene)
    with atomic_file(output) as file, writing(output):
        file.write(data)
