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

import qwenlora
from qwenlora import emulation
from qwenlora.emulation import Precision, ZImageForm
from qwenlora.emulation.fused_qkv import EPSILON
from qwenlora.emulation.lite_kernels import LiteKernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    # PEFT's, of every second adapter.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

RANK = 32
BOUND = 2e-6
"""Relative error of an output in float32; measured: 0."""
EPSILON_BOUND = 1e-5
"""The same against diffusers' norms, whose epsilon is not the fused kernel's; measured: 3.4e-6."""

ROUNDED_BOUND = 1e-3
"""The same in 4 bits; measured: 0."""

COMPOSED_BOUND = 3e-6
"""The same with LoRAs, against PEFT on the dense model; measured: 8.3e-7."""
DELTA_BOUND = 1e-5
"""Relative error of what LoRAs change in an output; measured: 2.2e-6."""
RANKS = {"first": 4, "second": 20}
STRENGTHS = (0.7, -0.4)
LISTS = ("noise_refiner", "context_refiner", "layers")

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


@pytest.mark.parametrize("quantized_refiners", [True, False])
def test_composed_as_by_peft(peer, dense, arguments, trained, quantized_refiners):
    """LoRAs that PEFT made and diffusers saved, on every linear of the model."""
    theirs = loaded(peer, dense, quantized_refiners=quantized_refiners)
    lists = LISTS if quantized_refiners else ("layers",)
    base, names = peer.run(theirs, *arguments), parameters(theirs)
    with torch.no_grad():
        expected = trained.output(peer.form, lists, arguments)
        moved = expected - trained.output(peer.form, lists, arguments, strengths=(0.0, 0.0))
        report = qwenlora.compose_loras(
            theirs, list(zip(trained.files, STRENGTHS, strict=True)), strict=True
        )
        assert report.complete, report.summary()
        found = peer.run(theirs, *arguments)
        assert moved.norm() > 0.1 * base.norm()
        assert error(found, expected) < COMPOSED_BOUND
        assert error(found - base, moved) < DELTA_BOUND
        qwenlora.reset_loras(theirs)
    assert torch.equal(peer.run(theirs, *arguments), base)
    assert parameters(theirs) == names


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
        form: ZImageForm,
        lists: Sequence[str],
        arguments: tuple[Any, ...],
        strengths: tuple[float, float] = STRENGTHS,
    ) -> Tensor:
        """The dense output, with the epsilon of the form's norms of query and key."""
        for name in LISTS:
            is_fused = form is not ZImageForm.CALLED and name in lists
            for block in getattr(self._model, name):
                norms = (block.attention.norm_q, block.attention.norm_k)
                for norm in norms:
                    norm.eps = EPSILON if is_fused else 1e-5
        self._model.set_adapters(list(RANKS), list(strengths))
        return self._model(*arguments, return_dict=False)[0][0]


@pytest.fixture(scope="module")
def trained(dense, tmp_path_factory) -> Trained:
    return Trained(dense, tmp_path_factory.mktemp("adapters"))


def loaded(peer: Peer, dense: Any, **options: bool) -> Any:
    """Their model, from a checkpoint: files have the names of the form that is called."""
    state = emulated(dense, ZImageForm.CALLED, peer.kernels.precision, **options).state_dict()
    return peer.model(dense, state, quantized_refiners=options.get("quantized_refiners", True))


def parameters(model: nn.Module) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, one.dtype, one.shape) for name, one in model.named_parameters()]
