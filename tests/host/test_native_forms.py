"""ComfyUI's own merge of adapters that need the base weight: where it is right, and where not.

Right is W + t (W' - W) with W' as the tool that trains such a file has it. What it does else is
restated here, so that a ComfyUI that does otherwise is noticed.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from qwenlora import _reference as reference
from qwenlora.delta.adapters.glora import glora
from qwenlora.delta.adapters.rotation import rotation_of_rows
from qwenlora.plan.documents import Cayley, RotationRule, Side

from ..test_adapter_forms import (
    COLUMNS,
    MODULE,
    ROWS,
    DenseWeight,
    Random,
    change,
    decomposed,
    dora_change,
    error,
    inner_delta,
    magnitude,
)

IN_FLOAT32 = 2e-6
"""Relative error of a delta as a difference of float32 weights; measured: 5.6e-7."""
SCALE = 0.5
FILE = {"down": "lora_down.weight", "up": "lora_up.weight"}
AT = {"module": MODULE, "row_begin": 0, "row_count": ROWS}

pytestmark = pytest.mark.usefixtures("host")


def native_change(tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """(N, K) float64: what ComfyUI's merge of a file adds to a weight."""
    lora = importlib.import_module("comfy.lora")
    key = f"diffusion_model.{MODULE}.weight"
    stem = f"diffusion_model.{MODULE}"
    file = {f"{stem}.{name}": tensor.clone() for name, tensor in tensors.items()}
    loaded = lora.load_lora(file, {stem: key}, log_missing=False)
    patches = [(strength, loaded[key], 1.0, None, None)]
    merged = lora.calculate_weight(patches, weight.float().clone(), key)
    return merged.double() - weight


# ---- DoRA ----


def dora(side: Side):
    """A DoRA as a file has it, its weight and our W' - W."""
    random = Random(1)
    weight = random.weight()
    roles, delta = inner_delta("lora", random)
    m = magnitude(random, weight + SCALE * delta, side)
    result = decomposed("lora", {**roles, "dora_scale": m}, DenseWeight(weight), side)
    file = {FILE[role]: tensor for role, tensor in roles.items()}
    file |= {"dora_scale": m, "alpha": torch.tensor(4 * SCALE)}
    return file, weight, dora_change(result, weight), delta


@pytest.mark.parametrize("strength", [1.0, 0.35, -0.7])
def test_dora_of_columns_is_the_same(strength):
    file, weight, own, _ = dora(Side.IN)
    assert error(native_change(file, weight, strength), strength * own) < IN_FLOAT32


def test_dora_of_rows_is_brought_to_lengths_by_the_norms_of_the_base():
    file, weight, own, delta = dora(Side.OUT)
    found = native_change(file, weight, 1.0)
    lengths = file["dora_scale"].double() / weight.norm(dim=1, keepdim=True)
    assert error(found, lengths * (weight + SCALE * delta) - weight) < IN_FLOAT32
    assert error(found, own) > 0.1


def test_magnitudes_in_one_axis_are_not_applied():
    """PEFT and ai-toolkit write them so; the merge logs an error and leaves the weight."""
    file, weight, _, _ = dora(Side.OUT)
    file["dora_scale"] = file["dora_scale"].flatten()
    assert not native_change(file, weight, 1.0).any()


# ---- GLoRA ----


@pytest.mark.parametrize("old", [False, True], ids=["today's layout", "the older layout"])
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_glora_is_the_same(old, strength):
    random = Random(2)
    weight = random.weight()
    shapes = {"a1": (COLUMNS, 3), "a2": (3, COLUMNS), "b1": (ROWS, 3), "b2": (3, COLUMNS)}
    stored = {name: random.normal(*shape, size=0.2).float() for name, shape in shapes.items()}
    if old:
        stored = {name: stored[name[0] + "21"[int(name[1]) - 1]] for name in stored}
    file = {f"{name}.weight": tensor for name, tensor in stored.items()}
    file["alpha"] = torch.tensor(1.5)
    roles = {f"glora_{name}": tensor for name, tensor in stored.items()}
    pair = glora(roles, DenseWeight(weight), **AT)
    expected = strength * SCALE * (pair.up.double() @ pair.down.double())
    assert error(native_change(file, weight, strength), expected) < IN_FLOAT32


# ---- rotations ----


def rotation(shape: tuple[int, ...], *, rescaled: bool, alpha: float = 0.0):
    """A diag-OFT or BOFT as LyCORIS writes it, its weight and our delta."""
    random = Random(3)
    weight = random.weight()
    file = {"oft_blocks": random.normal(*shape, size=0.1).float(), "alpha": torch.tensor(alpha)}
    if rescaled:
        file["rescale"] = random.factors(ROWS, 1).float()
    roles = {"oft_blocks": file["oft_blocks"]}
    if rescaled:
        roles["oft_rescale"] = file["rescale"]
    rule = RotationRule(Cayley.EXACT, constraint=alpha)
    return file, weight, rotation_of_rows(roles, rule, **AT)


OFT, BOFT = (6, 8, 8), (2, 6, 8, 8)


@pytest.mark.parametrize(("shape", "rescaled"), [(OFT, False), (BOFT, False), (BOFT, True)])
def test_rotations_at_strength_one_are_the_same(shape, rescaled):
    file, weight, delta = rotation(shape, rescaled=rescaled)
    assert error(native_change(file, weight, 1.0), change(delta, weight)) < IN_FLOAT32


def test_oft_meets_its_strength_twice():
    file, weight, delta = rotation(OFT, rescaled=False)
    whole = change(delta, weight)
    assert error(native_change(file, weight, 0.5), 0.25 * whole) < IN_FLOAT32


def test_boft_meets_its_strength_in_each_stage_and_once_more():
    file, weight, delta = rotation(BOFT, rescaled=False)
    skew = reference.constrained_skews(file["oft_blocks"], 0.0)
    eye = torch.eye(8, dtype=torch.float64)
    blended = torch.stack(
        [torch.stack([0.5 * reference.cayley(q) + 0.5 * eye for q in stage]) for stage in skew]
    )
    expected = 0.5 * (reference.boft_weight(weight, blended) - weight)
    found = native_change(file, weight, 0.5)
    assert error(found, expected) < IN_FLOAT32
    assert error(found, change(delta, weight, strength=0.5)) > 0.4


def test_oft_s_factors_on_rows_are_left_out():
    file, weight, delta = rotation(OFT, rescaled=True)
    plain, _, without = rotation(OFT, rescaled=False)
    assert torch.equal(plain["oft_blocks"], file["oft_blocks"])
    found = native_change(file, weight, 1.0)
    assert error(found, change(without, weight)) < IN_FLOAT32
    assert error(found, change(delta, weight)) > 0.05


def test_alpha_is_the_constraint_itself_and_not_times_the_rows():
    file, weight, delta = rotation(OFT, rescaled=False, alpha=0.01)
    _, _, tighter = rotation(OFT, rescaled=False, alpha=0.01 / ROWS)
    found = native_change(file, weight, 1.0)
    # The delta is a two-hundredth of that of the others, in weights of the same precision.
    assert error(found, change(tighter, weight)) < 1e-4
    assert error(found, change(delta, weight)) > 0.9
