"""The folder of LoRA files, which all replicas see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RequestError

if TYPE_CHECKING:
    from .stack import Stack

__all__ = ["Folder"]

_ENDING = ".safetensors"
_NOT_FOUND = 404


class Folder:
    """LoRA files by name: `painters/style` is `painters/style.safetensors` below the folder."""

    def __init__(self, path: Path) -> None:
        """Take the folder.

        Raises:
            NotADirectoryError: It is none.
        """
        if not path.is_dir():
            raise NotADirectoryError(f"the folder of LoRAs is not there: {path}")
        self._path = path

    def names(self) -> list[str]:
        """Names of all files, sorted."""
        found = (path.relative_to(self._path) for path in self._path.rglob(f"*{_ENDING}"))
        return sorted(path.as_posix().removesuffix(_ENDING) for path in found)

    def path(self, name: str) -> Path:
        """The file of a name that a `Stack` has checked."""
        return self._path / f"{name}{_ENDING}"

    def check(self, stack: Stack) -> None:
        """Check that all files of a stack are there.

        Raises:
            RequestError: Some are not.
        """
        missing = [name for name, _ in stack.loras if not self.path(name).is_file()]
        if missing:
            raise RequestError(
                _NOT_FOUND, f"no such LoRA: {', '.join(missing)}; GET /loras lists what is there"
            )
