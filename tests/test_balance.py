"""The powers of two that keep factors out of subnormal numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.delta.balance import MOST, RankPeaks, balanced, exponent_of, loses_small_values

HALF = torch.float16
peaks = st.floats(2**-60, 2**15)


def exponent_beside(up, down):
    """Of one rank, whose values are its peaks."""
    one, other = torch.tensor([up]), torch.tensor([down])
    peaks = RankPeaks(one, one, other, torch.tensor([True]))
    return int(peaks.exponents(HALF))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("peak", [1.0, 1e-7, 1e-30])
def test_a_dtype_with_float32s_exponents_moves_nothing(dtype, peak):
    assert exponent_of(peak, dtype) == 0
    down, up = torch.full((2, 3), peak), torch.full((3, 2), peak / 3)
    for half, whole in zip(balanced(down, up, dtype), (down, up), strict=True):
        assert torch.equal(half, whole.to(dtype))
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
    assert exponent_beside(peak, 1.0) == exponent_beside(1e-7, peak) == 0


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
    exponent = exponent_beside(up, down)
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


@pytest.mark.parametrize("size", [3e-3, 1e-5, 1e-7, 3e-8])
def test_a_balanced_pair_keeps_the_product(size):
    """Rank by rank: each has a magnitude of its own."""
    generator = torch.Generator().manual_seed(0)
    down = 0.018 * (2 * torch.rand(16, 256, generator=generator) - 1)
    up = size * torch.randn(512, 16, generator=generator) * 2.0 ** torch.arange(-4, 12)
    exact = up.double() @ down.double()

    def error(down, up):
        return float((up.double() @ down.double() - exact).norm() / exact.norm())

    bare, found = error(down.half(), up.half()), error(*balanced(down, up, HALF))
    assert found < max(1e-3, bare / 50)
    assert found < 4e-4 or size < 1e-6


def test_ranks_that_lose_nothing_stay_bit_for_bit():
    """Small values that float16 holds exactly move nothing, beside others that do."""
    down = torch.full((2, 16), 2.0**-6)
    up = torch.stack([torch.full((16,), 2.0**-20), torch.full((16,), 1.1 * 2.0**-20)], dim=1)
    moved_down, moved_up = balanced(down, up, HALF)
    assert torch.equal(moved_down[0], down[0].half())
    assert torch.equal(moved_up[:, 0], up[:, 0].half())
    assert not torch.equal(moved_down[1], down[1].half())


@given(st.integers(0, 2**32 - 1))
def test_the_order_of_ranks_and_rows_changes_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(5, 8, generator=generator), torch.randn(12, 5, generator=generator)
    up *= 2.0 ** torch.randint(-30, 3, (5,), generator=generator)
    ranks, rows = torch.randperm(5, generator=generator), torch.randperm(12, generator=generator)
    one_down, one_up = balanced(down, up, HALF)
    other_down, other_up = balanced(down[ranks], up[rows][:, ranks], HALF)
    assert torch.equal(one_down[ranks], other_down)
    assert torch.equal(one_up[rows][:, ranks], other_up)


@pytest.mark.parametrize("size", [1e-5, 1e-6])
def test_parts_that_share_a_rank_are_all_kept(size):
    """A small projection beside a large one, over one `down`."""
    generator = torch.Generator().manual_seed(0)
    down = 0.018 * (2 * torch.rand(8, 256, generator=generator) - 1)
    parts = [scale * torch.randn(64, 8, generator=generator) / 32 for scale in (1e-2, 1e-2, size)]
    moved_down, moved_up = balanced(down, torch.cat(parts), HALF, parts=3)
    for own, found in zip(parts, moved_up.chunk(3), strict=True):
        exact = own.double() @ down.double()
        error = (found.double() @ moved_down.double() - exact).norm() / exact.norm()
        assert float(error) < (1e-3 if size > 1e-6 else 2e-3)
