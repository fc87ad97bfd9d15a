"""Sources of others, named by whoever runs the tests, and a dense Z-Image with PEFT's LoRAs.

The sources are not part of this repository. `NUNCHAKU_SOURCE=FOLDER:FOLDER` names folders that have
a package `nunchaku` or `nunchaku_lite`, or are a checkout of ComfyUI-nunchaku. Compiled operations
alone are answered by the emulation, which checks each call.
"""

from __future__ import annotations

import copy
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from qwenlora import emulation
from qwenlora.emulation import Precision, ZImageForm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

SOURCE = "NUNCHAKU_SOURCE"
LITE = "nunchaku_lite"
NUNCHAKU = "nunchaku"
TRANSFORMERS = "nunchaku.models.transformers"
COMFYUI = Path("models", "zimage.py")
"""The file of ComfyUI-nunchaku's that has its Z-Image."""

_FOLDERS = [Path(folder) for folder in os.environ.get(SOURCE, "").split(os.pathsep) if folder]
PACKAGES = [
    folder for folder in _FOLDERS if (folder / LITE).is_dir() or (folder / NUNCHAKU).is_dir()
]
"""Folders with a package."""
PACKS = [one for one in _FOLDERS if (one / COMFYUI).is_file()]
"""Folders with ComfyUI-nunchaku."""
assert len(PACKAGES) + len(PACKS) == len(_FOLDERS), f"{SOURCE} names what is not known: {_FOLDERS}"

WARNINGS = (
    # Nunchaku's way to pad, of which PyTorch warns.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
    # PEFT's, of every second adapter.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
)
"""Marks of tests that run these sources."""

RANK = 32
RANKS = {"first": 4, "second": 20}
STRENGTHS = (0.7, -0.4)
LISTS = ("noise_refiner", "context_refiner", "layers")

BOUND = 2e-6
"""Relative error of an output in float32; measured: 5.8e-7."""
EPSILON_BOUND = 1e-5
"""The same against diffusers' norms, which have another epsilon; measured: 3.7e-6."""
COMPOSED_BOUND = 3e-6
"""The same with LoRAs, against PEFT on the dense model; measured: 8.6e-7."""
DELTA_BOUND = 1e-5
"""Relative error of what LoRAs change in an output; measured: 2.3e-6."""

_BARE = (NUNCHAKU, "nunchaku.models", TRANSFORMERS, "nunchaku.models.unets")
"""Packages whose own file is not run: it imports models that need what is not installed."""


@contextmanager
def sources(folder: Path, kernels: object) -> Iterator[None]:
    """Make a folder's package importable, over these kernels."""
    package = LITE if (folder / LITE).is_dir() else NUNCHAKU
    others = _taken(package)
    for name in _BARE if package != LITE else ():
        bare = types.ModuleType(name)
        bare.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = bare
    compiled: Any = types.ModuleType(f"{package}._C")
    compiled.ops = kernels
    sys.modules[compiled.__name__] = compiled
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _taken(package)
        sys.modules.update(others)


def _taken(package: str) -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def widen(model: nn.Module) -> None:
    """Make room for weights that are not rounded."""
    for module in model.modules():
        if type(module).__name__ == "SVDQW4A4Linear":
            shape = (module.out_features, module.in_features)
            module.qweight = nn.Parameter(torch.empty(shape), requires_grad=False)


def emulated(dense: Any, form: ZImageForm, precision: Precision, **options: bool) -> Any:
    return emulation.z_image_transformer(
        dense, form=form, rank=RANK, precision=precision, dtype=torch.float32, **options
    )


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def parameters(model: nn.Module) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, one.dtype, one.shape) for name, one in model.named_parameters()]


class Trained:
    """A dense model with adapters of PEFT's on all linears, and their files.

    Attributes:
        files: One for each adapter, as diffusers saves it.
    """

    def __init__(self, dense: Any, folder: Path) -> None:
        from peft import LoraConfig

        self._model = copy.deepcopy(dense)
        linears = [n for n, module in dense.named_modules() if isinstance(module, nn.Linear)]
        generator = torch.Generator().manual_seed(8)
        self.files = []
        for name, rank in RANKS.items():
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears)
            self._model.add_adapter(config, adapter_name=name)
            for path, parameter in self._model.named_parameters():
                if f".{name}." in path:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data = 0.3 * noise * parameter.shape[1] ** -0.5
            self.files.append(folder / name / "pytorch_lora_weights.safetensors")
            self._model.save_lora_adapter(folder / name, adapter_name=name)

    def output(
        self,
        arguments: tuple[Any, ...],
        epsilons: Mapping[str, float],
        strengths: Sequence[float] = STRENGTHS,
    ) -> Tensor:
        """The first sample's output, with these epsilons of norms of query and key by list."""
        for name, epsilon in epsilons.items():
            for block in getattr(self._model, name):
                block.attention.norm_q.eps = block.attention.norm_k.eps = epsilon
        self._model.set_adapters(list(RANKS), list(strengths))
        return self._model(*arguments, return_dict=False)[0][0]
