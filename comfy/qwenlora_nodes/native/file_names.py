"""The file that tensors were loaded from, which ComfyUI does not tell.

The prompt that runs names files; the one that holds these very bytes is the one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .. import host

__all__ = ["file_name"]

_ENDINGS = (".safetensors", ".sft")
_MAX_DEPTH = 4
"""Of names inside an input: rows are dicts in lists."""


def file_name(tensors: Iterable[torch.Tensor]) -> str | None:
    """The name, without folders and ending, of the file that the prompt names and these are of."""
    probe = next((own for own in tensors if own.ndim > 0 and own.numel() > 1 and own.any()), None)
    if probe is None:
        return None
    names = dict.fromkeys(
        name
        for prompt in host.running_prompts()
        for node in prompt.values()
        for name in _names_in(node.get("inputs"), _MAX_DEPTH)
    )
    found = next((name for name in names if _holds(name, probe)), None)
    return None if found is None else PurePath(found.replace("\\", "/")).stem


def _names_in(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        if value.endswith(_ENDINGS):
            yield value
        return
    inner: Iterable[Any] = ()
    if depth and isinstance(value, Mapping):
        inner = value.values()
    elif depth and isinstance(value, (list, tuple)):
        inner = value
    for own in inner:
        yield from _names_in(own, depth - 1)


def _holds(name: str, probe: torch.Tensor) -> bool:
    """Tell if a LoRA file holds a tensor, by its values."""
    path = host.find_lora(name)
    if path is None:
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(_is_in(file, key, probe) for key in file.keys())
    except (SafetensorError, OSError):
        # Whoever loads it says what is wrong with it.
        return False


def _is_in(file: Any, key: str, probe: torch.Tensor) -> bool:
    rows = file.get_slice(key)
    if list(rows.get_shape()) != list(probe.shape):
        return False
    # One row is read before all of them are.
    first = rows[:1]
    own = probe.detach().cpu()
    same = first.dtype == own.dtype and torch.equal(first, own[:1])
    return same and torch.equal(file.get_tensor(key), own)
