"""Packed layouts: against the slow reference, against Nunchaku's own bytes, and as bijections."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwenlora import _reference
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide, round_up

VECTORS = Path(__file__).parent / "data" / "vectors"
SIDES = list(LowRankSide)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

few_examples = settings(deadline=None, max_examples=40)


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def pattern(*shape, dtype=torch.bfloat16):
    integers = INTEGERS[torch.empty(0, dtype=dtype).element_size()]
    return torch.arange(math.prod(shape)).to(integers).view(dtype).reshape(shape)


def nibbles(rows, columns):
    index = torch.arange(rows * columns, dtype=torch.int64)
    return ((index * 2654435761 >> 13) % 16).reshape(rows, columns)


def lowrank_shape(rank, channels, side):
    return (rank, channels) if side is LowRankSide.DOWN else (channels, rank)


# ---- the slow reference ----


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rank", "channels"), [(1, 16), (16, 32), (20, 48), (32, 16)])
def test_lowrank_equals_reference(side, dtype, rank, channels):
    logical = pattern(*lowrank_shape(rank, channels, side), dtype=dtype)
    packed = pack.pack_lowrank(logical, side)
    expected = _reference.pack_lowrank(logical, side)
    assert packed.shape == (channels, round_up(rank, 16))
    assert packed.is_contiguous()
    assert packed.dtype == dtype
    assert torch.equal(bits(packed), bits(expected))
    unpacked = pack.unpack_lowrank(packed, side)
    assert torch.equal(bits(unpacked), bits(_reference.unpack_lowrank(packed, side)))


@pytest.mark.parametrize("side", SIDES)
def test_lowrank_moves_float8_bits(side):
    logical = pattern(*lowrank_shape(20, 32, side), dtype=torch.uint8)
    packed = pack.pack_lowrank(logical.view(torch.float8_e4m3fn), side)
    assert packed.dtype == torch.float8_e4m3fn
    assert torch.equal(packed.view(torch.uint8), pack.pack_lowrank(logical, side))


def test_vector_equals_reference():
    logical = pattern(160)
    packed = pack.pack_vector(logical)
    assert torch.equal(bits(packed), bits(_reference.pack_vector(logical)))
    assert torch.equal(bits(pack.unpack_vector(logical)), bits(_reference.unpack_vector(logical)))


def test_svdq_weight_and_scales_equal_reference():
    values = (nibbles(128, 192) - 8).to(torch.int8)
    packed = pack.pack_svdq_qweight(values)
    assert torch.equal(packed, _reference.pack_svdq_qweight(values))
    assert torch.equal(pack.unpack_svdq_qweight(packed), values)
    assert torch.equal(_reference.unpack_svdq_qweight(packed), values)
    scales = pattern(256, 3)
    packed_scales = pack.pack_svdq_wscales(scales)
    assert packed_scales.shape == (3, 256)
    assert torch.equal(bits(packed_scales), bits(_reference.pack_svdq_wscales(scales)))
    assert torch.equal(bits(_reference.unpack_svdq_wscales(packed_scales)), bits(scales))


def test_micro_scales_equal_reference():
    scales = pattern(256, 12)
    packed = pack.pack_svdq_micro_scales(scales)
    assert packed.shape == (12, 256)
    assert torch.equal(bits(packed), bits(_reference.pack_svdq_micro_scales(scales)))
    assert torch.equal(bits(pack.unpack_svdq_micro_scales(packed)), bits(scales))


def test_awq_weight_equals_reference():
    values = nibbles(12, 128).to(torch.uint8)
    packed = pack.pack_awq_qweight(values)
    assert packed.shape == (3, 64)
    assert torch.equal(packed, _reference.pack_awq_qweight(values))
    assert torch.equal(_reference.unpack_awq_qweight(packed), values)


@pytest.mark.parametrize("planes", [2, 6])
def test_modulation_equals_reference(planes):
    rows = pattern(24, 5)
    interleaved = pack.interleave_modulation(rows, planes=planes)
    assert torch.equal(bits(interleaved), bits(_reference.interleave_modulation(rows, planes)))
    restored = _reference.deinterleave_modulation(interleaved, planes)
    assert torch.equal(bits(restored), bits(rows))


# ---- Nunchaku's own bytes ----


@pytest.mark.parametrize("name", sorted(load_file(VECTORS / "lowrank.safetensors")))
def test_lowrank_equals_nunchaku(name):
    side_name, _, size = name.partition("_")
    logical = pattern(*map(int, size.split("x")))
    packed = pack.pack_lowrank(logical, LowRankSide(side_name))
    expected = load_file(VECTORS / "lowrank.safetensors")[name]
    assert torch.equal(bits(packed), expected)


def test_vector_and_scales_equal_nunchaku():
    expected = load_file(VECTORS / "scale.safetensors")
    assert torch.equal(bits(pack.pack_vector(pattern(256))), expected["vector_256"])
    wscales = pack.pack_svdq_wscales(pattern(256, 3))
    assert torch.equal(bits(wscales), expected["wscales_256x3"])
    magnitudes = (torch.arange(256 * 8) % 127).to(torch.uint8).view(256, 8)
    assert torch.equal(pack.pack_svdq_micro_scales(magnitudes), expected["micro_scales_256x8"])


def test_quantized_weights_equal_nunchaku():
    svdq = load_file(VECTORS / "svdq_qweight.safetensors")["svdq_256x128"]
    values = (nibbles(256, 128) - 8).to(torch.int8)
    assert torch.equal(pack.pack_svdq_qweight(values), svdq)
    awq = load_file(VECTORS / "awq_qweight.safetensors")["awq_12x128"]
    packed = pack.pack_awq_qweight(nibbles(12, 128).to(torch.uint8))
    assert torch.equal(packed.view(torch.int16), awq)


def test_modulation_equals_nunchaku():
    expected = load_file(VECTORS / "modulation.safetensors")["modulation_48x3"]
    assert torch.equal(bits(pack.interleave_modulation(pattern(48, 3))), expected)


# ---- bijections ----


@few_examples
@given(
    side=st.sampled_from(SIDES),
    rank=st.integers(1, 70),
    tiles=st.integers(1, 7),
    seed=st.integers(0, 2**31),
)
def test_lowrank_round_trip(side, rank, tiles, seed):
    channels = 16 * tiles
    generator = torch.Generator().manual_seed(seed)
    logical = torch.randn(lowrank_shape(rank, channels, side), generator=generator)
    unpacked = pack.unpack_lowrank(pack.pack_lowrank(logical, side), side)
    rank_axis = 0 if side is LowRankSide.DOWN else 1
    kept, padding = unpacked.split([rank, round_up(rank, 16) - rank], dim=rank_axis)
    assert torch.equal(kept, logical)
    assert not padding.any()


@few_examples
@given(n_tiles=st.integers(1, 3), k_tiles=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_quantized_round_trips(n_tiles, k_tiles, seed):
    generator = torch.Generator().manual_seed(seed)
    signed = torch.randint(
        -8, 8, (128 * n_tiles, 64 * k_tiles), generator=generator, dtype=torch.int8
    )
    assert torch.equal(pack.unpack_svdq_qweight(pack.pack_svdq_qweight(signed)), signed)
    unsigned = torch.randint(
        0, 16, (4 * n_tiles, 64 * k_tiles), generator=generator, dtype=torch.uint8
    )
    assert torch.equal(pack.unpack_awq_qweight(pack.pack_awq_qweight(unsigned)), unsigned)
    scales = torch.randn(128 * n_tiles, k_tiles, generator=generator)
    assert torch.equal(pack.unpack_svdq_wscales(pack.pack_svdq_wscales(scales)), scales)
    vector = torch.randn(16 * n_tiles, generator=generator)
    assert torch.equal(pack.unpack_vector(pack.pack_vector(vector)), vector)


@few_examples
@given(
    planes=st.integers(1, 7),
    channels=st.integers(1, 9),
    dim=st.sampled_from([0, 1, 2, -1, -2, -3]),
)
def test_modulation_round_trip_along_any_axis(planes, channels, dim):
    shape = [2, 3, 4]
    shape[dim] = planes * channels
    rows = torch.arange(math.prod(shape)).reshape(shape)
    interleaved = pack.interleave_modulation(rows, planes=planes, dim=dim)
    assert torch.equal(
        interleaved.movedim(dim, 0), pack.interleave_modulation(rows.movedim(dim, 0), planes=planes)
    )
    restored = pack.deinterleave_modulation(interleaved, planes=planes, dim=dim)
    assert torch.equal(restored, rows)


# ---- what the engine builds on ----


@pytest.mark.parametrize("side", SIDES)
def test_packed_append_equals_packed_concatenation(side):
    channels, rank_axis = 48, 0 if side is LowRankSide.DOWN else 1
    base = torch.randn(lowrank_shape(32, channels, side))
    added = torch.randn(lowrank_shape(16, channels, side))
    fragments = [
        pack.pack_lowrank(part, side).view(channels // 16, -1, 256) for part in (base, added)
    ]
    appended = torch.cat(fragments, dim=1).reshape(channels, 48)
    assert torch.equal(appended, pack.pack_lowrank(torch.cat([base, added], rank_axis), side))


def test_results_never_share_memory_with_arguments():
    # one channel, or one plane: the permutation is the identity
    rows = torch.randn(6, 4)
    assert pack.interleave_modulation(rows).data_ptr() != rows.data_ptr()
    assert pack.deinterleave_modulation(rows, planes=1).data_ptr() != rows.data_ptr()


def test_non_contiguous_arguments():
    logical = torch.randn(48, 32)
    packed = pack.pack_lowrank(logical, LowRankSide.DOWN)
    strided = logical.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(pack.pack_lowrank(strided, LowRankSide.DOWN), packed)
    padded = torch.empty(32, 96)
    padded[:, :48] = packed
    sliced = padded[:, :48]
    assert torch.equal(pack.unpack_lowrank(sliced, LowRankSide.DOWN), logical)


def test_rank_zero_packs_to_nothing():
    for side in SIDES:
        packed = pack.pack_lowrank(torch.empty(lowrank_shape(0, 32, side)), side)
        assert packed.shape == (32, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pack.pack_lowrank(torch.zeros(16, 20), LowRankSide.DOWN),
            "channels must be a multiple of 16, got 20 in shape: (16, 20)",
        ),
        (
            lambda: pack.pack_lowrank(torch.zeros(16, 16, 1), LowRankSide.UP),
            "`logical` must have 2 axes, got shape: (16, 16, 1)",
        ),
        (
            lambda: pack.unpack_lowrank(torch.zeros(16, 20), LowRankSide.UP),
            "rank must be a multiple of 16, got 20 in shape: (16, 20)",
        ),
        (
            lambda: pack.pack_vector(torch.zeros(24)),
            "channels must be a multiple of 16, got 24 in shape: (24,)",
        ),
        (
            lambda: pack.pack_svdq_qweight(torch.zeros(64, 64, dtype=torch.int8)),
            "rows must be a multiple of 128, got 64 in shape: (64, 64)",
        ),
        (
            lambda: pack.pack_svdq_qweight(torch.zeros(128, 64)),
            "`values` must be torch.int8, got torch.float32 of shape: (128, 64)",
        ),
        (
            lambda: pack.pack_awq_qweight(torch.full((4, 64), 16, dtype=torch.uint8)),
            "`values` must lie in [0, 15], got [16, 16] in shape: (4, 64)",
        ),
        (
            lambda: pack.interleave_modulation(torch.zeros(20)),
            "axis 0 must be a multiple of 6, got 20 in shape: (20,)",
        ),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared whole
        call()
    assert str(caught.value) == message


def test_fused_delta_is_the_block_diagonal_product():
    generator = torch.Generator().manual_seed(0)
    down_q, up_q = torch.randn(2, 6, generator=generator), torch.randn(4, 2, generator=generator)
    down_v, up_v = torch.randn(3, 6, generator=generator), torch.randn(4, 3, generator=generator)
    parts = [
        _reference.LowRankPart(down_q, up_q, row_begin=0, scale=0.5),
        _reference.LowRankPart(down_v, up_v, row_begin=8, scale=-2.0),
    ]
    stacked = torch.cat([down_q, down_v]).double()
    block_diagonal = torch.zeros(12, 5, dtype=torch.float64)
    block_diagonal[0:4, 0:2] = 0.5 * up_q
    block_diagonal[8:12, 2:5] = -2.0 * up_v
    delta = _reference.fused_delta(parts, out_features=12)
    torch.testing.assert_close(delta, block_diagonal @ stacked, rtol=1e-12, atol=1e-12)
