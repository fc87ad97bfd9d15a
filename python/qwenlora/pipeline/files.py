"""The file that a caller means, found as diffusers does: a path, a folder, a name on the Hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwenlora.errors import LoraFileError, LoraNotFoundError, LoraReadError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenlora.spec import Source

__all__ = ["Request"]

_log = logging.getLogger("qwenlora")

_USUAL_NAME = "pytorch_lora_weights.safetensors"
_PEFT_NAME, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_READ = (".safetensors", ".sft")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_LORAS = ("scheduler", "optimizer", "checkpoint")
"""Parts of names of files that lie beside LoRAs and are none."""
_ON_THE_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


@dataclass(frozen=True)
class Request:
    """The arguments of diffusers' `load_lora_weights` that say which file is meant.

    Attributes:
        source: A path, a folder, the name of a repository on the Hub, or a state dict.
        weight_name: The file in the folder or repository.
        subfolder: The folder in it.
        hub: What `huggingface_hub` is told: `cache_dir`, `force_download`, `local_files_only`,
            `token`, `revision`.
    """

    source: Source
    weight_name: str | None = None
    subfolder: str | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def taken(cls, source: object, options: dict[str, Any]) -> Request:
        """Take the arguments that name a file out of a call's options.

        Raises:
            TypeError: The source is neither a path nor a state dict.
        """
        if not isinstance(source, (str, os.PathLike, Mapping)):
            raise TypeError(f"a LoRA is a path or a state dict, not {type(source).__name__}")
        weight_name, subfolder = (options.pop(key, None) for key in ("weight_name", "subfolder"))
        hub = {key: options.pop(key) for key in _HUB_OPTIONS if options.get(key) is not None}
        for key in (*_HUB_OPTIONS, "proxies", "use_safetensors", "low_cpu_mem_usage"):
            # What is left of these means nothing here: no pickle is read, no module is made.
            options.pop(key, None)
        return cls(source, weight_name, subfolder, hub)

    def found(self) -> Source:
        """The file, the PEFT folder, or a copy of the state dict.

        Raises:
            LoraNotFoundError: There is none.
            LoraReadError: The Hub did not give it.
            LoraFileError: A state dict holds what is no tensor.
        """
        if isinstance(self.source, Mapping):
            return _copied(self.source)
        place = Path(self.source)
        if place.is_file():
            return place
        if place.is_dir():
            return self._in_folder(place / (self.subfolder or ""))
        return self._on_the_hub(os.fspath(self.source))

    def _in_folder(self, folder: Path) -> Path:
        if self.weight_name is not None:
            file = folder / self.weight_name
            if not file.is_file():
                raise LoraNotFoundError(f"`{folder}` has no file `{self.weight_name}`")
            return folder if file.name == _PEFT_NAME and _has_config(folder) else file
        names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
        chosen = _chosen(names, folder)
        return folder if chosen == _PEFT_NAME and _has_config(folder) else folder / chosen

    def _on_the_hub(self, name: str) -> Path:
        if not _ON_THE_HUB.fullmatch(name) or name.endswith((*_READ, *_PICKLES)):
            raise LoraNotFoundError(f"`{name}` does not exist")
        try:
            from huggingface_hub import hf_hub_download
        except ImportError:
            raise LoraNotFoundError(
                f"`{name}` does not exist\nhint: to load it from the Hub, install huggingface_hub"
            ) from None
        inside = self.subfolder or ""
        file = self.weight_name or self._chosen_on_the_hub(name, inside)
        place = _downloaded(hf_hub_download, name, f"{inside}/{file}".lstrip("/"), self.hub)
        if file != _PEFT_NAME:
            return place
        try:
            config = f"{inside}/{_PEFT_CONFIG}".lstrip("/")
            return _downloaded(hf_hub_download, name, config, self.hub).parent
        except LoraNotFoundError:
            return place

    def _chosen_on_the_hub(self, name: str, inside: str) -> str:
        from huggingface_hub import constants, list_repo_files
        from huggingface_hub.errors import HFValidationError

        if self.hub.get("local_files_only") or constants.HF_HUB_OFFLINE:
            raise LoraNotFoundError(
                f"`{name}` is no local file, and the Hub is not asked which files it has"
                "\nhint: pass weight_name"
            )
        told = {key: self.hub[key] for key in ("token", "revision") if key in self.hub}
        try:
            files = [Path(file) for file in list_repo_files(name, **told)]
        except (HFValidationError, OSError) as error:
            raise LoraReadError(f"`{name}` is no local file, and the Hub says: {error}") from error
        return _chosen([file.name for file in files if file.parent == Path(inside)], name)


def _downloaded(download: Any, name: str, file: str, hub: Mapping[str, Any]) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(download(name, file, **hub))
    except EntryNotFoundError as error:
        raise LoraNotFoundError(f"`{name}` on the Hub has no `{file}`: {error}") from error
    except (HFValidationError, OSError) as error:
        raise LoraReadError(f"`{name}` is no local file, and the Hub says: {error}") from error


def _chosen(names: Sequence[str], where: object) -> str:
    """The file of a folder that diffusers would load: the usual name, else the first."""
    possible = [name for name in names if not any(part in name for part in _NO_LORAS)]
    weights = [name for name in possible if name.endswith(_READ)]
    usual = [name for name in weights if name.endswith(_USUAL_NAME)]
    # A pickle is named, so that whoever reads it can say how it is converted.
    found = usual or weights or [name for name in possible if name.endswith(_PICKLES)]
    if not found:
        raise LoraNotFoundError(f"`{where}` has no safetensors file\nhint: pass weight_name")
    if len(found) > 1:
        _log.warning(
            "`%s` has %d LoRA files: `%s` is loaded; weight_name chooses another",
            where,
            len(found),
            found[0],
        )
    return found[0]


def _has_config(folder: Path) -> bool:
    return (folder / _PEFT_CONFIG).is_file()


def _copied(tensors: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Tensors of our own on the host: what the caller does with theirs later changes nothing."""
    copied = {}
    # They outlive the call, and inference tensors do not count their changes.
    with torch.inference_mode(False), torch.no_grad():
        for key, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise LoraFileError(
                    f"`{key}` is {type(tensor).__name__}: a state dict holds tensors"
                )
            same = tensor.is_meta or tensor.layout is not torch.strided
            copied[key] = tensor if same else tensor.detach().to("cpu", copy=True)
    return copied
