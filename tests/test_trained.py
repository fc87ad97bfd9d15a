"""Files by the tools that people train with do in the model what those tools' own layers do."""

from __future__ import annotations

import copy

import pytest
import torch

import qwenlora
from qwenlora.emulation import EmulatedQwenImageTransformer, Precision

from .test_oracles import dense_paths, plane_order, relative_error
from .trained import NAMES, base_model, flow_of, responses, trained

DELTA_BOUND = 5e-5
"""Relative error of a delta, both sides being differences of outputs in float32.

Measured: 1.0e-5."""
MODEL_BOUND = 1e-5
"""The same of the whole model's output, where an MLP's layers run as the model runs them.

Measured: 1.6e-6."""


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def base():
    return EmulatedQwenImageTransformer.from_diffusers(
        base_model(), rank=32, precision=Precision.EXACT, dtype=torch.float32
    )


def outputs_of(model, path: str) -> torch.Tensor:
    """(K + 1, out): what a layer makes of zero and of each unit vector, rows in plane order."""
    leaf = model.get_submodule(path)
    inputs = torch.cat([torch.zeros(1, leaf.in_features), torch.eye(leaf.in_features)])
    rows = torch.cat([leaf(some) for some in inputs.split(8)]).double()
    return plane_order(leaf, rows.mT).mT


def wanted(name: str, members: list[str]) -> torch.Tensor:
    """(K + 1, rows): what the tool's layers add to the outputs of layers that share a slot."""
    found = trained(name)
    dense = base_model()
    parts = []
    for member in members:
        linear = dense.get_submodule(member)
        if member not in found.weights:
            parts.append(torch.zeros(linear.in_features + 1, linear.out_features).double())
            continue
        (weight,), (bias,) = (list(own.values()) for own in responses(dense, [member]))
        shift = found.biases[member] - bias
        parts.append(torch.cat([shift.unsqueeze(0), (found.weights[member] - weight).T + shift]))
    return torch.cat(parts, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_adapter(name, base):
    found = trained(name)
    # It has learned, or there would be little to see.
    assert found.losses[1] < 0.85 * found.losses[0]
    slots = {path: dense_paths(path) for path, leaf in base.named_modules() if _is_linear(leaf)}
    slots = {path: own for path, own in slots.items() if set(own) & set(found.weights)}
    shifts = {path: wanted(name, members) for path, members in slots.items()}
    before = {path: outputs_of(base, path) for path in slots}
    assert {member for own in slots.values() for member in own} >= set(found.weights)
    model = copy.deepcopy(base)
    for strength in (1.0, -0.7):
        report = qwenlora.compose_loras(model, [(found.source, strength)], strict=True)
        assert report.complete
        for path in slots:
            added = outputs_of(model, path) - before[path]
            assert relative_error(added, strength * shifts[path]) < DELTA_BOUND, path
        if strength == 1:
            moved = found.flow - flow_of(base_model())
            assert relative_error(flow_of(model) - flow_of(base), moved) < MODEL_BOUND


def _is_linear(leaf: torch.nn.Module) -> bool:
    return hasattr(leaf, "out_features")
