"""What holds for every stack and every history."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qwenlora
from qwenlora import ComposeOptions, Placement
from qwenlora.packing import pack
from qwenlora.packing.layout import MAX_RANK, LowRankSide
from qwenlora.slots.branch import BRANCH_DOWN, BRANCH_UP

QKV = "transformer_blocks.0.attn.to_qkv"
POOL_SIZE = 6
OPERATIONS = 200

strengths = st.one_of(
    st.just(0.0), st.floats(-4, 4, allow_nan=False, width=32).filter(lambda s: abs(s) > 1e-3)
)
items = st.tuples(st.integers(0, POOL_SIZE - 1), strengths)
stacks = st.lists(items, max_size=4)
ranks = st.sampled_from([None, None, 1, 7, 16, 24, 40, "auto"])
placements = st.sampled_from(list(Placement))


@pytest.fixture(scope="module")
def drafts(Draft, kohya):
    """LoRAs of several trainers, ranks, dtypes and extents."""
    attention = Draft(2, style=kohya)
    for name in ("to_q", "to_v", "add_k_proj"):
        attention.add(f"transformer_blocks.0.attn.{name}", 20, alpha=8.0)
    shared = Draft(3)
    down = shared.random(12, 128)
    for name in ("to_q", "to_k", "to_v"):
        shared.add(f"transformer_blocks.0.attn.{name}", 12, down=down)
    modulation = Draft(4).add("transformer_blocks.0.img_mod.1", 6, alpha=3.0)
    modulation.add("transformer_blocks.0.txt_mod.1", 3).add("norm_out.linear", 5)
    zero = Draft(5).add("transformer_blocks.0.attn.to_q", 4, up=torch.zeros(128, 4))
    zero.add("proj_out", 4)
    return [
        Draft.full(seed=1, rank=4),
        attention,
        shared,
        modulation,
        zero,
        Draft.full(seed=6, rank=17, dtype=torch.bfloat16),
    ]


@pytest.fixture(scope="module")
def pool(drafts, tmp_path_factory):
    """The drafts as files."""
    folder = tmp_path_factory.mktemp("pool")
    return [draft.save(folder / f"{n}.safetensors") for n, draft in enumerate(drafts)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def base(request, make_model):
    """A model never touched; examples work on copies."""
    return make_model(dtype=request.param)


def compose(model, pool, stack, max_rank=None, **options):
    return qwenlora.compose_loras(
        model,
        [(pool[index], strength) for index, strength in stack],
        max_rank=max_rank,
        options=ComposeOptions(**options),
    )


def composed(base, *args, **options):
    model = copy.deepcopy(base)
    compose(model, *args, **options)
    return model


def assert_same(probe, one, other):
    assert probe.snapshot(one).differences(probe.snapshot(other)) == []


@pytest.mark.slow
@given(first=stacks, second=stacks, first_rank=ranks, max_rank=ranks)
def test_history_leaves_no_trace(base, pool, probe, first, second, first_rank, max_rank):
    model = composed(base, pool, first, first_rank)
    compose(model, pool, second, max_rank)
    qwenlora.clear_cache()
    assert_same(probe, model, composed(base, pool, second, max_rank))
    qwenlora.reset_loras(model)
    assert_same(probe, model, base)


@pytest.mark.slow
@given(stack=stacks, max_rank=ranks, previous=stacks)
def test_both_placements_give_the_same(base, pool, probe, stack, max_rank, previous):
    models = []
    for placement in (Placement.WHOLE, Placement.BY_PATH):
        model = composed(base, pool, previous, placement=placement)
        compose(model, pool, stack, max_rank, placement=placement)
        models.append(model)
    assert_same(probe, *models)


@pytest.mark.slow
@given(stack=stacks, max_rank=ranks)
def test_cached_and_read_give_the_same(base, pool, probe, stack, max_rank):
    qwenlora.clear_cache()
    read = composed(base, pool, stack, max_rank)
    cached = composed(base, pool, stack, max_rank)
    uncached = composed(base, pool, stack, max_rank, cache_bytes=0)
    crowded = composed(base, pool, stack, max_rank, cache_bytes=20_000)
    for other in (cached, uncached, crowded):
        assert_same(probe, read, other)


@pytest.mark.slow
@given(stack=stacks, max_rank=ranks, threads=st.integers(2, 8))
def test_threads_give_the_same(base, pool, probe, stack, max_rank, threads):
    models = []
    for count in (1, 4, threads):
        qwenlora.clear_cache()
        models.append(composed(base, pool, stack, max_rank, threads=count))
    assert_same(probe, models[0], models[1])
    assert_same(probe, models[0], models[2])


@pytest.mark.slow
@given(stack=stacks, max_rank=ranks)
def test_files_and_state_dicts_give_the_same(base, pool, drafts, probe, stack, max_rank):
    model = copy.deepcopy(base)
    # In the order of a file's keys, which is the order of the ranks within Q, K and V.
    in_order = [dict(sorted(draft.tensors.items())) for draft in drafts]
    tensors = [(in_order[index], strength) for index, strength in stack]
    qwenlora.compose_loras(model, tensors, max_rank=max_rank)
    assert_same(probe, model, composed(base, pool, stack, max_rank))


@given(stack=stacks)
def test_slots_hold_the_sum_of_the_deltas(base, pool, drafts, probe, stack):
    model = composed(base, pool, stack)
    sizes = {}
    for index, strength in stack:
        if strength:
            for target, delta in drafts[index].deltas.items():
                sizes[target] = sizes.get(target, 0) + abs(strength) * float(delta.norm())
    if not sizes:
        assert_same(probe, model, base)
        return
    rounding = torch.finfo(base.dtype).eps
    for path, module in model.named_modules():
        if not hasattr(module, "proj_down") and getattr(module, BRANCH_DOWN, None) is None:
            continue
        measured = probe.delta(model, path)
        wanted = torch.zeros(measured.shape, dtype=torch.float64)
        for index, strength in stack:
            wanted += strength * drafts[index].slot_delta(path, tuple(measured.shape))
        scale = sum(sizes.values())
        assert (measured - wanted).norm() <= 4 * rounding * scale + 1e-12
        if wanted.norm() > 8 * rounding * scale:
            assert measured.norm() > 0


@given(stack=stacks, max_rank=ranks)
def test_ranks_stay_in_bounds(base, pool, probe, stack, max_rank):
    model = copy.deepcopy(base)
    report = compose(model, pool, stack, max_rank)
    reported = {slot.path: slot for slot in report.slots}
    for path, module in model.named_modules():
        if hasattr(module, "proj_down"):
            total = module.proj_down.shape[1]
            assert total == module.proj_up.shape[1]
            assert total % 16 == 0
            assert 16 <= total <= MAX_RANK
            added = total - base.config.rank
            assert added == (reported[path].rank_added if path in reported else 0)
            assert max_rank in (None, "auto") or added <= -(-max_rank // 16) * 16
    probe.output(model)


def _rank_columns(model, path):
    """The multiset of (down row, up column) of the ranks that a slot added."""
    module = model.get_submodule(path)
    if hasattr(module, "proj_down"):
        start = model.config.rank
        down = pack.unpack_lowrank(module.proj_down.detach(), LowRankSide.DOWN)[start:]
        up = pack.unpack_lowrank(module.proj_up.detach(), LowRankSide.UP)[:, start:]
    else:
        down, up = getattr(module, BRANCH_DOWN), getattr(module, BRANCH_UP)
    joined = torch.cat([down, up.T], dim=1).float()  # (R, in + out)
    return sorted(row.numpy().tobytes() for row in joined)


@pytest.mark.slow
@given(stack=st.lists(items, min_size=2, max_size=4), seed=st.integers(0, 99))
def test_order_changes_only_the_order_of_ranks(base, pool, probe, stack, seed):
    shuffled = random.Random(seed).sample(stack, len(stack))
    one, other = composed(base, pool, stack), composed(base, pool, shuffled)
    paths = [slot.path for slot in qwenlora.applied(one).slots]
    assert paths == [slot.path for slot in qwenlora.applied(other).slots]
    for path in paths:
        assert _rank_columns(one, path) == _rank_columns(other, path)
        deltas = probe.delta(one, path), probe.delta(other, path)
        assert torch.allclose(*deltas, rtol=0, atol=1e-12 * float(deltas[0].norm() + 1))


@pytest.mark.slow
@given(index=st.integers(0, POOL_SIZE - 1), strength=strengths, power=st.integers(-3, 3))
def test_strength_is_linear(base, pool, index, strength, power):
    """A power of two in the strength moves no mantissa: the tensors are exact multiples."""
    one = composed(base, pool, [(index, 1.0)])
    other = composed(base, pool, [(index, 2.0**power)])
    start = base.config.rank
    for path in [slot.path for slot in qwenlora.applied(one).slots]:
        ups = []
        for model in (one, other):
            module = model.get_submodule(path)
            if hasattr(module, "proj_up"):
                up = pack.unpack_lowrank(module.proj_up.detach(), LowRankSide.UP)[:, start:]
            else:
                up = getattr(module, BRANCH_UP)
            ups.append(up)
        assert torch.equal(ups[0] * 2.0**power, ups[1])


class _Injected(Exception):
    pass


def _but_strengths(stack, max_rank, options):
    """What a change of strengths alone, which is made in place, leaves as it is."""
    return [index for index, strength in stack if strength], max_rank, options["modulation"]


class _History:
    """A model that lives through random operations, checked against fresh ones."""

    def __init__(self, base, pool, probe, seed: int) -> None:
        self._base = base
        self._pool = pool
        self._probe = probe
        self._random = random.Random(seed)
        self._untouched = probe.snapshot(base)
        self.model = copy.deepcopy(base)
        self._held = None
        self._operations = [
            *[self._compose] * 5,
            *[self._fail] * 2,
            self._reset,
            self._clear_cache,
            self._copy,
        ]

    def step(self) -> None:
        self._random.choice(self._operations)()
        qwenlora.applied(self.model)

    def check_end(self) -> None:
        qwenlora.reset_loras(self.model)
        assert self._probe.snapshot(self.model).differences(self._untouched) == []

    def _stack(self):
        count = self._random.choice([0, 1, 1, 2, 3])
        return [
            (self._random.randrange(POOL_SIZE), self._random.choice([0.0, 1.0, -0.5, 0.3]))
            for _ in range(count)
        ]

    def _arguments(self):
        max_rank = self._random.choice([None, None, None, 5, 16])
        options = {
            "placement": self._random.choice(list(Placement)),
            "modulation": self._random.random() < 0.8,
            "cache_bytes": self._random.choice([0, 50_000, 1 << 30]),
        }
        return self._stack(), max_rank, options

    def _compose(self) -> None:
        stack, max_rank, options = self._arguments()
        if all(index == 3 for index, strength in stack if strength):
            options["modulation"] = True  # else nothing of that LoRA's blocks would be left
        compose(self.model, self._pool, stack, max_rank, **options)
        self._held = _but_strengths(stack, max_rank, options)
        if self._random.random() < 0.1:
            fresh = composed(self._base, self._pool, stack, max_rank, **options)
            assert_same(self._probe, self.model, fresh)

    def _fail(self) -> None:
        stack, max_rank, options = self._arguments()
        left = self._random.randrange(25)

        def progress(*_):
            nonlocal left
            left -= 1
            if left < 0:
                raise _Injected

        before = self._probe.snapshot(self.model)
        wanted = _but_strengths(stack, max_rank, options)
        try:
            compose(self.model, self._pool, stack, max_rank, progress=progress, **options)
            self._held = wanted
        except _Injected:
            after = self._probe.snapshot(self.model)
            by_path = options["placement"] is Placement.BY_PATH
            failed = qwenlora.applied(self.model).failure is not None
            if by_path and failed:
                assert after.tensors == self._untouched.tensors
                self._held = None
            else:
                assert after.differences(before) == []
                assert wanted == self._held or not by_path

    def _reset(self) -> None:
        qwenlora.reset_loras(self.model)
        self._held = None
        assert self._probe.snapshot(self.model).differences(self._untouched) == []

    def _clear_cache(self) -> None:
        qwenlora.clear_cache()

    def _copy(self) -> None:
        left_behind, self.model = self.model, copy.deepcopy(self.model)
        qwenlora.reset_loras(left_behind)
        assert self._probe.snapshot(left_behind).differences(self._untouched) == []


@pytest.mark.slow
@settings(max_examples=max(1, settings().max_examples // 6))
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=1049)
def test_no_history_survives_a_reset(base, pool, probe, seed):
    history = _History(base, pool, probe, seed)
    for _ in range(OPERATIONS):
        history.step()
    history.check_end()
