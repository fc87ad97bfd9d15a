"""Z-Image of Nunchaku's and nunchaku-lite's own Python classes, unmodified, on a CPU."""

from __future__ import annotations

import copy
import importlib
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

from .nunchaku_sources import (
    BOUND,
    COMPOSED_BOUND,
    DELTA_BOUND,
    EPSILON_BOUND,
    LISTS,
    LITE,
    PACKAGES,
    RANK,
    SOURCE,
    STRENGTHS,
    TRANSFORMERS,
    WARNINGS,
    Trained,
    emulated,
    error,
    parameters,
    sources,
    widen,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytestmark = [
    pytest.mark.skipif(not PACKAGES, reason=f"needs {SOURCE}: see tests/nunchaku_sources.py"),
    *WARNINGS,
]

ROUNDED_BOUND = 1e-3
"""Relative error of an output in 4 bits; measured: 0."""


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
            self.module = importlib.import_module(f"{LITE}.adapters.z_image")
            self.form = ZImageForm.PASSED
            return
        self.module = importlib.import_module(f"{TRANSFORMERS}.transformer_zimage")
        is_fused = hasattr(self.module, "NunchakuZImageFusedModule")
        self.form = ZImageForm.FUSED if is_fused else ZImageForm.CALLED

    def model(self, dense: Any, state: dict[str, Tensor], *, quantized_refiners: bool) -> Any:
        """Build a model as it is loaded, of a checkpoint in one dtype."""
        build = self._patched_by_lite if self._is_lite else self._patched
        dtype = state["x_pad_token"].dtype
        model = build(dense, dtype, skip_refiners=not quantized_refiners)
        if getattr(self.kernels, "precision", None) is Precision.EXACT:
            widen(model)
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


@pytest.fixture(scope="module", params=PACKAGES, ids=str)
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
    epsilons = dict.fromkeys(LISTS, dense.layers[0].attention.norm_q.eps)
    if peer.form is not ZImageForm.CALLED:
        epsilons |= dict.fromkeys(LISTS if quantized_refiners else ("layers",), EPSILON)
    base, names = peer.run(theirs, *arguments), parameters(theirs)
    with torch.no_grad():
        expected = trained.output(arguments, epsilons)
        moved = expected - trained.output(arguments, epsilons, (0.0, 0.0))
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


@pytest.fixture(scope="module")
def trained(dense, tmp_path_factory) -> Trained:
    return Trained(dense, tmp_path_factory.mktemp("adapters"))


def loaded(peer: Peer, dense: Any, **options: bool) -> Any:
    """Their model, from a checkpoint: files have the names of the form that is called."""
    state = emulated(dense, ZImageForm.CALLED, peer.kernels.precision, **options).state_dict()
    return peer.model(dense, state, quantized_refiners=options.get("quantized_refiners", True))
