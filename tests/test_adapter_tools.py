"""Adapters that need the base weight do what the tools that train them do.

Each tool's own layer is run on unit vectors, so its bias and its forward are what is compared with,
not a merge of its own. OneTrainer and ai-toolkit are no packages: their formulas are restated here.
"""

from __future__ import annotations

import logging
import math
import warnings

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from torch import nn

from qwenlora.delta.adapters.dora import Place, as_pair
from qwenlora.delta.adapters.glora import glora
from qwenlora.delta.adapters.hra import Directions, hra
from qwenlora.delta.adapters.ia3 import ia3
from qwenlora.delta.adapters.rotation import boft_of_inputs, oft_of_inputs, rotation_of_rows
from qwenlora.plan.documents import Cayley, RotationRule, Side

from .test_adapter_forms import (
    COLUMNS,
    MODULE,
    ROWS,
    DenseWeight,
    Random,
    added,
    change,
    dora_change,
    error,
    parts_of,
)

IN_FLOAT32 = 1e-5
"""Relative error of a delta that a tool makes in float32, as a difference of outputs.

Measured: 5.1e-6."""
IN_FLOAT64 = 2e-7
"""The same in float64: what rounding our values to float32 leaves."""


def dense_linear(*, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(COLUMNS, ROWS, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(Random(1).weight())
        if bias:
            linear.bias.copy_(Random(2).normal(ROWS))
    return linear.requires_grad_(False)


def responses(layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight (N, K) and the bias (N,) float64 of what a layer does, by calling it."""
    inputs = torch.cat([torch.zeros(1, COLUMNS), torch.eye(COLUMNS)]).to(dtype)
    with torch.no_grad():
        outputs = layer(inputs).double()
    return (outputs[1:] - outputs[0]).T, outputs[0]


def shift(parts, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(N,) float64: what parts add where the input is zero."""
    return added(parts, weight, bias, torch.zeros(1, COLUMNS, dtype=torch.float64))[0]


# ---- LyCORIS ----

LYCORIS = {
    "DoRA of rows": ("LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "DoRA of columns": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "DoRA of rows, rank-stabilised": ("LoConModule", {"weight_decompose": True, "rs_lora": True}),
    "DoRA of rows, LoHa": ("LohaModule", {"weight_decompose": True}),
    "DoRA of columns, LoHa": ("LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    "DoRA of rows, LoKr": ("LokrModule", {"weight_decompose": True, "factor": 4}),
    "DoRA of columns, LoKr": (
        "LokrModule",
        {"weight_decompose": True, "wd_on_out": False, "factor": 4, "full_matrix": True},
    ),
    "GLoRA": ("GLoRAModule", {}),
    "IA3 of rows": ("IA3Module", {"train_on_input": False}),
    "IA3 of columns": ("IA3Module", {"train_on_input": True}),
    "diag-OFT": ("DiagOFTModule", {}),
    "diag-OFT, rescaled": ("DiagOFTModule", {"rescaled": True}),
    "diag-OFT, constrained": ("DiagOFTModule", {"constraint": 0.01, "rescaled": True}),
    "BOFT": ("ButterflyOFTModule", {}),
    "BOFT, rescaled": ("ButterflyOFTModule", {"rescaled": True}),
    "BOFT, constrained": ("ButterflyOFTModule", {"constraint": 0.01, "rescaled": True}),
}
LORA = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}


def lycoris_module(name: str, linear: nn.Linear, *, strength: float = 1.0):
    """A LyCORIS module over a layer, its tensors as after training: none as it began."""
    logging.disable(logging.WARNING)
    try:
        modules = pytest.importorskip("lycoris.modules")
        kind, options = LYCORIS[name]
        dim = 8 if "OFT" in name else 4
        module = getattr(modules, kind)(
            "lycoris_layer", linear, strength, lora_dim=dim, alpha=2.0, **options
        )
    finally:
        logging.disable(logging.NOTSET)
    random = Random(3)
    with torch.no_grad():
        for parameter in module.parameters():
            size = 0.1 * (float(parameter.abs().mean()) or 1.0)
            parameter.add_(random.normal(*parameter.shape, size=size))
    return module


def lycoris_weight(name: str, strength: float = 1.0):
    """A layer's weight and bias with a LyCORIS module over it; the tensors that it saves."""
    linear = dense_linear()
    module = lycoris_module(name, linear, strength=strength)
    module.apply_to()
    weight, bias = responses(linear, torch.float32)
    saved = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
    return weight, bias, saved


def lycoris_change(name: str, saved, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """(N, K) float64: strength (W' - W) of what LyCORIS saved."""
    at = {"module": MODULE, "row_begin": 0, "row_count": ROWS}
    own = DenseWeight(weight)
    if name.startswith("DoRA"):
        side = Side.OUT if saved["dora_scale"].shape[0] == ROWS else Side.IN
        roles = {LORA.get(key, key): tensor for key, tensor in saved.items() if key != "alpha"}
        # Alpha counts where a factor is of low rank; the rank is 4.
        scale = 1.0 if {"lokr_w1", "lokr_w2"} <= set(roles) else float(saved["alpha"]) / 4
        place = Place(MODULE, side, 0, ROWS)
        result = as_pair(roles, own, place, scale=scale)
        # The inner delta's scale is the piece's.
        return dora_change(result, weight, strength, scale=scale)
    if name == "GLoRA":
        roles = {f"glora_{key}": saved[f"{key}.weight"] for key in ("a1", "a2", "b1", "b2")}
        pair = glora(roles, own, **at)
        return strength * float(saved["alpha"]) / 4 * (pair.up.double() @ pair.down.double())
    if name.startswith("IA3"):
        side = Side.IN if saved["on_input"] else Side.OUT
        return change(ia3({"ia3": saved["weight"]}, side=side, **at), weight, strength=strength)
    tensors = {"oft_blocks": saved["oft_blocks"]}
    if "rescale" in saved:
        tensors["oft_rescale"] = saved["rescale"]
    rule = RotationRule(Cayley.EXACT, constraint=float(saved["alpha"]))
    return change(rotation_of_rows(tensors, rule, **at), weight, strength=strength)


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris(name):
    linear = dense_linear()
    base = linear.weight.double()
    weight, bias, saved = lycoris_weight(name)
    found = lycoris_change(name, saved, base, 1.0)
    assert error(found, weight - base) < IN_FLOAT32
    torch.testing.assert_close(bias, linear.bias.double())


@pytest.mark.parametrize("name", ["GLoRA", "IA3 of rows", "IA3 of columns", "diag-OFT"])
def test_lycoris_is_linear_in_strength(name):
    base = dense_linear().weight.double()
    weight, _, saved = lycoris_weight(name, 0.5)
    assert error(lycoris_change(name, saved, base, 0.5), weight - base) < IN_FLOAT32


@pytest.mark.parametrize(
    ("name", "at_least"),
    [("DoRA of rows", 0.3), ("diag-OFT, rescaled", 0.1), ("BOFT, rescaled", 0.02)],
)
def test_where_lycoris_is_not_linear_in_strength(name, at_least):
    """It leaves a DoRA's inner delta whole, a rescale whole, and blends each stage of a BOFT."""
    base = dense_linear().weight.double()
    weight, _, saved = lycoris_weight(name, 0.5)
    assert error(lycoris_change(name, saved, base, 0.5), weight - base) > at_least


# ---- PEFT ----


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = dense_linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def peft_weight(config, *, size: float = 0.1):
    """A layer's weight and bias with PEFT's adapter in it, float64; the tensors that it saves."""
    with warnings.catch_warnings():
        # BOFT looks for a compiler, and goes on without one.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Tiny(), config).double().eval()
    random = Random(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                mean = float(parameter.abs().mean()) or 1.0
                parameter.add_(random.normal(*parameter.shape, size=size * mean))
        weight, bias = responses(model, torch.float64)
    saved = get_peft_model_state_dict(model)
    return weight, bias, {key.split(".layer.")[1]: tensor for key, tensor in saved.items()}


def assert_is(delta, weight: torch.Tensor, bias: torch.Tensor) -> None:
    linear = dense_linear()
    base, own_bias = linear.weight.double(), linear.bias.double()
    found = change(delta, base, bias=own_bias)
    assert error(found, weight - base) < IN_FLOAT64
    moved = shift(parts_of(delta, bias=own_bias), base, own_bias)
    torch.testing.assert_close(own_bias + moved, bias, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_peft_dora(rank_stabilised):
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["layer"], use_dora=True, use_rslora=rank_stabilised
    )
    weight, bias, saved = peft_weight(config)
    linear = dense_linear()
    magnitude = saved["lora_magnitude_vector"]
    assert magnitude.shape == (ROWS,)
    roles = {
        "down": saved["lora_A.weight"],
        "up": saved["lora_B.weight"],
        "dora_scale": magnitude,
    }
    scale = 1.0 if rank_stabilised else 0.5
    base = linear.weight.double()
    result = as_pair(roles, DenseWeight(base), Place(MODULE, Side.OUT, 0, ROWS), scale=scale)
    assert error(dora_change(result, base, scale=scale), weight - base) < IN_FLOAT64
    torch.testing.assert_close(bias, linear.bias.double())


@pytest.mark.parametrize("feedforward", [False, True])
def test_peft_ia3(feedforward):
    config = peft.IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if feedforward else []
    )
    weight, bias, saved = peft_weight(config)
    assert saved["ia3_l"].shape == ((1, COLUMNS) if feedforward else (ROWS, 1))
    side = Side.IN if feedforward else Side.OUT
    delta = ia3(saved, module=MODULE, side=side, row_begin=0, row_count=ROWS)
    assert_is(delta, weight, bias)
    # The bias is scaled with what the layer puts out.
    assert torch.equal(bias, dense_linear().bias.double()) is feedforward


PEFT_OFT = {
    "series": ({}, RotationRule(Cayley.NEUMANN)),
    "solved": ({"use_cayley_neumann": False}, RotationRule(Cayley.SOLVE)),
    "shared": ({"block_share": True}, RotationRule(Cayley.NEUMANN, shared=True)),
    "projected": ({"coft": True, "eps": 0.5}, RotationRule(Cayley.NEUMANN)),
}


@pytest.mark.parametrize("name", PEFT_OFT)
def test_peft_oft(name):
    options, rule = PEFT_OFT[name]
    config = peft.OFTConfig(target_modules=["layer"], oft_block_size=8, **options)
    weight, bias, saved = peft_weight(config)
    stored = saved["oft_R.weight"]
    assert stored.shape == ((1, 28) if rule.shared else (4, 28))
    delta = oft_of_inputs(
        {"oft_r": stored}, rule, module=MODULE, columns=COLUMNS, row_begin=0, row_count=ROWS
    )
    assert_is(delta, weight, bias)


def test_peft_s_transforms_turn_opposite_ways():
    """The same file is another delta: only the configuration beside it tells."""
    stored = Random(5).normal(4, 28, size=0.1)
    at = {"module": MODULE, "columns": COLUMNS, "row_begin": 0, "row_count": ROWS}
    base = dense_linear().weight.double()
    series, solved = (
        change(oft_of_inputs({"oft_r": own}, RotationRule(cayley), **at), base)
        for own, cayley in ((stored, Cayley.NEUMANN), (stored, Cayley.SOLVE))
    )
    turned_back = oft_of_inputs({"oft_r": -stored}, RotationRule(Cayley.NEUMANN), **at)
    assert error(series, solved) > 1.5
    assert error(change(turned_back, base), solved) < 0.05


def test_peft_boft():
    config = peft.BOFTConfig(target_modules=["layer"], boft_block_size=8, boft_n_butterfly_factor=1)
    weight, bias, saved = peft_weight(config)
    assert saved["boft_R"].shape == (1, 4, 8, 8)
    roles = {"boft_r": saved["boft_R"], "boft_s": saved["boft_s"]}
    delta = boft_of_inputs(roles, module=MODULE, columns=COLUMNS, row_begin=0, row_count=ROWS)
    assert_is(delta, weight, bias)


@pytest.mark.parametrize("directions", Directions)
def test_peft_hra(directions):
    orthonormal = directions is Directions.ORTHONORMAL
    config = peft.HRAConfig(r=4, target_modules=["layer"], apply_GS=orthonormal)
    weight, bias, saved = peft_weight(config)
    linear = dense_linear()
    base = linear.weight.double()
    at = {"module": MODULE, "row_begin": 0, "row_count": ROWS}
    pair = hra(saved, DenseWeight(base), directions=directions, **at)
    assert pair.rank == 4
    assert error(pair.up.double() @ pair.down.double(), weight - base) < IN_FLOAT64
    torch.testing.assert_close(bias, linear.bias.double())


# ---- OneTrainer, ai-toolkit ----


def one_trainer_oft(x: torch.Tensor, stored: torch.Tensor, size: int, *, scaled: bool):
    """OneTrainer's `OFTRotationModule.forward`, modules/module/oft_utils.py at 23df3832e8.

    The matrix is filled at the upper triangle's places and its transpose taken off, divided by
    2 sqrt(b - 1) where the file has `scaled_oft`; five terms of the Cayley-Neumann series; and
    `einsum("...rk,rkc->...rc", x, R)`.
    """
    effective = stored / (2 * math.sqrt(size - 1) if scaled else 1)
    rows, columns = torch.triu_indices(size, size, 1)
    matrix = torch.zeros(len(stored), size, size, dtype=stored.dtype)
    matrix[:, rows, columns] = effective
    skew = matrix - matrix.transpose(-2, -1)
    series = torch.eye(size, dtype=stored.dtype) + 2 * skew + 2 * skew @ skew
    power = skew @ skew @ skew
    rotation = series + 2 * power + power @ skew
    turned = torch.einsum("...rk,rkc->...rc", x.reshape(*x.shape[:-1], -1, size), rotation)
    return turned.reshape(x.shape)


@pytest.mark.parametrize("scaled", [False, True])
def test_one_trainer_oft(scaled):
    linear = dense_linear().double()
    stored = Random(6).normal(4, 28, size=0.1).float()
    wide = stored.double()
    weight, bias = responses(
        lambda x: linear(one_trainer_oft(x, wide, 8, scaled=scaled)), torch.float64
    )
    rule = RotationRule(Cayley.NEUMANN, scaled=scaled)
    delta = oft_of_inputs(
        {"oft_r": stored}, rule, module=MODULE, columns=COLUMNS, row_begin=0, row_count=ROWS
    )
    assert_is(delta, weight, bias)


def one_trainer_dora(linear: nn.Linear, saved, scale: float, *, on_output: bool):
    """OneTrainer's `DoRAModule.forward`, modules/module/LoRAModule.py at 23df3832e8.

    WP = W + scale B A; its rows (`decompose_output_axis`) or columns, the default, are brought to
    `dora_scale`; the bias stays.
    """
    adapted = linear.weight + scale * (saved["up"] @ saved["down"])
    norm = adapted.norm(dim=1 if on_output else 0, keepdim=True)
    return saved["dora_scale"] * (adapted / norm)


@pytest.mark.parametrize("on_output", [False, True])
def test_one_trainer_dora(on_output):
    random = Random(7)
    linear = dense_linear().double()
    base = linear.weight
    axis = 1 if on_output else 0
    saved = {
        "down": random.normal(4, COLUMNS),
        "up": random.normal(ROWS, 4, size=0.1),
        "dora_scale": base.norm(dim=axis, keepdim=True) * random.factors(1, size=0.05),
    }
    expected = one_trainer_dora(linear, saved, 0.5, on_output=on_output) - base
    side = Side.OUT if on_output else Side.IN
    result = as_pair(saved, DenseWeight(base), Place(MODULE, side, 0, ROWS), scale=0.5)
    assert error(dora_change(result, base, scale=0.5), expected) < IN_FLOAT64


def test_ai_toolkit_dora():
    """`DoRAModule.apply_dora`, toolkit/models/DoRA.py at 27a03a91f2.

    The layer and its LoRA stay, and (magnitude / |V| - 1) times the product of the adapted weight
    V, which has no bias, is added. Alpha is the rank.
    """
    random = Random(8)
    linear = dense_linear().double()
    base = linear.weight
    down, up = random.normal(4, COLUMNS), random.normal(ROWS, 4, size=0.1)
    magnitude = base.norm(dim=1) * random.factors(ROWS, size=0.05)

    def forward(x: torch.Tensor) -> torch.Tensor:
        adapted = base + up @ down
        ratio = magnitude / torch.linalg.norm(adapted, dim=1)
        decomposed = (ratio - 1).view(1, -1) * nn.functional.linear(x, adapted)
        return linear(x) + x @ down.T @ up.T + decomposed

    weight, bias = responses(forward, torch.float64)
    roles = {"down": down, "up": up, "dora_scale": magnitude}
    result = as_pair(roles, DenseWeight(base), Place(MODULE, Side.OUT, 0, ROWS), scale=1.0)
    assert error(dora_change(result, base, scale=1.0), weight - base) < IN_FLOAT64
    torch.testing.assert_close(bias, linear.bias)
