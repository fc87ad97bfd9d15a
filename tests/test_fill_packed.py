"""`fill_packed` against torch, which joins logically and permutes: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlora import _core
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide, round_up

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {2: torch.int16, 4: torch.int32}


def raw(tensor):
    """A tensor's bytes as they cross to Rust."""
    return tensor.view(torch.uint8).numpy()


def random(*shape, dtype, seed=0):
    """Any bits, those of NaN included."""
    generator = torch.Generator().manual_seed(seed)
    integers = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integers)
    values = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integers)
    return values.view(dtype)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def empty(channels, ranks, dtype):
    """A destination that holds something else."""
    return torch.full((channels, ranks), 7.0, dtype=dtype)


def filled(dest, columns, *, threads=2):
    """A factor of one slot, or of several where the destination has a third axis."""
    slots = dest.shape[0] if dest.ndim == 3 else 1
    recipe = (raw(dest), slots, dest.shape[-2], dest.itemsize, columns)
    _core.fill_packed([recipe], threads=threads)
    return dest


def joined(packed):
    """(channels, R) packed tensors side by side, as fragments."""
    channels, width = packed[0].shape[0], sum(p.shape[1] for p in packed)
    tiles = [p.view(channels // 16, -1, 256) for p in packed]
    return torch.cat(tiles, dim=1).view(channels, width)


# ---- composed slots ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(16,), (64, 32, 16), (20, 8), (1, 33)])
def test_loras_after_a_base(dtype, ranks):
    channels = 96
    base_down = random(channels, 32, dtype=dtype)
    base_up = random(channels, 32, dtype=dtype, seed=1)
    downs = [random(r, channels, dtype=dtype, seed=2 + r) for r in ranks]
    ups = [random(channels, r, dtype=dtype, seed=3 + r) for r in ranks]
    total = 32 + sum(round_up(r, 16) for r in ranks)
    tiles = [round_up(r, 16) // 16 for r in ranks]
    down_columns = [
        ("down", count, [(raw(d), r, 0)]) for count, r, d in zip(tiles, ranks, downs, strict=True)
    ]
    up_columns = [
        ("up", count, [(raw(u), None, 0, channels, r, 0)])
        for count, r, u in zip(tiles, ranks, ups, strict=True)
    ]
    base = [("fragments", [(raw(b), 2)], 0, 2) for b in (base_down, base_up)]
    down = filled(empty(channels, total, dtype), [base[0], *down_columns])
    up = filled(empty(channels, total, dtype), [base[1], *up_columns])
    packed = [pack.pack_lowrank(d, LowRankSide.DOWN) for d in downs]
    assert same_bits(down, joined([base_down, *packed]))
    packed = [pack.pack_lowrank(u, LowRankSide.UP) for u in ups]
    assert same_bits(up, joined([base_up, *packed]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, 20, 5])
@pytest.mark.parametrize("parts", [(0, 1, 2), (0, 2), (1,)])
def test_fused_projections_are_block_diagonal(dtype, rank, parts):
    rows, channels = 48, 144
    tiles = round_up(rank * len(parts), 16) // 16
    downs = [random(rank, channels, dtype=dtype, seed=p) for p in parts]
    ups = [random(rows, rank, dtype=dtype, seed=9 + p) for p in parts]
    down_members = [(raw(d), rank, i * rank) for i, d in enumerate(downs)]
    up_members = [
        (raw(u), None, p * rows, rows, rank, i * rank)
        for i, (p, u) in enumerate(zip(parts, ups, strict=True))
    ]
    down = filled(empty(channels, tiles * 16, dtype), [("down", tiles, down_members)])
    up = filled(empty(channels, tiles * 16, dtype), [("up", tiles, up_members)])
    expected = torch.zeros(channels, rank * len(parts), dtype=dtype)
    for i, (p, u) in enumerate(zip(parts, ups, strict=True)):
        expected[p * rows : (p + 1) * rows, i * rank : (i + 1) * rank] = u
    assert same_bits(down, pack.pack_lowrank(torch.cat(downs), LowRankSide.DOWN))
    assert same_bits(up, pack.pack_lowrank(expected, LowRankSide.UP))


def test_projections_of_one_down_share_its_ranks():
    ups = [random(32, 24, dtype=torch.bfloat16, seed=s) for s in range(3)]
    members = [(raw(u), None, 32 * i, 32, 24, 0) for i, u in enumerate(ups)]
    up = filled(empty(96, 48, torch.bfloat16), [("up", 2, members), ("zero", 1)])
    packed = pack.pack_lowrank(torch.cat(ups), LowRankSide.UP)
    assert same_bits(up, joined([packed, torch.zeros(96, 16, dtype=torch.bfloat16)]))


def test_fragments_of_a_larger_tensor():
    source = random(64, 80, dtype=torch.float16)
    dest = filled(empty(64, 32, torch.float16), [("fragments", [(raw(source), 5)], 2, 2)])
    assert same_bits(dest, source.view(4, 5, 256)[:, 2:4].reshape(64, 32))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_members_equal_torch(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    channels = 16 * data.draw(st.integers(1, 9))
    tiles = data.draw(st.integers(1, 5))
    cuts = data.draw(st.lists(st.integers(0, tiles * 16), min_size=2, max_size=6).map(sorted))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    down_all = torch.zeros(tiles * 16, channels, dtype=dtype)
    up_all = torch.zeros(channels, tiles * 16, dtype=dtype)
    down_members, up_members = [], []
    for index, (begin, end) in enumerate(spans):
        first = data.draw(st.integers(0, channels))
        last = data.draw(st.integers(first, channels))
        down = random(end - begin, channels, dtype=dtype, seed=index)
        up = random(last - first, end - begin, dtype=dtype, seed=index + 50)
        down_all[begin:end] = down
        up_all[first:last, begin:end] = up
        down_members.append((raw(down), end - begin, begin))
        up_members.append((raw(up), None, first, last - first, end - begin, begin))
    threads = data.draw(st.integers(1, 4))
    dest = empty(channels, tiles * 16, dtype)
    filled(dest, [("down", tiles, down_members)], threads=threads)
    assert same_bits(dest, pack.pack_lowrank(down_all, LowRankSide.DOWN))
    filled(dest, [("up", tiles, up_members)], threads=threads)
    assert same_bits(dest, pack.pack_lowrank(up_all, LowRankSide.UP))


def test_many_factors_in_one_arena():
    arena = torch.full((300, 64, 32), 7.0, dtype=torch.bfloat16)
    source = random(64, 32, dtype=torch.bfloat16)
    recipes = [(raw(dest), 1, 64, 2, [("fragments", [(raw(source), 2)], 0, 2)]) for dest in arena]
    _core.fill_packed(recipes, threads=3)
    assert same_bits(arena, source.expand(300, -1, -1))
    # NumPy's own views of one array, and a source shared as one object.
    views, shared = (
        arena.view(torch.uint8).numpy(),
        raw(random(64, 32, dtype=torch.bfloat16, seed=4)),
    )
    _core.fill_packed(
        [(view, 1, 64, 2, [("fragments", [(shared, 2)], 0, 2)]) for view in views], threads=3
    )
    assert all((view == shared).all() for view in views)


# ---- several slots ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [32, 20])
def test_slots_in_one_recipe(dtype, rank):
    """Bases that lie apart and in tensors of different ranks, deltas that lie together."""
    slots, channels = 3, 64
    bases = [random(channels, 16 * (2 + i), dtype=dtype, seed=i) for i in range(slots)]
    downs = random(slots, rank, channels, dtype=dtype, seed=7)
    ups = random(slots, channels, rank, dtype=dtype, seed=8)
    base = ("fragments", [(raw(b), 2 + i) for i, b in enumerate(bases)], 0, 2)
    for columns, side, deltas in (
        ([base, ("down", 2, [(raw(downs), rank, 0)])], LowRankSide.DOWN, downs),
        ([base, ("up", 2, [(raw(ups), None, 0, channels, rank, 0)])], LowRankSide.UP, ups),
    ):
        dest = torch.full((slots, channels, 64), 7.0, dtype=dtype)
        filled(dest, columns)
        for slot in range(slots):
            packed = pack.pack_lowrank(deltas[slot], side)
            own = bases[slot].view(channels // 16, -1, 256)[:, :2].reshape(channels, 32)
            assert same_bits(dest[slot], joined([own, packed]))


# ---- tables ----


def table_of(function, values, dtype):
    """What a function gives for every value of a dtype of two bytes."""
    every = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(values)
    return raw(function(every.float()).to(dtype))


@pytest.mark.parametrize("values", DTYPES[:2])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rank", [32, 20, 5])
def test_a_table_stands_for_the_elements(values, dtype, rank):
    up = random(96, rank, dtype=values)
    table = table_of(lambda x: x * 0.3, values, dtype)
    members = [(raw(up), table, 0, 96, rank, 0)]
    dest = filled(empty(96, round_up(rank, 16), dtype), [("up", round_up(rank, 16) // 16, members)])
    scaled = torch.nan_to_num((up.float() * 0.3).to(dtype), nan=0.5)
    expected = pack.pack_lowrank(scaled, LowRankSide.UP)
    assert same_bits(torch.nan_to_num(dest, nan=0.5), expected)


@pytest.mark.parametrize("rank", [16, 20])
def test_untouched_fragments_stay_as_they_are(rank):
    dtype, tiles = torch.bfloat16, round_up(2 * rank, 16) // 16
    before = random(96, tiles * 16, dtype=dtype)
    ups = [random(48, rank, dtype=dtype, seed=1 + i) for i in range(2)]
    members = [(raw(up), None, 48 * i, 48, rank, rank * i) for i, up in enumerate(ups)]
    dest = filled(before.clone(), [("up over", tiles, members)])
    zeroed = filled(before.clone(), [("up", tiles, members)])
    touched = zeroed.view(6, tiles, 256) != 0
    touched = touched.any(dim=2, keepdim=True)
    assert not touched.all()
    expected = torch.where(touched, zeroed.view(6, tiles, 256), before.view(6, tiles, 256))
    assert same_bits(dest, expected.view(96, -1))


# ---- what is refused ----


def recipe(**changed):
    """A right recipe of 32 channels, 32 ranks and 2-byte elements, with something changed."""
    whole = {
        "dest": np.zeros(2048, np.uint8),
        "slots": 1,
        "channels": 32,
        "element_bytes": 2,
        "columns": [("zero", 2)],
    }
    return tuple((whole | changed).values())


BYTES = np.zeros(4096, np.uint8)
FORTRAN = np.zeros((64, 64), np.uint8).T[:32]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"channels": 24}, ValueError, "channels must be a multiple of 16, got 24"),
        ({"element_bytes": 3}, ValueError, "elements have 2 or 4 bytes, got 3"),
        ({"dest": BYTES[:2000]}, ValueError, "the destination has 2000 bytes"),
        ({"dest": BYTES.view(np.int8)}, TypeError, "arrays of uint8, got an array of int8"),
        ({"dest": b"12"}, TypeError, "arrays of uint8, got bytes"),
        ({"dest": BYTES[::2]}, ValueError, "contiguous in C order"),
        ({"dest": FORTRAN}, ValueError, "contiguous in C order"),
        ({"columns": [("ones", 2)]}, ValueError, 'a column is .*, got "ones"'),
        ({"columns": [("zero",)]}, ValueError, "tuple of length 2"),
        ({"columns": [()]}, IndexError, "out of range"),
        ({"columns": [("down", 2, [(BYTES, 8, 0)])]}, ValueError, "column 0, member 0: the source"),
        (
            {"columns": [("up", 2, [(BYTES[:64], None, 31, 2, 16, 0)])]},
            ValueError,
            "rows 31 to 33 of 32",
        ),
        ({"columns": [("down", 2, [(BYTES[:512], 8, 25)])]}, ValueError, "ranks 25 to 33 of a"),
        ({"columns": [("fragments", [(BYTES, 4)], 3, 2)]}, ValueError, "fragments 3 to 5 of"),
        ({"slots": 2}, ValueError, "the destination has 2048 bytes; 2 slots"),
        ({"slots": 0}, ValueError, "the destination has 2048 bytes; 0 slots"),
        ({"columns": [("fragments", [], 0, 2)]}, ValueError, "0 sources for 1 slots"),
        (
            {"columns": [("up", 2, [(BYTES[:64], BYTES, 0, 2, 16, 0)])]},
            ValueError,
            "a table has 131072 bytes, got 4096",
        ),
    ],
)
def test_a_wrong_recipe_is_named(changed, error, message):
    with pytest.raises(error, match=f"recipe 1: .*{message}"):
        _core.fill_packed([recipe(), recipe(**changed)], threads=1)


def test_members_must_not_overlap():
    members = [(BYTES[:512], 8, 0), (BYTES[:512], 8, 7)]
    with pytest.raises(ValueError, match="members 0 and 1 overlap"):
        _core.fill_packed([recipe(columns=[("down", 2, members)])], threads=1)


def test_a_read_only_destination():
    dest = np.zeros(2048, np.uint8)
    dest.flags.writeable = False
    with pytest.raises(ValueError, match="cannot be written"):
        _core.fill_packed([recipe(dest=dest)], threads=1)


@pytest.mark.parametrize("shift", [0, 1, 2047])
def test_destinations_lie_apart(shift):
    memory = torch.zeros(4096, dtype=torch.uint8)
    one, two = memory[:2048].numpy(), memory[shift : shift + 2048].numpy()
    with pytest.raises(ValueError, match="overlaps another destination or a source"):
        _core.fill_packed([recipe(dest=one), recipe(dest=two)], threads=1)
    with pytest.raises(ValueError, match="overlaps another destination or a source"):
        _core.fill_packed([recipe(dest=one, columns=[("fragments", [(two, 2)], 0, 2)])], threads=1)
    whole = memory.numpy()
    with pytest.raises(ValueError, match="cannot be written"):
        _core.fill_packed(
            [recipe(dest=whole[:2048]), recipe(dest=whole[shift : shift + 2048])], threads=1
        )


def test_no_threads():
    with pytest.raises(ValueError, match="zero"):
        _core.fill_packed([recipe()], threads=0)
