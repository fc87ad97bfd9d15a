"""The forms of adapters that need the base weight, against their float64 formulas.

What is measured is W' - W as the parts beside a layer add it: each part's meaning is restated here
in float64. The tools that write such files are asked in `test_adapter_tools`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenlora import _reference as reference
from qwenlora.delta.adapters.dora import Place, as_kron, as_pair
from qwenlora.delta.adapters.glora import glora
from qwenlora.delta.adapters.hra import Directions, hra
from qwenlora.delta.adapters.ia3 import ia3
from qwenlora.delta.adapters.rotation import (
    boft_of_inputs,
    oft_of_inputs,
    rotation_of_rows,
    turn,
)
from qwenlora.delta.adapters.set import set_delta
from qwenlora.delta.butterfly import butterfly_order, butterfly_stage
from qwenlora.delta.parts import PartKind
from qwenlora.errors import NonFiniteError, ShapeMismatchError, UnsupportedAdapterError
from qwenlora.plan.documents import Cayley, RotationRule, Side

ROWS, COLUMNS = 48, 32
SCALE = 0.5
MODULE = "transformer_blocks.0.attn.to_q"
FORM = 2e-7
"""Relative error of a delta whose values are rounded to float32 once or twice; measured: 6e-8."""
HALF = 4e-3
"""The same where they are rounded to bfloat16: half of a unit in 8 bits; measured: 2.4e-3."""


@dataclass
class DenseWeight:
    """A matrix (N, K) float64 as a base weight; its panels are small so that there are many."""

    matrix: torch.Tensor

    def panels(self, begin: int, count: int):
        for first in range(begin, begin + count, 7):
            yield first, self.matrix[first : min(first + 7, begin + count)].float()

    def row_norms(self, begin: int, count: int) -> torch.Tensor:
        return self.matrix[begin : begin + count].square().sum(dim=1)

    def column_norms(self, begin: int, count: int) -> torch.Tensor:
        return self.matrix[begin : begin + count].square().sum(dim=0)

    def times(self, x: torch.Tensor, begin: int, count: int) -> torch.Tensor:
        return (self.matrix[begin : begin + count] @ x.double()).float()

    def times_left(self, b: torch.Tensor, begin: int, count: int) -> torch.Tensor:
        return (b.double().T @ self.matrix[begin : begin + count]).float()


def added(parts, weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(M, N) float64: what parts add to y = W x + b, each as `delta.parts` says."""
    total = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for part in parts:
        rows = slice(part.shape.row_begin, part.shape.row_begin + part.shape.row_count)
        own = {name: tensor.double() for name, tensor in part.tensors.items()}
        total[:, rows] += ADDED[part.shape.kind](own, weight[rows], bias[rows], x)
    return total


def _blocks(values: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return values.unflatten(-1, blocks.shape[:2])


def _factor(own, weight, bias, x):
    return own["factor"] * (x @ weight.T + bias - own["bias"])


def _input_factor(own, weight, bias, x):
    return (x * own["factor"]) @ weight.T


def _rotation(own, weight, bias, x):
    z = _blocks(x @ weight.T + bias - own["bias"], own["blocks"])
    return torch.einsum("nij,mnj->mni", own["blocks"], z).flatten(1)


def _turned(own, x):
    return torch.einsum("mni,nij->mnj", _blocks(x, own["blocks"]), own["blocks"]).flatten(1)


def _input_rotation(own, weight, bias, x):
    return _turned(own, x) @ weight.T


def _butterfly(own, weight, bias, x):
    z = start = x @ weight.T + bias - own["bias"]
    for stage, blocks in enumerate(own["stages"]):
        z = z + butterfly_stage(z, blocks, stage)
    return own["strength"] * (z * (1 + own["rescale"]) - start)


def _pass(own, weight, bias, x):
    return own["factor"] * ((x + _turned(own, x)) @ weight.T + bias - own["bias"])


ADDED = {
    PartKind.FACTOR: _factor,
    PartKind.INPUT_FACTOR: _input_factor,
    PartKind.ROTATION: _rotation,
    PartKind.INPUT_ROTATION: _input_rotation,
    PartKind.BUTTERFLY: _butterfly,
    PartKind.PASS: _pass,
}


def parts_of(delta, *, strength=1.0, bias=None, dtype=torch.float64):
    return delta.scaled_parts(strength, dtype=dtype, device=torch.device("cpu"), bias=bias)


def change(
    delta, weight: torch.Tensor, *, strength=1.0, bias=None, dtype=torch.float64
) -> torch.Tensor:
    """(N, K) float64: strength (W' - W) as the parts of a delta add it."""
    own = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias
    parts = parts_of(delta, strength=strength, bias=bias, dtype=dtype)
    for part in parts:
        shapes = {name: tuple(tensor.shape) for name, tensor in part.tensors.items()}
        assert shapes == dict(part.shape.tensors)
    units = torch.eye(weight.shape[1], dtype=torch.float64)
    return (added(parts, weight, own, units) - added(parts, weight, own, 0 * units)).T


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Random:
    """Random tensors of a seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def factors(self, *shape: int, size: float = 0.05) -> torch.Tensor:
        return 1 + self.normal(*shape, size=size)

    def weight(self, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
        """Rows and columns of unlike sizes; float32 holds its values."""
        spread = self.factors(rows, 1, size=0.3) * self.factors(1, columns, size=0.3)
        return (self.normal(rows, columns) * spread / columns**0.5).float().double()


def values(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """As a file holds them."""
    return [tensor.float() for tensor in tensors]


# ---- DoRA ----

INNER = ["lora", "lora with mid", "loha", "lokr", "lokr, in halves", "lokr, beside"]


def inner_delta(name: str, random: Random, rows: int = ROWS, columns: int = COLUMNS):
    """Tensors by role, and the dense delta without its scale."""
    if name == "lora":
        down, up = values(random.normal(4, columns), random.normal(rows, 4, size=0.1))
        return {"down": down, "up": up}, up.double() @ down.double()
    if name == "lora with mid":
        down, mid, up = values(
            random.normal(4, columns), random.normal(3, 4), random.normal(rows, 3, size=0.05)
        )
        return {"down": down, "mid": mid, "up": up}, up.double() @ mid.double() @ down.double()
    if name == "loha":
        shapes = ((rows, 2), (2, columns)) * 2
        own = values(*(random.normal(*shape, size=0.4) for shape in shapes))
        roles = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        wide = [tensor.double() for tensor in own]
        return dict(zip(roles, own, strict=True)), (wide[0] @ wide[1]) * (wide[2] @ wide[3])
    w1, w2 = values(random.normal(4, 4, size=0.3), random.normal(rows // 4, columns // 4, size=0.3))
    if name == "lokr, in halves":
        left, right = values(random.normal(rows // 4, 2), random.normal(2, columns // 4, size=0.1))
        delta = torch.kron(w1.double(), left.double() @ right.double())
        return {"lokr_w1": w1, "lokr_w2_a": left, "lokr_w2_b": right}, delta
    return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1.double(), w2.double())


def magnitude(random: Random, adapted: torch.Tensor, side: Side) -> torch.Tensor:
    """Lengths of rows (N, 1) or columns (1, K), off by some per cent."""
    axis = 1 if side is Side.OUT else 0
    return (
        (adapted.norm(dim=axis, keepdim=True))
        .mul(random.factors(*adapted.norm(dim=axis, keepdim=True).shape, size=0.03))
        .float()
    )


def decomposed(name: str, tensors, weight, side: Side, **options):
    place = Place(MODULE, side, options.pop("row_begin", 0), options.pop("row_count", ROWS))
    make = as_kron if name == "lokr, beside" else as_pair
    return make(tensors, weight, place, scale=SCALE, **options)


def dora_change(
    result, weight: torch.Tensor, strength: float = 1.0, *, scale: float = SCALE
) -> torch.Tensor:
    """(N, K) float64: strength (W' - W) of a DoRA's diagonal and inner delta."""
    diagonal = change(result.diagonal, weight, strength=strength)
    begin, count = result.diagonal.row_begin, result.diagonal.row_count
    if result.pair is not None:
        delta = result.pair.up.double() @ result.pair.down.double()
    else:
        w1, w2, rows, columns = result.kron
        delta = torch.kron(w1.double(), w2.double())
        delta = delta * (1.0 if rows is None else rows.double().unsqueeze(1))
        delta = delta * (1.0 if columns is None else columns.double())
    diagonal[begin : begin + count] += strength * scale * delta
    return diagonal


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("name", INNER)
def test_dora(name, side):
    random = Random(1)
    weight = random.weight()
    tensors, delta = inner_delta(name, random)
    m = magnitude(random, weight + SCALE * delta, side)
    result = decomposed(name, {**tensors, "dora_scale": m}, DenseWeight(weight), side)
    expected = reference.dora_weight(weight, SCALE * delta, m) - weight
    assert error(dora_change(result, weight), expected) < FORM
    assert error(dora_change(result, weight, -0.7), -0.7 * expected) < FORM


@pytest.mark.parametrize("name", ["lora", "loha", "lokr, beside"])
def test_dora_of_rows_stored_in_one_axis(name):
    random = Random(2)
    weight = random.weight(ROWS, ROWS)
    tensors, delta = inner_delta(name, random, ROWS, ROWS)
    m = magnitude(random, weight + SCALE * delta, Side.OUT).flatten()
    result = decomposed(name, {**tensors, "dora_scale": m}, DenseWeight(weight), Side.OUT)
    expected = reference.dora_weight(weight, SCALE * delta, m) - weight
    assert error(dora_change(result, weight), expected) < FORM


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("name", INNER)
def test_dora_of_some_rows_is_that_of_these_rows_alone(name, side):
    random = Random(3)
    fused = random.weight(3 * ROWS)
    begin = ROWS
    own = fused[begin : begin + ROWS]
    tensors, delta = inner_delta(name, random)
    tensors["dora_scale"] = magnitude(random, own + SCALE * delta, side)
    place = {"row_begin": begin, "row_count": ROWS}
    found = dora_change(decomposed(name, tensors, DenseWeight(fused), side, **place), fused)
    alone = dora_change(decomposed(name, tensors, DenseWeight(own), side), own)
    torch.testing.assert_close(found[begin : begin + ROWS], alone, rtol=1e-6, atol=1e-9)
    assert not found[:begin].any()
    assert not found[begin + ROWS :].any()


@pytest.mark.parametrize("side", Side)
def test_dora_takes_the_norms_of_the_weight_that_it_was_trained_on(side):
    """The layer's own weight is off by rounding: only <W, D> is taken of it."""
    random = Random(4)
    weight = random.weight()
    rounded = weight + random.normal(ROWS, COLUMNS, size=0.01)
    tensors, delta = inner_delta("lora", random)
    m = magnitude(random, weight + SCALE * delta, side)
    tensors["dora_scale"] = m
    axis = 1 if side is Side.OUT else 0
    norms = weight.square().sum(dim=axis)
    result = decomposed("lora", tensors, DenseWeight(rounded), side, norms=norms)
    adapted = weight.square().sum(dim=axis) + (
        (2 * SCALE * rounded + SCALE**2 * delta) * delta
    ).sum(dim=axis)
    expected = m.double().flatten() / adapted.sqrt() - 1
    assert error(result.diagonal.values, expected) < FORM


@pytest.mark.parametrize("side", Side)
def test_dora_that_was_not_trained_is_nothing(side):
    random = Random(5)
    weight = random.weight()
    tensors, _ = inner_delta("lora", random)
    tensors["up"].zero_()
    tensors["dora_scale"] = weight.norm(dim=1 if side is Side.OUT else 0).float()
    result = decomposed("lora", tensors, DenseWeight(weight), side)
    assert float(result.diagonal.values.abs().max()) < 1.2e-7
    assert not result.pair.up.any()


def test_dora_of_a_row_that_has_no_values():
    random = Random(6)
    weight = random.weight()
    weight[3] = 0
    tensors, _ = inner_delta("lora", random)
    tensors["up"][3] = 0
    tensors["dora_scale"] = torch.ones(ROWS, 1)
    tensors["dora_scale"][3] = 0
    result = decomposed("lora", tensors, DenseWeight(weight), Side.OUT)
    assert result.diagonal.values[3] == 0
    tensors["dora_scale"][3] = 0.5
    with pytest.raises(NonFiniteError, match=rf"`{MODULE}`.*norm of row 3, which is 0"):
        decomposed("lora", tensors, DenseWeight(weight), Side.OUT)


@pytest.mark.parametrize("role", ["dora_scale", "up"])
def test_dora_of_values_that_are_not_finite(role):
    random = Random(7)
    tensors, _ = inner_delta("lora", random)
    tensors["dora_scale"] = torch.ones(ROWS)
    tensors[role].view(-1)[5] = float("nan")
    with pytest.raises(NonFiniteError, match=f"`{MODULE}`.*its dora"):
        decomposed("lora", tensors, DenseWeight(random.weight()), Side.OUT)


# ---- IA3 ----


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("role", ["ia3", "ia3_l"])
def test_ia3(role, side):
    random = Random(8)
    weight, bias = random.weight(), random.normal(ROWS)
    length = ROWS if side is Side.OUT else COLUMNS
    (learned,) = values(random.normal(length, size=0.1))
    stored = learned if role == "ia3" else 1 + learned
    factors = stored.double() + (1 if role == "ia3" else 0)
    delta = ia3({role: stored}, module=MODULE, side=side, row_begin=0, row_count=ROWS)
    axis = 0 if side is Side.OUT else 1
    expected = reference.ia3_weight(weight, factors, axis) - weight
    assert error(change(delta, weight), expected) < FORM
    x = random.normal(3, COLUMNS)
    found = added(parts_of(delta, strength=0.5, bias=bias), weight, bias, x)
    wanted = 0.5 * x @ expected.T
    if role == "ia3_l" and side is Side.OUT:
        wanted = wanted + 0.5 * (factors - 1) * bias
    assert error(found, wanted) < FORM


def test_ia3_of_a_bias_that_holds_more_than_it_was_trained_on():
    """Ones that a converter has added, and what other LoRAs add, meet no factor."""
    random = Random(20)
    weight, own, kept = random.weight(), random.normal(ROWS), random.normal(ROWS)
    (stored,) = values(random.factors(ROWS, 1, size=0.1))
    delta = ia3({"ia3_l": stored}, module=MODULE, side=Side.OUT, row_begin=0, row_count=ROWS)
    parts = delta.scaled_parts(
        0.5, dtype=torch.float64, device=torch.device("cpu"), bias=own + kept, kept=kept
    )
    x = random.normal(3, COLUMNS)
    expected = 0.5 * (stored.double().flatten() - 1) * (x @ weight.T + own)
    assert error(added(parts, weight, own + kept, x), expected) < FORM


def test_ia3_of_values_that_are_not_finite():
    with pytest.raises(NonFiniteError, match=f"`{MODULE}`.*its ia3"):
        ia3(
            {"ia3": torch.tensor([0.1, float("inf")])},
            module=MODULE,
            side=Side.OUT,
            row_begin=0,
            row_count=2,
        )


# ---- GLoRA ----


@pytest.mark.parametrize("old", [False, True], ids=["today's layout", "the older layout"])
@pytest.mark.parametrize("begin", [0, ROWS])
def test_glora(old, begin):
    random = Random(9)
    weight = random.weight(begin + ROWS)
    a1, a2, b1, b2 = values(
        random.normal(COLUMNS, 3, size=0.2),
        random.normal(3, COLUMNS, size=0.2),
        random.normal(ROWS, 3, size=0.2),
        random.normal(3, COLUMNS, size=0.2),
    )
    own = weight[begin:]
    expected = reference.glora_weight(own, (a1, a2), (b1, b2), 1.0) - own
    stored = (a2, a1, b2, b1) if old else (a1, a2, b1, b2)
    roles = ("glora_a1", "glora_a2", "glora_b1", "glora_b2")
    tensors = dict(zip(roles, stored, strict=True))
    pair = glora(tensors, DenseWeight(weight), module=MODULE, row_begin=begin, row_count=ROWS)
    assert pair.rank == 6
    assert error(pair.up.double() @ pair.down.double(), expected) < FORM


def test_glora_of_values_that_are_not_finite():
    tensors = {f"glora_{name}": torch.ones(2, 2) for name in ("a1", "a2", "b1", "b2")}
    tensors["glora_b2"][0, 0] = float("nan")
    weight = DenseWeight(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(NonFiniteError, match=f"`{MODULE}`.*its glora"):
        glora(tensors, weight, module=MODULE, row_begin=0, row_count=2)


# ---- HRA ----


def householder(stored: torch.Tensor, weight: torch.Tensor, **options):
    return hra(
        {"hra_u": stored},
        DenseWeight(weight),
        module=MODULE,
        row_begin=0,
        row_count=len(weight),
        **options,
    )


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_hra(rank):
    random = Random(10)
    weight = random.weight()
    (directions,) = values(random.normal(COLUMNS, rank))
    pair = householder(directions, weight)
    assert pair.rank == rank
    expected = reference.hra_weight(weight, directions) - weight
    assert error(pair.up.double() @ pair.down.double(), expected) < FORM


def test_hra_of_orthonormal_directions():
    random = Random(11)
    weight = random.weight()
    (directions,) = values(random.normal(COLUMNS, 4))
    pair = householder(directions, weight, directions=Directions.ORTHONORMAL)
    basis = torch.linalg.qr(directions.double()).Q
    expected = -2 * weight @ basis @ basis.T
    assert error(pair.up.double() @ pair.down.double(), expected) < FORM


def test_hra_of_pairs_that_nearly_cancel_survives_sixteen_bits():
    """Directions start as equal pairs. A pair stored as it is written loses a fifth in bfloat16."""
    random = Random(12)
    weight = random.weight()
    half = random.normal(COLUMNS, 2)
    trained = half.repeat_interleave(2, dim=1) + random.normal(COLUMNS, 4, size=0.01)
    pair = householder(trained, weight)
    expected = reference.hra_weight(weight, trained) - weight
    up, down = pair.up.bfloat16().double(), pair.down.bfloat16().double()
    assert error(up @ down, expected) < HALF


def test_hra_of_a_direction_of_length_zero():
    random = Random(13)
    directions = random.normal(COLUMNS, 3)
    directions[:, 1] = 0
    with pytest.raises(NonFiniteError, match=f"`{MODULE}`.*its hra"):
        householder(directions, random.weight())


# ---- rotations ----

EXACT = RotationRule(Cayley.EXACT)


def rows_turned(tensors, rule=EXACT, *, begin=0, count=ROWS):
    return rotation_of_rows(tensors, rule, module=MODULE, row_begin=begin, row_count=count)


def each(blocks: torch.Tensor, transform) -> torch.Tensor:
    """A transform of every block (..., b, b)."""
    flat = blocks.flatten(0, -3)
    return torch.stack([transform(block) for block in flat]).view(blocks.shape)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(
    "shape", [(6, 8, 8), (1, 6, 8, 8), (2, 6, 8, 8), (3, 12, 4, 4), (5, 16, 3 * 2, 6)], ids=str
)
def test_rotated_rows(shape, rescaled, alpha):
    random = Random(14)
    rows = shape[-3] * shape[-1]
    weight, bias = random.weight(rows), random.normal(rows)
    (blocks,) = values(random.normal(*shape, size=0.1))
    tensors = {"oft_blocks": blocks}
    if rescaled:
        (tensors["oft_rescale"],) = values(random.factors(rows, 1))
    rule = RotationRule(Cayley.EXACT, constraint=alpha)
    delta = rows_turned(tensors, rule, count=rows)
    skew = reference.constrained_skews(blocks, alpha * rows)
    if alpha:
        # Or the constraint would not be tested.
        assert float((blocks - blocks.mT).norm()) > 1.5 * alpha * rows
    turned = reference.diag_oft_weight if len(shape) == 3 else reference.boft_weight
    adapted = turned(weight, each(skew, reference.cayley), tensors.get("oft_rescale"))
    for strength in (1.0, -0.7):
        found = change(delta, weight, strength=strength, bias=bias)
        assert error(found, strength * (adapted - weight)) < FORM
    at_zero = added(parts_of(delta, bias=bias), weight, bias, torch.zeros(1, COLUMNS).double())
    assert not at_zero.any()


RULES = {
    "series": (RotationRule(Cayley.NEUMANN), reference.cayley_series),
    "solved": (RotationRule(Cayley.SOLVE), lambda skew: reference.cayley(-skew)),
    "shared": (RotationRule(Cayley.NEUMANN, shared=True), reference.cayley_series),
    "scaled": (
        RotationRule(Cayley.NEUMANN, scaled=True),
        lambda skew: reference.cayley_series(skew / (2 * (len(skew) - 1) ** 0.5)),
    ),
}


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", RULES)
def test_rotated_inputs(name, size):
    random = Random(15)
    weight = random.weight()
    rule, transform = RULES[name]
    count = COLUMNS // size
    (stored,) = values(random.normal(1 if rule.shared else count, size * (size - 1) // 2, size=0.1))
    delta = oft_of_inputs(
        {"oft_r": stored}, rule, module=MODULE, columns=COLUMNS, row_begin=0, row_count=ROWS
    )
    rotations = [transform(reference.skew_of_triangle(row, size)) for row in stored]
    blocks = torch.stack(rotations * (count if rule.shared else 1))
    expected = reference.input_oft_weight(weight, blocks) - weight
    assert error(change(delta, weight, strength=-0.7), -0.7 * expected) < FORM


def test_rotated_inputs_with_factors_on_rows():
    random = Random(16)
    weight, bias = random.weight(), random.normal(ROWS)
    blocks, scale = values(random.normal(1, 4, 8, 8, size=0.2), random.factors(ROWS, 1))
    delta = boft_of_inputs(
        {"boft_r": blocks, "boft_s": scale},
        module=MODULE,
        columns=COLUMNS,
        row_begin=0,
        row_count=ROWS,
    )
    skew = (blocks[0].double() - blocks[0].double().mT) / 2
    rotations = each(skew, lambda own: reference.cayley(-own))
    expected = reference.input_oft_weight(weight, rotations, scale) - weight
    assert error(change(delta, weight, strength=-0.7, bias=bias), -0.7 * expected) < FORM
    at_zero = added(parts_of(delta, bias=bias), weight, bias, torch.zeros(1, COLUMNS).double())
    assert not at_zero.any()


def test_small_rotations_survive_sixteen_bits():
    """What is rounded is the difference from the identity; a unit of bfloat16 at 1 is 2^-7."""
    random = Random(17)
    weight = random.weight()
    (blocks,) = values(random.normal(6, 8, 8, size=1e-4))
    delta = rows_turned({"oft_blocks": blocks})
    skew = reference.constrained_skews(blocks, 0.0)
    expected = reference.diag_oft_weight(weight, each(skew, reference.cayley)) - weight
    assert error(change(delta, weight, dtype=torch.bfloat16), expected) < HALF


def test_rotated_rows_of_a_fused_layer_are_those_of_these_rows_alone():
    random = Random(18)
    fused = random.weight(3 * ROWS)
    bias = random.normal(3 * ROWS)
    (blocks,) = values(random.normal(2, 6, 8, 8, size=0.1))
    found = change(rows_turned({"oft_blocks": blocks}, begin=ROWS), fused, bias=bias)
    alone = change(rows_turned({"oft_blocks": blocks}), fused[ROWS : 2 * ROWS])
    torch.testing.assert_close(found[ROWS : 2 * ROWS], alone)
    assert not found[:ROWS].any()
    assert not found[2 * ROWS :].any()


@given(st.integers(1, 9), st.floats(1e-6, 3.0), st.sampled_from([Cayley.EXACT, Cayley.SOLVE]))
def test_rotations_are_orthogonal(size, spread, cayley):
    random = Random(size)
    blocks = random.normal(3, size, size, size=spread)
    eye = torch.eye(size, dtype=torch.float64)
    rotation = turn(blocks - blocks.mT, cayley) + eye
    torch.testing.assert_close(rotation @ rotation.mT, eye.expand(3, size, size))
    assert torch.linalg.det(rotation).allclose(torch.ones(3, dtype=torch.float64))


@given(st.integers(2, 9))
def test_transforms_differ_in_order_and_sense(size):
    """The series is the exact transform up to the fourth power; what is solved turns back."""
    blocks = Random(size).normal(2, size, size, size=1e-3)
    skew = blocks - blocks.mT
    exact = turn(skew, Cayley.EXACT)
    assert error(turn(skew, Cayley.NEUMANN), exact) < 1e-6
    assert error(turn(skew, Cayley.SOLVE), exact.mT) < 1e-12


@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 4))
def test_butterfly(stage, pairs, half):
    """Permuting, multiplying blocks and putting back is what the permutation's own order says."""
    count, size = pairs * 2**stage, 2 * half
    order = butterfly_order(count, size, stage)
    rows = count * size
    assert order.tolist() == [reference.butterfly_row(p, size, stage) for p in range(rows)]
    assert sorted(order.tolist()) == list(range(rows))
    random = Random(rows)
    blocks, values = random.normal(count, size, size), random.normal(2, rows)
    expected = torch.zeros_like(values)
    expected[:, order] = values[:, order] @ reference.block_diagonal(blocks).T
    torch.testing.assert_close(butterfly_stage(values, blocks, stage), expected)


@pytest.mark.parametrize(("count", "size", "stage"), [(6, 8, 2), (5, 8, 1), (4, 3, 0)])
def test_rows_that_have_no_butterfly(count, size, stage):
    with pytest.raises(ValueError, match="have no butterfly"):
        butterfly_order(count, size, stage)
    blocks = torch.zeros(stage + 1, count, size, size)
    with pytest.raises(ValueError, match="have no butterfly"):
        butterfly_stage(torch.zeros(count * size), blocks[0], stage)
    with pytest.raises(ShapeMismatchError, match=f"`{MODULE}`"):
        rows_turned({"oft_blocks": blocks}, count=count * size)


def test_rotations_that_do_not_fit():
    with pytest.raises(ShapeMismatchError, match="do not turn 48 rows"):
        rows_turned({"oft_blocks": torch.zeros(5, 8, 8)})
    inputs = {"module": MODULE, "columns": COLUMNS, "row_begin": 0, "row_count": ROWS}
    rule = RotationRule(Cayley.NEUMANN)
    for shape in [(3, 28), (4, 27), (1, 28)]:
        with pytest.raises(ShapeMismatchError, match="do not turn 32 inputs"):
            oft_of_inputs({"oft_r": torch.zeros(shape)}, rule, **inputs)
    scale = torch.ones(ROWS, 1)
    with pytest.raises(ShapeMismatchError, match="do not turn 32 inputs"):
        boft_of_inputs({"boft_r": torch.zeros(1, 3, 8, 8), "boft_s": scale}, **inputs)
    with pytest.raises(UnsupportedAdapterError, match="2 butterfly factors; one is supported"):
        boft_of_inputs({"boft_r": torch.zeros(2, 4, 8, 8), "boft_s": scale}, **inputs)


def test_rotations_of_values_that_are_not_finite():
    blocks = torch.zeros(6, 8, 8)
    blocks[1, 2, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=f"`{MODULE}`.*its rotation"):
        rows_turned({"oft_blocks": blocks})


# ---- what does nothing, and values that are replaced ----


def test_deltas_of_nothing_are_zero():
    zeros = torch.zeros(6, 8, 8)
    assert rows_turned({"oft_blocks": zeros, "oft_rescale": torch.ones(ROWS, 1)}).zero
    assert not rows_turned({"oft_blocks": zeros, "oft_rescale": torch.full((ROWS,), 0.9)}).zero
    place = {"module": MODULE, "side": Side.OUT, "row_begin": 0, "row_count": 4}
    assert ia3({"ia3_l": torch.ones(4, 1)}, **place).zero
    assert not ia3({"ia3": torch.ones(4)}, **place).zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_set_values_take_the_place_of_the_base_s(dtype):
    random = Random(19)
    base, value = random.normal(12, 5).to(dtype), random.normal(12, 5, size=1e-3).to(dtype)
    delta = set_delta(value, base, module=MODULE)
    assert torch.equal((base.double() + delta).to(dtype), value)
    # As a 1x1 convolution stores it.
    assert torch.equal(set_delta(value[:, :, None, None], base, module=MODULE), delta)
    with pytest.raises(NonFiniteError, match=f"`{MODULE}`.*its set_weight"):
        set_delta(value / 0, base, module=MODULE)
