"""The command that installs the wheel in ComfyUI's own Python, and the sentences that name it.

Needs nothing but Python's own library: it speaks where the package is missing.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path, PurePath
from typing import NamedTuple

from .fitting import Fit, Interpreter, fit_of, running_interpreter
from .mend import Run, Shell, spell
from .version import __version__

__all__ = ["Place", "advice", "here"]

_EMBEDDED = "python_embeded"
_REQUIREMENTS = "requirements.txt"
_SOURCES = "Cargo.toml"
_PACKAGE = "qwenlora"


class Place(NamedTuple):
    """Where the nodes run, as far as commands name it.

    Attributes:
        python: The executable.
        has_pip: Whether it has pip; environments of uv have none.
        shell: The shell that a person types into.
        requirements: The pack's own file; None where the nodes came without.
        sources: The clone that the wheel can be built from; None where there is none.
        interpreter: The Python.
    """

    python: PurePath
    has_pip: bool
    shell: Shell
    requirements: PurePath | None
    sources: PurePath | None
    interpreter: Interpreter


def here() -> Place:
    """The place where this runs."""
    nodes = Path(__file__).parent
    # Linked into custom_nodes, the pack's folder may be the one or the other.
    packs = [own.parent.parent for own in (nodes, nodes.resolve()) if own.parent.name == "comfy"]

    def first(name: str) -> Path | None:
        return next((pack / name for pack in packs if (pack / name).is_file()), None)

    sources = first(_SOURCES)
    return Place(
        python=Path(sys.executable),
        # On the path alone: a finder of setuptools takes a look for pip for pip's own start, and
        # throws `distutils` out of the process.
        has_pip=PathFinder.find_spec("pip") is not None,
        shell=Shell.current(),
        requirements=first(_REQUIREMENTS),
        sources=sources and sources.parent,
        interpreter=running_interpreter(),
    )


def advice(place: Place, *options: str) -> str:
    """What to install and the command for it, as sentences of one line.

    Args:
        place: Where the nodes run.
        *options: More words for pip, such as `--upgrade`.
    """
    fit = fit_of(place.interpreter, __version__)
    if not fit.file and not fit.is_built:
        return f"{fit.text}."
    folder, command = _command(place, fit, options)
    return f"{fit.text}. Run this{folder}, then restart ComfyUI: {command}"


def _command(place: Place, fit: Fit, options: tuple[str, ...]) -> tuple[str, str]:
    """Where to run the command, if that counts, and the command."""
    what: tuple[str | PurePath, ...] = (_PACKAGE,)
    if fit.is_built:
        what = (place.sources or _PACKAGE,)
    elif place.requirements is not None:
        what = ("-r", place.requirements)
    python = place.python
    if python.parent.name == _EMBEDDED:
        return _portable_command(place, ("install", *options, *what))
    argv = ["install", *options, *map(str, what)]
    if place.has_pip:
        return "", spell(Run((str(python), "-m", "pip", *argv)), place.shell)
    verb, *rest = argv
    return "", spell(Run(("uv", "pip", verb, "--python", str(python), *rest)), place.shell)


def _portable_command(place: Place, argv: tuple[str | PurePath, ...]) -> tuple[str, str]:
    """The command of the portable build, as its own scripts spell theirs: from its folder."""
    root = place.python.parent.parent
    words = [_below(root, word) if isinstance(word, PurePath) else word for word in argv]
    # Written out: a path of Python's would drop the point. The build is of Windows alone.
    python = f".\\{place.python.relative_to(root)}"
    # `-s` keeps out what the user has installed elsewhere, as its scripts do.
    line = spell(Run((python, "-s", "-m", "pip", *words)), place.shell)
    return f" in {root}", line


def _below(root: PurePath, path: PurePath) -> str:
    try:
        return str(path.relative_to(root))
    except ValueError:
        return str(path)
