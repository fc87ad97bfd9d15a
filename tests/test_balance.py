"""The powers of two that keep factors out of subnormal numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.balance import MOST, exponent_beside, exponent_of, loses_small_values

HALF = torch.float16
peaks = st.floats(2**-60, 2**15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("peak", [1.0, 1e-7, 1e-30])
def test_a_dtype_with_float32s_exponents_moves_nothing(dtype, peak):
    assert exponent_of(peak, dtype) == exponent_beside(peak, 1.0, dtype) == 0
    assert not loses_small_values(torch.tensor([peak / 3]), dtype)


@pytest.mark.parametrize(
    ("peak", "exponent"),
    [
        (1.0, 0),
        (2**-7, 0),
        (2**-7 - 2**-20, 1),
        (2**-8, 1),
        (3e-7, 15),
        (2**-24, 17),
        (1e-40, MOST),
    ],
)
def test_the_largest_value_gets_its_room(peak, exponent):
    assert exponent_of(peak, HALF) == exponent


@pytest.mark.parametrize("peak", [0.0, math.inf, math.nan])
def test_what_has_no_magnitude_moves_nothing(peak):
    assert exponent_of(peak, HALF) == 0
    assert exponent_beside(peak, 1.0, HALF) == exponent_beside(1e-7, peak, HALF) == 0


@given(peak=peaks)
def test_moving_is_least_and_enough(peak):
    exponent = exponent_of(peak, HALF)
    moved = peak * 2.0**exponent
    assert moved >= 2**-7
    assert exponent == 0 or moved < 2**-6


@given(peak=peaks, above=st.integers(0, 40))
def test_the_largest_of_all_does_not_overflow(peak, above):
    largest = peak * 2.0**above
    exponent = exponent_of(peak, HALF, largest=largest)
    assert 0 <= exponent <= exponent_of(peak, HALF)
    assert exponent == 0 or largest * 2.0**exponent < 2**15
    assert peak * 2.0**exponent >= 2**-7 or largest * 2.0 ** (exponent + 1) >= 2**15


@given(up=peaks, down=peaks)
def test_down_gives_what_it_can_spare_and_else_both_are_alike(up, down):
    exponent = exponent_beside(up, down, HALF)
    assert 0 <= exponent <= exponent_of(up, HALF)
    up_moved, down_moved = up * 2.0**exponent, down * 2.0**-exponent
    if up_moved >= 2**-7 or exponent == 0:
        return
    # Neither has its room: then they are alike, or `down` is the smaller one from the start.
    assert 2**-2 < up_moved / down_moved < 2**2 or down_moved < 2**-6


@pytest.mark.parametrize(
    ("values", "loses"),
    [
        ([1.0, 0.1, 2**-14], False),
        ([2**-24, 3 * 2**-24, 1.0], False),
        ([1.5 * 2**-24], True),
        ([2**-26, 1.0], True),
        ([-1e-7], True),
        ([0.0, -0.0], False),
        ([], False),
    ],
)
def test_what_is_lost(values, loses):
    wide = torch.tensor(values, dtype=torch.float64)
    assert loses_small_values(wide, HALF) == loses
    assert not loses_small_values(wide.to(HALF), HALF)


def test_float8_is_judged_too():
    values = torch.tensor([2.0**-9, 1.0]).to(torch.float8_e4m3fn)
    assert not loses_small_values(values, HALF)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8])
def test_the_product_is_that_of_unbounded_exponents(size):
    """The error of a moved factor is that of rounding alone; the others' is the subnormals'."""
    up = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * size
    factor = 2.0 ** exponent_of(float(up.abs().max()), HALF)
    moved = (up * factor).to(HALF).double() / factor
    assert float((moved - up).norm() / up.norm()) < 2.5e-4
