"""Factors packed and unpacked in host memory: what `qwenlora.pack` defines, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenlora import _core
from qwenlora.packing import factor as lowrank
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]


def values(*shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@given(
    tiles=st.integers(0, 5),
    rank=st.integers(0, 40),
    side=st.sampled_from(LowRankSide),
    dtype=st.sampled_from(DTYPES),
    turned=st.booleans(),
)
def test_both_ways_are_those_of_torch(tiles, rank, side, dtype, turned):
    shape = (rank, 16 * tiles) if side is LowRankSide.DOWN else (16 * tiles, rank)
    logical = values(*(reversed(shape) if turned else shape), dtype=dtype)
    logical = logical.T if turned else logical
    packed = lowrank.pack_factor(logical, side)
    same(packed, pack.pack_lowrank(logical, side))
    same(lowrank.unpack_factor(packed, side), pack.unpack_lowrank(packed, side))


@pytest.mark.parametrize("side", LowRankSide)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [(), (16,), (5, 33), (48, 1, 16)])
@pytest.mark.parametrize("rest", [0, 32])
def test_factors_join_a_base(side, dtype, ranks, rest):
    """In Rust, or in torch where a dtype has another size: the base, each factor, zeros."""

    def logical(rank):
        shape = (rank, 64) if side is LowRankSide.DOWN else (64, rank)
        return torch.randn(shape).to(dtype)

    base, factors = logical(48), [logical(rank) for rank in ranks]
    padded = [pack.unpack_lowrank(pack.pack_lowrank(own, side), side) for own in factors]
    axis = 0 if side is LowRankSide.DOWN else 1
    whole = torch.cat([base.narrow(axis, 0, 32), *padded], dim=axis)
    joined = torch.full((64, whole.shape[axis] + rest), 7, dtype=dtype)
    zeros = whole.new_zeros((rest, 64) if side is LowRankSide.DOWN else (64, rest))
    packed = pack.pack_lowrank(base, side)
    lowrank.join_factors(joined, packed, factors, side, base_rank=32)
    same(joined, pack.pack_lowrank(torch.cat([whole, zeros], dim=axis), side))


@pytest.mark.parametrize("side", LowRankSide)
def test_one_rank_with_any_strides(side):
    """A contiguous tensor may have any strides along axes of size 1."""
    logical = (
        values(32, 1, dtype=torch.half).T
        if side is LowRankSide.DOWN
        else values(1, 32, dtype=torch.half).T
    )
    same(lowrank.pack_factor(logical, side), pack.pack_lowrank(logical, side))


@pytest.mark.parametrize("side", LowRankSide)
@pytest.mark.parametrize("threads", [1, 3])
def test_large_factors(side, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logical = values(
            *((72, 3072) if side is LowRankSide.DOWN else (3072, 72)), dtype=torch.half
        )
        packed = lowrank.pack_factor(logical, side)
        same(packed, pack.pack_lowrank(logical, side))
        same(lowrank.unpack_factor(packed, side), pack.unpack_lowrank(packed, side))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("side", LowRankSide)
def test_what_does_not_fit_is_refused_as_torch_refuses_it(side):
    for shape, words in [((16, 16, 16), "2 axes|2-D"), ((24, 24), "multiple of 16")]:
        for function in (lowrank.pack_factor, lowrank.unpack_factor):
            with pytest.raises(ValueError, match=words):
                function(torch.zeros(shape), side)


def test_parameters_are_packed_too():
    logical = torch.nn.Parameter(values(16, 32, dtype=torch.float32))
    packed = lowrank.pack_factor(logical, LowRankSide.DOWN)
    assert not packed.requires_grad
    same(packed, pack.pack_lowrank(logical.detach(), LowRankSide.DOWN))


def unpack(source, dest, **wanted):
    options = {"side": "up", "channels": 16, "element_bytes": 2, "threads": 1} | wanted
    _core.unpack_factor(source.view(torch.uint8).numpy(), dest.view(torch.uint8).numpy(), **options)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"side": "left"}, "a side is `down` or `up`"),
        ({"channels": 8}, "channels must be a multiple of 16"),
        ({"channels": 48}, "take a multiple of 1536"),
        ({"element_bytes": 8}, "elements have 2 or 4 bytes, got 8"),
        ({"threads": 0}, "."),
    ],
)
def test_arguments_that_do_not_fit(wanted, words):
    dest = torch.zeros(512, dtype=torch.half)
    with pytest.raises((ValueError, OverflowError), match=words):
        unpack(torch.ones(512, dtype=torch.half), dest, **wanted)
    assert not dest.any()


def test_memory_is_not_unpacked_into_itself():
    both = torch.ones(512, dtype=torch.half)
    with pytest.raises(ValueError, match="overlaps"):
        unpack(both[:256], both[128:384])
    with pytest.raises(ValueError, match="unpacked into"):
        unpack(both[:256], torch.zeros(512, dtype=torch.half))
