"""Z-Image of Nunchaku's and nunchaku-lite's own Python classes, unmodified, on a CPU.

Their sources are not part of this repository. Folders that have a package `nunchaku` or
`nunchaku_lite` are named by whoever runs the tests: `NUNCHAKU_SOURCE=FOLDER:FOLDER`. Their compiled
operations alone are answered by the emulation, which checks each call.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from qwenlora import emulation
from qwenlora.emulation import Precision, ZImageForm
from qwenlora.emulation.lite_kernels import LiteKernels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SOURCE = "NUNCHAKU_SOURCE"
FOLDERS = [Path(folder) for folder in os.environ.get(SOURCE, "").split(os.pathsep) if folder]

pytestmark = [
    pytest.mark.skipif(
        not FOLDERS,
        reason=f"needs {SOURCE}: folders with a package `nunchaku` or `nunchaku_lite`",
    ),
    # Nunchaku's way to pad, of which PyTorch warns.
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]

RANK = 32
BOUND = 2e-6
"""Relative error of an output in float32; measured: 0."""
EPSILON_BOUND = 1e-5
"""The same against diffusers' norms, whose epsilon is not the fused kernel's; measured: 3.4e-6."""

ROUNDED_BOUND = 1e-3
"""The same in 4 bits; measured: 0."""

BARE = ("nunchaku", "nunchaku.models", "nunchaku.models.transformers", "nunchaku.models.unets")
"""Packages whose own file is not run: it imports models that need what is not installed."""
LITE = "nunchaku_lite"


class Peer:
    """One folder's classes.

    Attributes:
        form: The form of the models that they build.
        module: Where they are.
        kernels: What answers their compiled operations.
    """

    def __init__(self, folder: Path, kernels: Any) -> None:
        self.kernels = kernels
        self._is_lite = (folder / LITE).is_dir()
        if self._is_lite:
            self.module = _imported(LITE, "adapters.z_image")
            self.form = ZImageForm.PASSED
            return
        self.module = _imported("nunchaku", "models.transformers.transformer_zimage")
        is_fused = hasattr(self.module, "NunchakuZImageFusedModule")
        self.form = ZImageForm.FUSED if is_fused else ZImageForm.CALLED

    def model(self, dense: Any, state: dict[str, Tensor], *, quantized_refiners: bool) -> Any:
        """Build a model as it is loaded, of a checkpoint in one dtype."""
        build = self._patched_by_lite if self._is_lite else self._patched
        dtype = state["x_pad_token"].dtype
        model = build(dense, dtype, skip_refiners=not quantized_refiners)
        if getattr(self.kernels, "precision", None) is Precision.EXACT:
            _widen(model)
        model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    def _patched(self, dense: Any, dtype: torch.dtype, *, skip_refiners: bool) -> Any:
        with torch.device("meta"):
            model = self.module.NunchakuZImageTransformer2DModel.from_config(dense.config)
        model = nn.Module.to(model, dtype)
        model._patch_model(skip_refiners=skip_refiners, precision="int4", rank=RANK)
        return model.to_empty(device="cpu")

    def _patched_by_lite(self, dense: Any, dtype: torch.dtype, *, skip_refiners: bool) -> Any:
        model = nn.Module.to(copy.deepcopy(dense), dtype)
        options = SimpleNamespace(precision="int4", torch_dtype=None, adapter_options={})
        config = {"rank": RANK, "skip_refiners": skip_refiners}
        self.module.ZImageAdapter().patch(model, {}, config, options)
        return model

    def run(self, model: Any, *args: Any) -> Tensor:
        """Call the model; the result's first sample."""
        with torch.no_grad(), self.rotations(model):
            return _forward_of(model)(*args, return_dict=False)[0][0]

    @contextmanager
    def rotations(self, model: Any) -> Iterator[None]:
        """What the fused form's own forward does around diffusers'.

        That forward passes arguments by place, as diffusers took them before it had others.
        """
        if self.form is not ZImageForm.FUSED:
            yield
            return
        model.register_rope_hook(self.module.NunchakuZImageRopeHook())
        try:
            yield
        finally:
            model.unregister_rope_hook()


def _forward_of(model: Any) -> Any:
    from diffusers import ZImageTransformer2DModel

    if hasattr(model, "register_rope_hook"):
        return types.MethodType(ZImageTransformer2DModel.forward, model)
    return model


def _imported(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name}")


def _widen(model: nn.Module) -> None:
    """Make room for weights that are not rounded."""
    for module in model.modules():
        if type(module).__name__ == "SVDQW4A4Linear":
            shape = (module.out_features, module.in_features)
            module.qweight = nn.Parameter(torch.empty(shape), requires_grad=False)


@contextmanager
def sources(folder: Path, kernels: object) -> Iterator[None]:
    """Make a folder's package importable, over these kernels."""
    package = LITE if (folder / LITE).is_dir() else "nunchaku"
    assert (folder / package).is_dir(), f"{folder} has no package `nunchaku` or `{LITE}`"
    others = _taken(package)
    for name in BARE if package != LITE else ():
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


@pytest.fixture(scope="module", params=FOLDERS, ids=str)
def peer(request) -> Iterator[Peer]:
    kernels = LiteKernels(Precision.EXACT)
    with sources(request.param, kernels):
        yield Peer(request.param, kernels)


@pytest.fixture(scope="module")
def dense() -> Any:
    return emulation.tiny_z_image(layers=1)


@pytest.fixture(scope="module")
def arguments() -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 1, 8, 12, generator=generator)
    text = torch.randn(20, 128, generator=generator)
    return [x], torch.tensor([0.3]), [text]


def emulated(dense: Any, form: ZImageForm, precision: Precision, **options: bool) -> Any:
    return emulation.z_image_transformer(
        dense, form=form, rank=RANK, precision=precision, dtype=torch.float32, **options
    )


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("quantized_refiners", [True, False])
def test_its_model_is_the_emulated_one(peer, dense, arguments, quantized_refiners):
    options = {"quantized_refiners": quantized_refiners}
    theirs = loaded(peer, dense, **options)
    ours = emulated(dense, peer.form, Precision.EXACT, **options)
    assert parameters(theirs) == parameters(ours)
    found = peer.run(theirs, *arguments)
    with torch.no_grad():
        assert error(found, ours(*arguments, return_dict=False)[0][0]) < BOUND
        assert error(found, dense(*arguments, return_dict=False)[0][0]) < EPSILON_BOUND


def test_it_rounds_as_the_emulated_one(peer, dense, arguments, monkeypatch):
    monkeypatch.setattr(peer.kernels, "precision", Precision.W4A4)
    theirs = loaded(peer, dense)
    ours = emulated(dense, peer.form, Precision.W4A4)
    assert parameters(theirs) == parameters(ours)
    with torch.no_grad():
        expected = ours(*arguments, return_dict=False)[0][0]
    assert error(peer.run(theirs, *arguments), expected) < ROUNDED_BOUND


def loaded(peer: Peer, dense: Any, **options: bool) -> Any:
    """Their model, from a checkpoint: files have the names of the form that is called."""
    state = emulated(dense, ZImageForm.CALLED, peer.kernels.precision, **options).state_dict()
    return peer.model(dense, state, quantized_refiners=options.get("quantized_refiners", True))


def parameters(model: nn.Module) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, one.dtype, one.shape) for name, one in model.named_parameters()]
