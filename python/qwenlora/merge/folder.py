"""Folders that are named as sources: what lies in one that is no PEFT folder of safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenlora.errors import LoraFileError, LoraReadError, PickleFileError
from qwenlora.source.module_names import SAFETENSORS_ENDINGS
from qwenlora.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["PEFT_WEIGHTS", "check_folder", "folder_notes"]

_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = "adapter_model.safetensors"
PEFT_WEIGHTS = (_WEIGHTS, "adapter_model.sft")
"""Names of the weights in a folder that PEFT saved."""
_PICKLED_WEIGHTS = "adapter_model.bin"
_RUNS_CODE = "a pickle can run any code while it loads, and is not read"


def check_folder(path: Path) -> None:
    """Say what a folder holds that is named as a source and has no weights to read.

    A file, and what is not there, is left to whoever opens it.

    Raises:
        PickleFileError: It holds pickles only.
        LoraFileError: It is no PEFT folder.
        LoraReadError: It cannot be listed.
    """
    if not path.is_dir() or any((path / name).is_file() for name in PEFT_WEIGHTS):
        return
    try:
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
    except OSError as error:
        raise LoraReadError(f"cannot list `{path}`: {error.strerror or error}") from error
    loras, pickles = _ending_in(names, SAFETENSORS_ENDINGS), _ending_in(names, _PICKLE_ENDINGS)
    beside = f", and {counted(len(pickles), 'pickle')}" if pickles else ""
    if loras:
        raise LoraFileError(
            f"`{path}` is a folder without `{_WEIGHTS}`: it holds"
            f" {counted(len(loras), 'LoRA file')}{beside}"
            f"\nhint: name the file itself: `{path / loras[0]}`"
        )
    if _PICKLED_WEIGHTS in names:
        raise PickleFileError(
            f"`{path}` has its weights in `{_PICKLED_WEIGHTS}`: {_RUNS_CODE}{_hint(path)}"
        )
    if pickles:
        raise PickleFileError(
            f"`{path}` holds {counted(len(pickles), 'pickle')}, e.g. `{pickles[0]}`, and no LoRA"
            f" file: {_RUNS_CODE}\nhint: convert each to safetensors and name the results"
        )
    raise LoraFileError(
        f"`{path}` is a folder without `{_WEIGHTS}`, or any other LoRA file"
        "\nhint: name the LoRA file itself, or the folder that PEFT saved"
    )


def folder_notes(path: Path) -> Iterator[str]:
    """Notes on a folder that is read: it also holds pickled weights, which are not read."""
    if (
        any((path / name).is_file() for name in (PEFT_WEIGHTS))
        and (path / _PICKLED_WEIGHTS).is_file()
    ):
        yield f"`{path}` holds `{_PICKLED_WEIGHTS}`, too: it is a pickle, and is not read"


def _hint(path: Path) -> str:
    return (
        '\nhint: convert it once: `python -c "import torch, safetensors.torch as st;'
        f" st.save_file(torch.load('{_PICKLED_WEIGHTS}', weights_only=True), '{_WEIGHTS}')\"`"
        f" in `{path}`"
    )


def _ending_in(names: list[str], endings: tuple[str, ...]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(endings))
