"""Z-Image of ComfyUI-nunchaku's own classes, unmodified, over ComfyUI's, on a CPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch

import qwenlora
from qwenlora import emulation
from qwenlora.emulation import Precision, ZImageForm
from qwenlora.emulation.fused_qkv import EPSILON
from qwenlora.emulation.lite_kernels import LiteKernels

from ..nunchaku_sources import (
    BOUND,
    COMFYUI,
    COMPOSED_BOUND,
    DELTA_BOUND,
    EPSILON_BOUND,
    LISTS,
    NUNCHAKU,
    PACKAGES,
    PACKS,
    RANK,
    SOURCE,
    STRENGTHS,
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
    from types import ModuleType

    from torch import Tensor

CLASSES = [folder for folder in PACKAGES if (folder / NUNCHAKU).is_dir()]
"""Folders whose layers the pack takes."""

pytestmark = [
    pytest.mark.skipif(
        not PACKS or not CLASSES,
        reason=f"needs {SOURCE}, of the pack and of a package: see tests/nunchaku_sources.py",
    ),
    *WARNINGS,
]

TIME = 0.3


@pytest.fixture(scope="module", params=PACKS, ids=str)
def pack(request, host) -> Iterator[ModuleType]:
    import comfy.ldm.lumina.model as lumina

    kernels = LiteKernels(Precision.EXACT)
    with pytest.MonkeyPatch.context() as patch, sources(CLASSES[-1], kernels):
        if not hasattr(lumina, "clamp_fp16"):
            # Later ComfyUIs have it; other dtypes than float16 it leaves alone.
            patch.setattr(lumina, "clamp_fp16", lambda x: x, raising=False)
        spec = importlib.util.spec_from_file_location("pack_z_image", request.param / COMFYUI)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def form(pack) -> ZImageForm:
    fuses = hasattr(pack, "fused_qkv_norm_rotary")
    return ZImageForm.COMFYUI if fuses else ZImageForm.COMFYUI_CALLED


@pytest.fixture(scope="module")
def dense() -> Any:
    return emulation.tiny_z_image(layers=1)


@pytest.fixture(scope="module")
def trained(dense, tmp_path_factory) -> Trained:
    return Trained(dense, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def arguments() -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 1, 8, 12, generator=generator)
    text = torch.randn(20, 128, generator=generator)
    return [x], torch.tensor([TIME]), [text]


def built(pack: Any, dense: Any, *, skip_refiners: bool) -> Any:
    """Build a model as the pack's loader does, of the sizes of a dense one."""
    import comfy.ldm.lumina.model as lumina
    import comfy.ops

    made = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    config = dense.config
    sizes = {
        name: config[name]
        for name in ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads")
    }
    model = lumina.NextDiT(
        **sizes,
        qk_norm=True,
        cap_feat_dim=config["cap_feat_dim"],
        axes_dims=config["axes_dims"],
        axes_lens=config["axes_lens"],
        rope_theta=config["rope_theta"],
        ffn_dim_multiplier=8 / 3,
        z_image_modulation=True,
        time_scale=config["t_scale"],
        pad_tokens_multiple=32,
        **made,
    )
    # ComfyUI makes its width the model's where that is less than 1024.
    model.t_embedder = lumina.TimestepEmbedder(1024, output_size=256, **made)
    model.norm_final = None
    pack.patch_model(model, skip_refiners=skip_refiners, rank=RANK, precision="int4")
    widen(model)
    return model


def output(model: Any, arguments: tuple[Any, ...]) -> Tensor:
    """Call ComfyUI's model: time reversed, output negated."""
    (x,), t, (text,) = arguments
    with torch.no_grad():
        return -model(x.movedim(1, 0), 1 - t, text[None], len(text), None).movedim(0, 1)


@pytest.mark.parametrize("quantized_refiners", [True, False])
def test_its_model_is_the_emulated_one(pack, form, dense, arguments, trained, quantized_refiners):
    ours = emulated(dense, form, Precision.EXACT, quantized_refiners=quantized_refiners)
    theirs = built(pack, dense, skip_refiners=not quantized_refiners)
    assert parameters(theirs) == parameters(ours)
    theirs.load_state_dict(ours.state_dict())
    theirs.eval().requires_grad_(False)
    base = output(theirs, arguments)
    with torch.no_grad():
        assert error(base, ours(*arguments).sample[0]) < BOUND
        assert error(base, dense(*arguments).sample[0]) < EPSILON_BOUND
        composed_as_by_peft(theirs, trained, arguments, epsilons(form, quantized_refiners))


def epsilons(form: ZImageForm, quantized_refiners: bool) -> dict[str, float]:
    known = dict.fromkeys(LISTS, torch.finfo(torch.float32).eps)
    if form is ZImageForm.COMFYUI:
        known |= dict.fromkeys(LISTS if quantized_refiners else ("layers",), EPSILON)
    return known


def composed_as_by_peft(model: Any, trained: Trained, arguments: Any, known: Any) -> None:
    base = output(model, arguments)
    expected = trained.output(arguments, known)
    moved = expected - trained.output(arguments, known, (0.0, 0.0))
    stack = list(zip(trained.files, STRENGTHS, strict=True))
    report = qwenlora.compose_loras(model, stack, strict=True)
    assert report.complete, report.summary()
    found = output(model, arguments)
    assert moved.norm() > 0.1 * base.norm()
    assert error(found, expected) < COMPOSED_BOUND
    assert error(found - base, moved) < DELTA_BOUND
    qwenlora.reset_loras(model)
    assert torch.equal(output(model, arguments), base)
