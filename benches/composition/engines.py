"""What composes: qwenlora, an existing loader where its sources are at hand, and the plain way."""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from composition.shapes import slots
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide

Stack = Sequence[tuple[Path, float]]


class Engine(Protocol):
    """Brings a model to a stack and back, in its own way."""

    name: str

    def compose(self, model: nn.Module, stack: Stack) -> None:
        """Bring the model to this stack."""

    def reset(self, model: nn.Module) -> None:
        """Bring the model to its base."""


class Repack:
    """Unpack, join, repack: what a loader does that knows the packed layout only as a whole.

    It reads the file each time, layer by layer, and writes nothing to the model.
    """

    name = "repack"

    def compose(self, model: nn.Module, stack: Stack) -> None:
        """Make the tensors of every slot and drop them."""
        files = [(load_file(path), strength) for path, strength in stack]
        for slot, names in slots(len(model.transformer_blocks)).items():
            self._join(model.get_submodule(slot), names, files)

    def reset(self, model: nn.Module) -> None:
        """Nothing was written."""

    def _join(self, layer: Any, names: Sequence[str], files: list[Any]) -> None:
        downs = [pack.unpack_lowrank(layer.proj_down, LowRankSide.DOWN)]
        ups = [pack.unpack_lowrank(layer.proj_up, LowRankSide.UP)]
        for tensors, strength in files:
            keys = [f"diffusion_model.{name}" for name in names]
            if f"{keys[0]}.lora_A.weight" not in tensors:
                continue
            # Scaled on the host: the factors have left the file there.
            parts = []
            for key in keys:
                down, up = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
                scale = strength * float(tensors[f"{key}.alpha"]) / down.shape[0]
                downs.append(down.to(layer.proj_down.device))
                parts.append((up * scale).to(layer.proj_up.device))
            ups.append(torch.block_diag(*parts))
        pack.pack_lowrank(torch.cat(downs), LowRankSide.DOWN)
        pack.pack_lowrank(torch.cat(ups, dim=1), LowRankSide.UP)


class Peer:
    """The existing ComfyUI loader, from a folder that holds its sources and Nunchaku's.

    The folder holds `nunchaku_code/lora_qwen.py` of ComfyUI-QwenImageLoraLoader and, of Nunchaku,
    `nunchaku/utils.py` and `nunchaku/lora/flux/{nunchaku_converter,packer,utils}.py`. Whatever else
    they import is stood in for; nothing of it takes part in composing.
    """

    name = "existing"

    def __init__(self, folder: Path, device: str) -> None:
        self._api = _import_peer(folder, torch.device(device))

    def compose(self, model: nn.Module, stack: Stack) -> None:
        """As its node does before a forward."""
        with torch.no_grad():
            self._api.compose_loras_v2(model, [(str(path), strength) for path, strength in stack])

    def reset(self, model: nn.Module) -> None:
        """As its node does without LoRAs."""
        with torch.no_grad():
            self._api.reset_lora_v2(model)

    def require_applied(self, model: nn.Module, layers: int) -> None:
        """Raise where it has left layers out: its times would mean nothing.

        Raises:
            RuntimeError: It has.
        """
        found = len(getattr(model, "_lora_slots", {}))
        if found != layers:
            raise RuntimeError(f"the existing loader composed {found} layers of {layers}")


def _import_peer(folder: Path, device: torch.device) -> Any:
    """Import the loader with stand-ins for the packages around what it uses."""
    if not (folder / "nunchaku_code" / "lora_qwen.py").is_file():
        raise SystemExit(f"--peer: {folder} has no nunchaku_code/lora_qwen.py")
    warnings.filterwarnings("ignore", message="Using a non-tuple sequence")
    # Their lines and progress bars on the terminal would be measured, too.
    logging.getLogger("nunchaku_code").setLevel(logging.ERROR)
    _stand_in("tqdm", tqdm=lambda iterable, **_: iterable)
    # Packages without their __init__, which would import the whole of Nunchaku.
    for package in ("nunchaku", "nunchaku.lora", "nunchaku.lora.flux"):
        stand_in = _stand_in(package)
        stand_in.__path__ = [str(folder.joinpath(*package.split(".")))]
    _stand_in("nunchaku.lora.flux.diffusers_converter", to_diffusers=None)
    _stand_in("huggingface_hub", hf_hub_download=None)
    comfy = _stand_in("comfy")
    comfy.utils = _stand_in("comfy.utils", load_torch_file=load_file)
    comfy.model_management = _stand_in("comfy.model_management", get_torch_device=lambda: device)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("nunchaku_code.lora_qwen")
    finally:
        sys.path.remove(str(folder))


def _stand_in(name: str, **members: object) -> Any:
    module = types.ModuleType(name)
    # Torch looks packages up by their specs.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    sys.modules[name] = module
    return module
