"""An adapter written to a file again, as it was loaded."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwenlora.errors import LoraReadError, OutputError

if TYPE_CHECKING:
    from qwenlora.pipeline.adapter import Adapter

__all__ = ["SaveFunction", "save_adapter"]

SaveFunction = Callable[[dict[str, torch.Tensor], str], Any]
"""Writes tensors to a path."""

_log = logging.getLogger("qwenlora")

_USUAL_NAME = "pytorch_lora_weights.safetensors"
_PEFT_NAME, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    *,
    weight_name: str | None,
    save_function: SaveFunction | None,
    upcast: bool,
) -> Path:
    """Write an adapter's tensors under the keys that they have, with the metadata of its file.

    A PEFT folder is written as one: its scale stands in its configuration.

    Args:
        adapter: The adapter; its weight is not written.
        folder: Where to; it is made where it is not there.
        weight_name: Name of the file; by default diffusers' usual one, in a PEFT folder PEFT's.
        save_function: What writes the tensors instead, given a dict and a path.
        upcast: Whether tensors become float32.

    Raises:
        OutputError: It cannot be written.
        LoraReadError: The file that was loaded is not there any more, or is another.
    """
    folder = Path(folder)
    if folder.is_file():
        raise OutputError(f"`{folder}` is a file\nhint: pass a folder")
    source = adapter.spec.source
    held = None if isinstance(source, Mapping) else Path(source)
    config = None if held is None or not held.is_dir() else held / _PEFT_CONFIG
    name = weight_name or (_USUAL_NAME if config is None else _PEFT_NAME)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        if held is None:
            assert isinstance(source, Mapping)
            _write(dict(source), {}, target, save_function, upcast)
        else:
            # Also tells that it is the file that was loaded.
            adapter.source.open().close()
            file = held if config is None else held / _PEFT_NAME
            _write_again(file, target, save_function, upcast)
        if config is not None and not _same_file(config, folder / _PEFT_CONFIG):
            shutil.copyfile(config, folder / _PEFT_CONFIG)
    except LoraReadError:
        raise
    except OSError as error:
        raise OutputError(f"`{folder}` cannot be written: {error}") from error
    _log.info("`%s` saved in %s", adapter.name, target)
    return target


def _write_again(
    file: Path, target: Path, save_function: SaveFunction | None, upcast: bool
) -> None:
    if save_function is None and not upcast:
        if not _same_file(file, target):
            shutil.copyfile(file, target)
        return
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        metadata = opened.metadata() or {}
    _write(tensors, metadata, target, save_function, upcast)


def _write(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    target: Path,
    save_function: SaveFunction | None,
    upcast: bool,
) -> None:
    if upcast:
        tensors = {
            key: tensor.float() if tensor.is_floating_point() else tensor
            for key, tensor in tensors.items()
        }
    if save_function is not None:
        save_function(tensors, target.as_posix())
        return
    # Tensors of one storage cannot be written as they are.
    apart = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(apart, target, metadata={"format": "pt", **metadata})


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)
