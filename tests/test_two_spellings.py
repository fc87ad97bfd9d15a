"""One file in two spellings: `.lora.down` beside `.lora_A`, as LightX2V's trainer writes.

diffusers' own converter renames query, key, value and output alone. What a trainer saves of further
modules keeps PEFT's names, and stands in the same file.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

import qwenlora
from qwenlora.emulation import Precision, lite_transformer

from .pipelines import (
    dense_transformer,
    emulated,
    forward,
    pipeline_of,
    relative_error,
    tensors,
    tiny_vae,
)

if TYPE_CHECKING:
    from torch import nn

RENAMED = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
PATHS = (*RENAMED, "attn.add_q_proj", "img_mlp.net.2")
MODULES = len(PATHS)
OUTPUT_BOUND = 1e-5
"""Relative error of an output in float32; measured: 1.1e-7."""


@pytest.fixture(scope="module")
def dense():
    return dense_transformer(num_layers=1)


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def one_spelling():
    return tensors(3, paths=PATHS, blocks=1)


@pytest.fixture(scope="module")
def two_spellings(one_spelling):
    """The same tensors, as diffusers' converter leaves their names."""
    return {_renamed(key): tensor for key, tensor in one_spelling.items()}


def _renamed(key: str) -> str:
    if not any(f".{path}." in key for path in RENAMED):
        return key
    return key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def lite(dense: nn.Module) -> nn.Module:
    return lite_transformer(dense, rank=32, precision=Precision.EXACT, dtype=torch.float32)


@pytest.mark.parametrize("quantized", [emulated, lite])
def test_two_spellings_give_the_bits_of_one(dense, quantized, one_spelling, two_spellings):
    models = [quantized(dense), quantized(dense)]
    for model, source in zip(models, (one_spelling, two_spellings), strict=True):
        report = qwenlora.compose_loras(model, source, strict=True)
        assert report.complete
        assert report.loras[0].modules_applied == MODULES
    expected, found = (
        dict(model.named_parameters()) | dict(model.named_buffers()) for model in models
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("quantized", [emulated, lite])
def test_every_module_is_applied_where_diffusers_passes_over_one_spelling(
    dense, vae, quantized, one_spelling, two_spellings, tmp_path
):
    save_file(one_spelling, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file(two_spellings, tmp_path / "two.safetensors", metadata={"format": "pt"})
    whole, part = (pipeline_of(copy.deepcopy(dense), vae) for _ in range(2))
    whole.load_lora_weights(tmp_path, weight_name="one.safetensors")
    with warnings.catch_warnings():
        # PEFT finds more names than tensors, which "is not necessarily an issue".
        warnings.simplefilter("ignore", RuntimeWarning)
        part.load_lora_weights(tmp_path, weight_name="two.safetensors")
    assert _lora_layers(whole.transformer) == MODULES
    # The day that diffusers reads both, `docs/correctness.md` says so.
    assert 0 < _lora_layers(part.transformer) < MODULES

    ours = qwenlora.attach(pipeline_of(quantized(dense), vae))
    ours.load_lora_weights(tmp_path, weight_name="two.safetensors")
    expected = forward(whole.transformer)
    assert relative_error(forward(ours.transformer), expected) < OUTPUT_BOUND
    assert relative_error(forward(part.transformer), expected) > 1000 * OUTPUT_BOUND


def _lora_layers(transformer: nn.Module) -> int:
    return sum(isinstance(module, LoraLayer) for module in transformer.modules())


@pytest.mark.parametrize("is_alike", [True, False])
@pytest.mark.parametrize("kind", ["file", "state dict"])
def test_a_second_version_of_a_module_is_told_from_the_same_twice(kind, is_alike, dense, tmp_path):
    twice = tensors(3, paths=("attn.to_out.0",), blocks=1)
    for key, tensor in list(twice.items()):
        twice[key.replace("to_out.0", "to_out")] = tensor.clone() if is_alike else -tensor
    source = twice
    if kind == "file":
        source = tmp_path / "lora.safetensors"
        save_file(twice, source)
    report = qwenlora.compose_loras(emulated(dense), source)
    assert report.complete is is_alike
    assert ("unlike the first" in report.text()) is not is_alike
