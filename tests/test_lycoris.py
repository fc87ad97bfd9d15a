"""Files that LyCORIS writes do in the model what LyCORIS's own forward does."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import qwenlora

from .test_adapters import BLOCK, CLOSE, SIZES, error, measured

STRENGTH = 0.7
TARGETS = [f"{BLOCK}.attn.to_q", f"{BLOCK}.img_mod.1", f"{BLOCK}.img_mlp.net.0.proj", "proj_out"]
SETTINGS = {
    "LoKr, factor -1": ("LokrModule", {"factor": -1}),
    "LoKr, factor 4": ("LokrModule", {"factor": 4}),
    "LoKr, factor 8, both decomposed": ("LokrModule", {"factor": 8, "decompose_both": True}),
    "LoKr, whole": ("LokrModule", {"factor": 8, "full_matrix": True}),
    "LoKr, scalar": ("LokrModule", {"factor": 4, "use_scalar": True}),
    "LoKr, rank-stabilised": ("LokrModule", {"factor": 4, "rs_lora": True}),
    "LoHa": ("LohaModule", {}),
    "LoHa, rank-stabilised": ("LohaModule", {"rs_lora": True}),
    "LoCon": ("LoConModule", {}),
    "LoCon, rank-stabilised": ("LoConModule", {"rs_lora": True}),
}


def trained(name: str, linear: torch.nn.Linear):
    """One LyCORIS module over a layer, its tensors as after training: none of them zero."""
    logging.disable(logging.WARNING)
    try:
        modules = pytest.importorskip("lycoris.modules")
        kind, options = SETTINGS[name]
        module = getattr(modules, kind)(
            "lycoris_layer", linear, 1.0, lora_dim=4, alpha=2.0, **options
        )
    finally:
        logging.disable(logging.NOTSET)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def forward_delta(module, linear: torch.nn.Linear) -> torch.Tensor:
    """(out, in) float64: what its forward adds, on the unit vectors."""
    units = torch.eye(linear.in_features)
    with torch.no_grad():
        base = linear(units)
        module.apply_to()
        with_module = linear(units)
        module.restore()
    return (with_module - base).double().mT


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_by_lycoris(name, target, make_model, probe):
    torch.manual_seed(7)
    columns, out = SIZES[target]
    linear = torch.nn.Linear(columns, out, bias=False)
    module = trained(name, linear)
    stem = "lycoris_" + target.replace(".", "_")
    tensors = {f"{stem}.{key}": value for key, value in module.custom_state_dict().items()}
    expected = STRENGTH * forward_delta(module, linear)
    base = make_model()
    model = copy.deepcopy(base)
    assert qwenlora.compose_loras(model, (tensors, STRENGTH), strict=True).complete
    assert error(measured(model, base, target, probe), expected) < CLOSE
