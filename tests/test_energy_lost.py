"""The energy lost that a report states is what is measured, or a bound that holds and says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, ComposeReport
from qwenlora.report import SlotReport, SlotReports

from .differential import oracle

BLOCK = "transformer_blocks.0"
MLP = f"{BLOCK}.img_mlp.net.0.proj"
OUT = f"{BLOCK}.attn.to_out.0"
QKV = f"{BLOCK}.attn.to_qkv"
MOD = f"{BLOCK}.img_mod.1"
PLAIN = "norm_out.linear"
CUT = ComposeOptions(truncated_rank=16, mlp="rank", dense_budget=0)
"""What could run whole beside its layer is cut."""
EVERYTHING = replace(CUT, max_energy_lost=1.0)
CLOSE = 2e-5
"""Of an energy: float32, and the rounding of the iterations of a large sum."""


class Wanted:
    """LoRAs in the making and the delta that they ask of one slot."""

    def __init__(self, Draft, slot: str, shape: tuple[int, int]) -> None:
        self._draft = Draft
        self._slot = slot
        self.whole = torch.zeros(shape, dtype=torch.float64)
        self.stack: list[tuple[dict[str, torch.Tensor], float]] = []

    def add(self, draft, strength: float, *deltas: tuple[int, torch.Tensor]) -> Wanted:
        """Add a LoRA at a strength, whose deltas begin at these rows."""
        self.stack.append((draft.tensors, strength))
        for first, delta in deltas:
            self.whole[first : first + len(delta)] += strength * delta.double()
        return self

    def full(self, seed: int, strength: float, target: str, first: int = 0, rows=None) -> Wanted:
        draft = self._draft(seed).put(target, "diff", rows or len(self.whole), self.whole.shape[1])
        return self.add(draft, strength, (first, draft.tensors[draft.key(target, "diff")]))

    def pair(self, seed: int, strength: float, target: str, rank: int) -> Wanted:
        draft = self._draft(seed).add(target, rank)
        return self.add(draft, strength, (0, draft.deltas[target]))

    def lokr(self, seed: int, strength: float, target: str, split: int = 4) -> Wanted:
        draft = self._draft(seed)
        return self.add(draft, strength, (0, put_lokr(draft, target, self.whole.shape, split)))

    def loha(self, seed: int, strength: float, target: str, rank: int) -> Wanted:
        draft = self._draft(seed)
        return self.add(draft, strength, (0, put_loha(draft, target, self.whole.shape, rank)))

    def composed(self, model, max_rank=None, options: ComposeOptions = EVERYTHING) -> SlotReport:
        """Compose; the slot's report, its figures checked."""
        report = qwenlora.compose_loras(model, self.stack, max_rank=max_rank, options=options)
        assert report.complete
        (slot,) = [slot for slot in report.slots if slot.path == self._slot]
        lost = self.whole - oracle.kept(model, self._slot, model.config.rank)
        check(slot, energy(self.whole), energy(lost), terms=self.own_energies())
        return slot

    def own_energies(self) -> float:
        """Of what is summed: rounding is a share of it."""
        files = [tensors for tensors, _ in self.stack if isinstance(tensors, dict)]
        halves = [sum(float(t.double().norm()) for t in tensors.values()) for tensors in files]
        return energy(self.whole) + 1e-6 * sum(halves)


def put_lokr(draft, target: str, shape: tuple[int, int], split: int) -> torch.Tensor:
    """A LoKr of whole factors; its delta."""
    w1, w2 = draft.random(split, split), draft.random(shape[0] // split, shape[1] // split)
    draft.tensors[draft.key(target, "lokr_w1")] = w1
    draft.tensors[draft.key(target, "lokr_w2")] = w2
    return torch.kron(w1.double(), w2.double())


def put_loha(draft, target: str, shape: tuple[int, int], rank: int) -> torch.Tensor:
    """A LoHa; its delta."""
    halves = {
        "hada_w1_a": draft.random(shape[0], rank),
        "hada_w1_b": draft.random(rank, shape[1]),
        "hada_w2_a": draft.random(shape[0], rank),
        "hada_w2_b": draft.random(rank, shape[1]),
    }
    draft.tensors |= {draft.key(target, role): tensor for role, tensor in halves.items()}
    a, b, c, d = (tensor.double() for tensor in halves.values())
    return (a @ b) * (c @ d)


def energy(delta: torch.Tensor) -> float:
    return float(delta.square().sum())


def check(slot: SlotReport, whole: float, lost: float, terms: float) -> None:
    """A measured figure is right, a bound holds."""
    share = slot.energy_lost or 0.0
    if slot.energy_is_bound:
        assert share == math.inf or lost <= share * whole * (1 + CLOSE)
        assert whole <= slot.energy * (1 + CLOSE)
        return
    assert share * whole == pytest.approx(lost, abs=CLOSE * terms)
    if slot.energy is not None:
        assert slot.energy == pytest.approx(whole, abs=CLOSE * terms)


@pytest.fixture
def wanted(Draft):
    """Begins a stack on one slot."""
    shapes = {
        MLP: (512, 128),
        OUT: (128, 128),
        QKV: (384, 128),
        MOD: (768, 128),
        PLAIN: (256, 128),
    }
    return lambda slot: Wanted(Draft, slot, shapes[slot])


# ---- almost nothing ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slot", [QKV, OUT])
def test_a_full_delta_that_lacks_only_its_own_rounding(wanted, model, Draft, slot, dtype):
    """Of rank 12 before it was stored in 16 bits: what a cut loses is below float32's squares."""
    stack = wanted(slot)
    rows, columns = stack.whole.shape
    draft = Draft(1)
    low = draft.random(rows, 12) @ draft.random(12, columns)
    draft.tensors[draft.key(slot, "diff")] = stored = low.to(dtype)
    reported = stack.add(draft, 1.0, (0, stored)).composed(model)
    lost = stack.whole - oracle.kept(model, slot, model.config.rank)
    assert 1e-9 < energy(lost) / energy(stack.whole) < 1e-4
    assert reported.energy_lost == pytest.approx(energy(lost) / energy(stack.whole), rel=1e-2)


def test_a_loha_that_lacks_only_weak_directions(wanted, model, Draft):
    """The Gram matrix finds directions down to 3e-4 of the largest."""
    stack = wanted(OUT)
    draft = Draft(1)
    delta = put_loha(draft, OUT, stack.whole.shape, 8)
    for role, factor in (("hada_w1_a", 2e-4), ("hada_w2_a", 1.0)):
        halves = draft.tensors[draft.key(OUT, role)]
        halves[:, 1:] *= factor
    a, b, c, d = (
        draft.tensors[draft.key(OUT, f"hada_w{role}")].double()
        for role in ("1_a", "1_b", "2_a", "2_b")
    )
    delta = (a @ b) * (c @ d)
    reported = stack.add(draft, 1.0, (0, delta)).composed(model)
    lost = energy(stack.whole - oracle.kept(model, OUT, model.config.rank))
    share = lost / energy(stack.whole)
    assert share < 1e-6
    assert (reported.energy_lost or 0.0) == pytest.approx(share, rel=1e-2, abs=2e-11)


# ---- beside the ranks ----


@pytest.mark.parametrize("max_rank", [4, 16, "auto", None])
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.1, 3.0), (2.0, -0.05)])
def test_a_dense_delta_beside_cut_ranks(wanted, model, max_rank, strengths):
    stack = wanted(PLAIN).full(1, strengths[0], PLAIN)
    stack.pair(2, strengths[1], PLAIN, 40).pair(3, 0.5, PLAIN, 24)
    slot = stack.composed(model, max_rank)
    assert not slot.energy_is_bound
    if max_rank != "auto":
        assert (slot.energy_lost is not None) == (max_rank is not None)


@pytest.mark.parametrize("max_rank", [4, 16])
@pytest.mark.parametrize("target", [OUT, MOD, PLAIN])
def test_products_beside_cut_ranks(wanted, Draft, model, max_rank, target):
    """Kronecker products past rank 128 need layers wider than the tiny model's; forced here."""
    wide = wide_model()
    shape = oracle.sizes(wide.get_submodule(target))
    stack = Wanted(Draft, target, shape)
    wide_pair(stack, Draft, target, shape)
    stack.lokr(2, 0.7, target, split=16)
    slot = stack.composed(wide, max_rank)
    assert (slot.krons, slot.energy_is_bound) == (1, False)
    assert 0 < slot.energy_lost < 1


def wide_pair(stack: Wanted, Draft, target: str, shape: tuple[int, int], scale=0.4) -> None:
    draft = Draft(5)
    down, up = draft.random(40, shape[1]), draft.random(shape[0], 40)
    draft.tensors = {draft.key(target, "down"): down, draft.key(target, "up"): up}
    stack.add(draft, scale, (0, up.double() @ down.double()))


def wide_model(rank: int = 32):
    config = qwenlora.emulation.EmulatedConfig(
        num_layers=1,
        heads=4,
        head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=96,
        rank=rank,
        precision=qwenlora.emulation.Precision.EXACT,
        dtype=torch.float32,
    )
    return qwenlora.emulation.random_transformer(config, seed=0)


@pytest.mark.parametrize("max_rank", [None, 16, "auto"])
def test_q_k_v_of_mixed_kinds(Draft, max_rank):
    """A product beside the layer, a full delta that is cut, a plain pair: one LoRA, and two."""
    model = wide_model()
    for strengths in ((1.0,), (1.0, -0.3)):
        stack = Wanted(Draft, QKV, (768, 256))
        for seed, strength in enumerate(strengths):
            draft = Draft(seed)
            q, k, v = (f"{BLOCK}.attn.to_{name}" for name in "qkv")
            product = put_lokr(draft, q, (256, 256), 16)
            diff = draft.tensors[draft.key(k, "diff")] = draft.random(256, 256)
            down, up = draft.random(40, 256), draft.random(256, 40)
            draft.tensors |= {draft.key(v, "down"): down, draft.key(v, "up"): up}
            pair = up.double() @ down.double()
            stack.add(draft, strength, (0, product), (256, diff), (512, pair))
        slot = stack.composed(model, max_rank)
        assert slot.energy_is_bound == (len(strengths) > 1)


# ---- cut apart ----


@pytest.mark.slow
@pytest.mark.parametrize("max_rank", [None, 24, 8])
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (1.0, -0.4), (0.5, 2.0)])
@pytest.mark.parametrize("seeds", [(1, 1), (1, 2)], ids=["alike", "apart"])
@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_cut_deltas_are_measured(Draft, kind, seeds, strengths, max_rank):
    """What LoRAs lose apart may add up, or cancel."""
    model = wide_model(rank=912)
    stack = Wanted(Draft, MLP, (1024, 256))
    for seed, strength in zip(seeds, strengths, strict=True):
        if kind == "lokr":
            stack.lokr(seed, strength, MLP, split=16)
        else:
            stack.loha(seed, strength, MLP, rank=24)
    wide_pair(stack, Draft, MLP, (1024, 256), scale=0.1)
    slot = stack.composed(model, max_rank)
    assert not slot.energy_is_bound
    assert slot.energy_lost > 0.01


@pytest.mark.parametrize("max_rank", [16, 130])
def test_ranks_that_cancel_lose_nothing(wanted, model, max_rank):
    """Their rounding is not told as a loss, however the sum is decomposed."""
    stack = wanted(MLP).pair(1, 1.0, MLP, 100).pair(1, -1.0, MLP, 100)
    assert stack.composed(model, max_rank).energy_lost == 0.0


@pytest.mark.parametrize("kind", ["lokr", "loha", "full"])
def test_deltas_that_cancel_lose_nothing(Draft, kind):
    model = wide_model(rank=912)
    stack = Wanted(Draft, MLP, (1024, 256))
    for strength in (1.0, -1.0):
        if kind == "loha":
            stack.loha(1, strength, MLP, rank=24)
        elif kind == "lokr":
            stack.lokr(1, strength, MLP, split=16)
        else:
            stack.full(1, strength, MLP)
    slot = stack.composed(model)
    assert slot.energy_is_bound == (kind == "full")
    if kind != "full":
        assert (slot.energy_lost, slot.energy) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lokr", "loha", "full"])
@pytest.mark.parametrize("second", [1.0, -0.5])
@pytest.mark.parametrize("max_rank", [None, 16])
def test_one_file_twice_in_a_stack(kind, second, max_rank, Draft, tmp_path):
    """What is read once and kept is the deltas of two LoRAs."""
    model = wide_model(rank=912)
    stack = Wanted(Draft, MLP, (1024, 256))
    {"lokr": lambda *a: stack.lokr(*a, split=16), "loha": lambda *a: stack.loha(*a, rank=24)}.get(
        kind, stack.full
    )(1, 1.0, MLP)
    draft = Draft(1)
    draft.tensors = stack.stack[0][0]
    path = draft.save(tmp_path / "twice.safetensors")
    stack.stack = [(path, 1.0), (path, second)]
    stack.whole *= 1 + second
    slot = stack.composed(model, max_rank)
    assert slot.energy_is_bound == (kind == "full")


@pytest.mark.parametrize("kind", ["lokr", "loha", "full"])
def test_float8_deltas_are_measured(kind, Draft):
    model = wide_model(rank=912)
    stack = Wanted(lambda seed: Draft(seed, dtype=torch.float8_e4m3fn), MLP, (1024, 256))
    for seed in (1, 2):
        if kind == "lokr":
            stack.lokr(seed, 1.0, MLP, split=16)
        elif kind == "loha":
            stack.loha(seed, 1.0, MLP, rank=24)
        elif seed == 1:
            stack.full(seed, 1.0, MLP)
    assert 0.01 < stack.composed(model).energy_lost < 1


@pytest.mark.parametrize("target", [OUT, MLP, MOD])
@pytest.mark.parametrize("max_rank", [None, 8])
def test_one_full_delta_is_measured(wanted, model, target, max_rank):
    slot = wanted(target).full(1, -0.7, target).composed(model, max_rank)
    assert not slot.energy_is_bound
    assert slot.energy_lost > 0.3


@pytest.mark.parametrize("target", [OUT, MLP, MOD])
@pytest.mark.parametrize("max_rank", [None, 8])
@pytest.mark.parametrize("other", ["same", "full", "pair"])
def test_full_deltas_beside_others_are_bounded(wanted, model, target, max_rank, other):
    stack = wanted(target).full(1, 1.0, target)
    if other == "pair":
        stack.pair(2, 0.3, target, 8)
    else:
        stack.full(1 if other == "same" else 2, 1.0, target)
    report = stack.composed(model, max_rank)
    assert report.energy_is_bound
    assert "(a bound)" in qwenlora.applied(model).summary()
    assert "at most" in qwenlora.applied(model).text()


def test_where_no_bound_can_be_given_that_is_said(wanted, model):
    """Full deltas that nearly cancel may have lost more than all that is left."""
    stack = wanted(OUT).full(1, 1.0, OUT).full(1, -0.99, OUT)
    assert stack.composed(model).energy_lost == math.inf
    report = qwenlora.applied(model)
    assert report.total_energy_lost == math.inf
    assert "an unknown share" in report.summary()
    assert "at most an unknown share of the energy" in report.text()
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["slots"][0]["energy_lost"] == "inf"


def test_a_bound_is_near_where_little_is_lost(wanted, model, Draft):
    """As by default, where a full delta that loses more than a tenth is left out."""
    stack = wanted(OUT)
    for seed in (1, 2):
        draft = Draft(seed)
        diff = draft.random(128, 12) @ draft.random(12, 128) + 0.01 * draft.random(128, 128)
        draft.tensors[draft.key(OUT, "diff")] = diff
        stack.add(draft, 1.0, (0, diff))
    options = CUT
    slot = stack.composed(model, options=options)
    measured = energy(stack.whole - oracle.kept(model, OUT, 32)) / energy(stack.whole)
    assert slot.energy_is_bound
    assert measured <= slot.energy_lost <= 3 * measured


def test_a_refused_delta_is_in_nobodys_way(wanted, model, Draft):
    """What is left out does not make a bound of what is measured."""
    stack = wanted(OUT).full(1, 1.0, OUT)
    draft = Draft(2)
    near = draft.random(128, 12) @ draft.random(12, 128) + 0.01 * draft.random(128, 128)
    draft.tensors[draft.key(OUT, "diff")] = near
    draft.add(PLAIN, 4)
    stack.stack[0] = ({**stack.stack[0][0], **Draft(3).add(PLAIN, 4).tensors}, 1.0)
    stack.whole.zero_()
    stack.add(draft, 1.0, (0, near))
    options = CUT
    report = qwenlora.compose_loras(model, stack.stack, options=options)
    assert not report.complete
    (slot,) = [slot for slot in report.slots if slot.path == OUT]
    assert not slot.energy_is_bound
    lost = energy(stack.whole - oracle.kept(model, OUT, 32))
    check(slot, energy(stack.whole), lost, energy(stack.whole))


def test_zero_deltas_lose_nothing(model, Draft):
    draft = Draft(1)
    draft.tensors[draft.key(MLP, "diff")] = torch.zeros(512, 128)
    draft.add(OUT, 4)
    report = qwenlora.compose_loras(model, (draft.tensors, 1.0), options=EVERYTHING)
    assert report.energy_lost == report.total_energy_lost == 0.0


# ---- history, panels, totals ----


def test_figures_do_not_depend_on_what_is_cached(tmp_path, Draft):
    """What was read before is cut no more, and is measured all the same."""
    paths = []
    for seed in (1, 2):
        draft = Draft(seed)
        put_lokr(draft, MLP, (1024, 256), 16)
        paths.append(draft.save(tmp_path / f"{seed}.safetensors"))
    figures = []
    for cached in (False, True, True):
        if not cached:
            qwenlora.clear_cache()
        model = wide_model(rank=912)
        qwenlora.compose_loras(model, [(paths[0], 2.0), (paths[1], 1.0)], options=EVERYTHING)
        report = qwenlora.compose_loras(
            model, [(paths[0], 1.0), (paths[1], -0.5)], options=EVERYTHING
        )
        figures.append((report.energy_lost, report.total_energy_lost))
    assert len(set(figures)) == 1
    assert 0 < figures[0][0] < 1


def test_rows_are_measured_in_panels(Draft, resize):
    figures = []
    for size in (32 << 20, 50_000):
        resize(panel_bytes=size)
        stack = Wanted(Draft, MLP, (1024, 256))
        stack.lokr(1, 1.0, MLP, split=16).loha(2, -0.5, MLP, rank=24)
        figures.append(stack.composed(wide_model(rank=912)).energy_lost)
    assert figures[1] == pytest.approx(figures[0], rel=1e-6)


def test_the_total_follows(wanted, model, Draft):
    stack = wanted(PLAIN).full(1, 1.0, PLAIN).pair(2, 1.0, PLAIN, 40)
    full = Draft(3).put(OUT, "diff", 128, 128)
    stack.stack.append((full.tensors, 1.0))
    report = qwenlora.compose_loras(model, stack.stack, max_rank=16, options=EVERYTHING)
    wholes = {PLAIN: stack.whole, OUT: full.tensors[full.key(OUT, "diff")].double()}
    lost = sum(energy(whole - oracle.kept(model, path, 32)) for path, whole in wholes.items())
    total = sum(map(energy, wholes.values()))
    assert report.total_energy_lost == pytest.approx(lost / total, abs=CLOSE)
    assert not report.energy_is_bound


def slot_report(energy: float, share: float, *, bound: bool) -> SlotReport:
    return SlotReport(
        path=f"{energy}.{share}",
        kind="svdq",
        base_rank=32,
        rank=16,
        rank_added=16,
        energy_lost=share,
        energy=energy,
        energy_is_bound=bound,
    )


def test_a_total_with_bounds_holds_whatever_they_bound():
    """The true energies of the bounded slots may be anything up to what is stated."""
    measured = [slot_report(10.0, 0.1, bound=False), slot_report(2.0, 0.0, bound=False)]
    bounds = [slot_report(5.0, 0.5, bound=True), slot_report(40.0, 0.01, bound=True)]
    report = ComposeReport((), SlotReports.of(measured + bounds), 0, 0.0)
    for first in (0.0, 0.3, 1.0):
        for second in (0.0, 0.3, 1.0):
            energies = [10.0, 2.0, 5.0 * first, 40.0 * second]
            lost = sum(e * s for e, s in zip(energies, (0.1, 0.0, 0.5, 0.01), strict=True))
            assert lost / sum(energies) <= report.total_energy_lost
    assert report.total_energy_lost <= 0.21
