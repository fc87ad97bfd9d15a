"""The file that is written: checked before any work, whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qwenlora.errors import OutputError
from qwenlora.merge.folder import PEFT_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["atomic_file", "check_output", "writing"]

_PEFT_FILES = (*PEFT_WEIGHTS, "adapter_config.json")


def check_output(path: Path, sources: Sequence[Path], *, force: bool) -> None:
    """Say what stands against writing a file before any work is done for it.

    Args:
        path: The file to be.
        sources: Files and PEFT folders that are read.
        force: Whether a file that is there is replaced.

    Raises:
        OutputError: It must not, or cannot, be written.
    """
    with writing(path):
        if path.is_dir():
            raise OutputError(f"`{path}` is a folder\nhint: name the file in it")
        if not path.parent.is_dir():
            raise OutputError(f"there is no folder `{path.parent}`\nhint: make it first")
        if not path.exists():
            return
        if any(_is_of(source, path) for source in sources):
            raise OutputError(
                f"`{path}` is one of the sources\nhint: write to another name; to replace it, move"
                " the result there afterwards"
            )
        if not force:
            raise OutputError(f"`{path}` exists\nhint: `--force` replaces it")


def _is_of(source: Path, path: Path) -> bool:
    """Tell if `path` is the source, or a file in it if that is a PEFT folder, under any name."""
    files = (source, *(source / name for name in _PEFT_FILES))
    return any(file.exists() and file.samefile(path) for file in files)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while a file is written into an error that names it.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write `{path}`: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends; on any error nothing of it remains.

    It is written next to the one that it replaces, under a temporary name, and is on the disk
    before it takes the other's place. A link is followed: what it leads to is replaced.

    Raises:
        OutputError: It cannot be written.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".qwenlora-{secrets.token_hex(8)}.tmp")
    is_done = False
    try:
        with writing(path):
            file = beside.open("xb")
        with file:
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        with writing(path):
            beside.replace(path)
        is_done = True
        _sync_folder(path.parent)
    finally:
        if not is_done:
            try:
                beside.unlink(missing_ok=True)
            finally:
                # A second interrupt, while the first is cleaned up.
                beside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk, too, where a folder can be synchronised."""
    if os.name == "nt":
        return
    # Some network file systems refuse; the file itself is safe by then.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
