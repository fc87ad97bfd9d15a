"""What `qwenlora merge` writes, against dense float64 deltas and the tools that read it.

The known model is swapped for a tiny one, so that dense math is quick; the real table has a test of
its own.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import weakref

import pytest
import torch
from diffusers.loaders import QwenImageLoraLoaderMixin
from diffusers.utils import peft_utils
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import ComposeOptions, LokrScale, LoraSet, LoraSpec, errors
from qwenlora.emulation import EmulatedConfig, random_transformer
from qwenlora.merge import known
from qwenlora.merge.cut import Cut
from qwenlora.merge.job import merge_loras
from qwenlora.merge.plan import MergeOptions
from qwenlora.merge.writer import SafetensorsWriter
from qwenlora.slots.find import find_targets
from qwenlora.source.dtypes import NAMES
from qwenlora.source.file import FileSource

from . import test_formats as corpus
from . import test_oracles as oracles
from .test_adapters import BLOCK, SIZES, lokr
from .test_oracles import _no_gradients, dense  # noqa: F401

FLOAT32 = 1e-6
"""Relative error of a delta in float32: a few roundings of each factor; measured: 1.5e-7."""
BFLOAT16 = 5e-3
"""In bfloat16: 2^-9 at most for each half; measured: 2.6e-3."""
PREFIX = "diffusion_model."


@pytest.fixture
def tiny(make_model):
    """Makes a model the known one, by default that of `make_model`."""

    def swap(model=None):
        swap.slots = slots_of(model) if model else slots_of_two_blocks(make_model)

    swap()
    return swap


def slots_of(model):
    real = known.known_slots("qwen-image")
    targets = find_targets(model, {})
    return {p: known.KnownSlot(t.row, real[p].parts) for p, t in targets.items() if p in real}


@functools.cache
def slots_of_two_blocks(make_model):
    return slots_of(make_model(num_layers=2))


@pytest.fixture
def merged(tiny, tmp_path):
    """Merges drafts, dicts or paths at strengths, and factors by block; the report and the path."""
    made = iter(range(100))

    def merge(*stack, cut=None, dtype=torch.float32, **options):
        specs = []
        for source, strength, *blocks in stack:
            tensors = getattr(source, "tensors", source)
            if isinstance(tensors, dict):
                source = tmp_path / f"source-{next(made)}.safetensors"
                save_file({key: t.contiguous().clone() for key, t in tensors.items()}, source)
            specs.append(LoraSpec(source, strength, blocks=next(iter(blocks), None)))
        path = tmp_path / f"merged-{next(made)}.safetensors"
        settings = MergeOptions(cut=cut, dtype=dtype, **options)
        return merge_loras(specs, path, settings, known=tiny.slots), path

    return merge


def modules_of(path):
    """(down, up) float64 of each module of a merged file, `up` times the scale of its alpha."""
    tensors = load_file(path)
    halves = {}
    for key in tensors:
        assert key.startswith(PREFIX)
        if key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            down, up = tensors[key], tensors[f"{stem}.lora_up.weight"]
            alpha = tensors[f"{stem}.alpha"]
            assert (alpha.dtype, alpha.shape) == (torch.float32, ())
            assert down.shape[0] == up.shape[1]
            scale = float(alpha) / down.shape[0]
            assert math.frexp(scale)[0] == 0.5, "no power of two"
            assert scale == 1 or down.dtype == torch.float16
            halves[stem.removeprefix(PREFIX)] = (down.double(), scale * up.double())
    return halves


def deltas_of(path):
    return {name: up @ down for name, (down, up) in modules_of(path).items()}


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def energy_lost(found, expected):
    return float((found - expected).square().sum() / expected.square().sum())


def best_lost(delta, rank):
    """Share of the energy that the best approximation of a rank lacks (Eckart and Young)."""
    energies = torch.linalg.svdvals(delta).square()
    return float(energies[rank:].sum() / energies.sum())


# ---- exact ----


@pytest.mark.slow
@pytest.mark.parametrize("name", [*corpus.PLAIN, *corpus.MIXED])
def test_corpus_file_merges_to_the_reference(name, tiny, merged, tmp_path):
    model = random_transformer(EmulatedConfig(**corpus.TINY), seed=0)
    tiny(model)
    small = corpus.miniature(name, model)
    report, path = merged((small.save(tmp_path / "lora.safetensors"), 0.7), diffs=True)
    qwenlora.compose_loras(model, path, strict=True)
    found = corpus.deltas_of(model)
    for slot, expected in small.deltas.items():
        assert corpus.relative_error(found[slot], 0.7 * expected) < FLOAT32, slot
    skips = {skip.name for skip in report.loras[0].skipped if not skip.matters}
    assert skips == set(small.ignored)


def test_packed_pairs_become_plain_ones(tiny, merged, tmp_path):
    model = random_transformer(EmulatedConfig(**corpus.TINY), seed=0)
    tiny(model)
    small = corpus.miniature("nunchaku_packed_lowrank", model)
    _, path = merged((small.save(tmp_path / "lora.safetensors"), 0.5))
    again = copy.deepcopy(model)
    qwenlora.compose_loras(model, (tmp_path / "lora.safetensors", 0.5))
    qwenlora.compose_loras(again, path)
    expected, found = corpus.deltas_of(model), corpus.deltas_of(again)
    assert found.keys() == expected.keys()
    for slot, delta in found.items():
        assert error(delta, expected[slot]) < FLOAT32


def test_one_lora_merged_does_to_the_bit_what_it_does_itself(make_model, probe, Draft, merged):
    """Scales are powers of two: nothing is rounded."""
    draft = Draft(1)
    for target in list(Draft.full().deltas):
        draft.add(target, 4, alpha=2.0)
    _, path = merged((draft, 1.0))
    own, by_merge = make_model(), make_model()
    qwenlora.compose_loras(own, draft.tensors, strict=True)
    qwenlora.compose_loras(by_merge, path, strict=True)
    assert probe.snapshot(own).differences(probe.snapshot(by_merge)) == []


@pytest.mark.parametrize("strengths", [(0.8, 0.5), (1.0, -0.7), (-0.3, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_the_stack(strengths, dtype, model, probe, Draft, merged):
    drafts = [Draft.full(1, 4, dtype=torch.bfloat16), Draft.full(2, 6, dtype=torch.bfloat16)]
    stack = list(zip(drafts, strengths, strict=True))
    report, path = merged(*stack, dtype=dtype)
    assert {module.rank for module in report.modules} == {10}
    qwenlora.compose_loras(model, path, strict=True)
    bound = FLOAT32 if dtype == torch.float32 else BFLOAT16
    probe.assert_holds(model, stack, within=bound)


# ---- strength per block ----


def test_factors_by_block_do_to_the_bit_what_they_do_composed(make_model, probe, Draft, merged):
    """All are powers of two: nothing is rounded."""
    draft = Draft.full(1, 4, blocks=2)
    for block in range(2):
        draft.put(f"transformer_blocks.{block}.attn.norm_q", "diff", 64)
        draft.put(f"transformer_blocks.{block}.txt_mod.1", "diff_b", 768)
    blocks = "0:-2, 1:0.5; attn:4, img:0.25, rest:0"
    report, path = merged((draft, 0.5, blocks), diffs=True)
    own, by_merge = (make_model(num_layers=2) for _ in range(2))
    composed = qwenlora.compose_loras(own, LoraSpec(draft.tensors, 0.5, blocks=blocks))
    qwenlora.compose_loras(by_merge, path, strict=True)
    assert probe.snapshot(own).differences(probe.snapshot(by_merge)) == []
    assert report.complete
    assert report.loras[0].blocks == "0:-2, 1:0.5; attn:4, img:0.25, rest:0"
    assert len(report.loras[0].turned_off) == len(composed.loras[0].turned_off) == 6
    with safe_open(path, "pt") as file:
        (source,) = json.loads(file.metadata()["qwenlora.merge"])["sources"]
    assert (source["blocks"], source["left_out"]) == (report.loras[0].blocks, 0)


@pytest.mark.parametrize("cut", [None, Cut(energy=1.0)])
def test_factors_by_block_are_in_the_sum(cut, make_model, Draft, merged):
    drafts = [Draft.full(1, 4, blocks=2), Draft.full(2, 6, blocks=2)]
    blocks = ["0:0.3; mod:-1.7", "1:0; txt:0.1"]
    stack = [(draft, 0.7, own) for draft, own in zip(drafts, blocks, strict=True)]
    found = deltas_of(merged(*stack, cut=cut)[1])
    for target in drafts[0].deltas:
        in_text = any(word in target for word in ("txt_", "add_"))
        block = target.split(".")[1] if target.startswith("transformer_blocks.") else None
        factors = (
            (0.3 if block == "0" else 1.0) * (-1.7 if "_mod" in target else 1.0),
            (0.0 if block == "1" else 1.0) * (0.1 if in_text else 1.0),
        )
        pairs = zip(drafts, factors, strict=True)
        expected = sum(0.7 * factor * draft.deltas[target] for draft, factor in pairs)
        assert error(found[target], expected) < (FLOAT32 if cut is None else 1e-5), target


def test_factors_that_leave_nothing_are_refused(Draft, merged):
    draft = Draft.full(1, 4, blocks=2)
    with pytest.raises(errors.NothingToApplyError, match="`0-1:0; rest:0` turn all of it off"):
        merged((draft, 1.0), (draft, 1.0, "0-1:0; rest:0"))
    report, _ = merged((draft, 1.0, "0-9:0.5"))
    assert report.loras[0].blocks_note.endswith("names 2-9, but the model has the blocks 0 to 1")


@pytest.mark.slow
@pytest.mark.parametrize("target", SIZES)
@pytest.mark.parametrize("ranks", [(None, None), (None, 3), (2, 3), (2, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lokr_becomes_plain(target, ranks, dtype, Draft, merged):
    draft, dense_delta = lokr(Draft, target, ranks=ranks, alpha=2.0)
    report, path = merged((draft, -0.7), dtype=dtype)
    bound = FLOAT32 if dtype == torch.float32 else BFLOAT16
    assert error(deltas_of(path)[target], -0.7 * dense_delta) < bound
    assert report.modules[0].rank <= min(SIZES[target])
    if None not in ranks:
        assert report.modules[0].rank == math.prod(ranks)


def loha(Draft, target, *, ranks=(3, 4)):
    inputs, outputs = SIZES[target]
    draft = Draft(1)
    for index, rank in zip("12", ranks, strict=True):
        draft.put(target, f"hada_w{index}_a", outputs, rank)
        draft.put(target, f"hada_w{index}_b", rank, inputs)
    halves = [tensor.double() for tensor in draft.tensors.values()]
    draft.tensors[draft.key(target, "alpha")] = torch.tensor(1.5)
    return draft, 1.5 / ranks[0] * (halves[0] @ halves[1]) * (halves[2] @ halves[3])


@pytest.mark.parametrize("target", SIZES)
@pytest.mark.parametrize("ranks", [(3, 4), (16, 16)])
def test_loha_becomes_plain(target, ranks, Draft, merged):
    draft, dense_delta = loha(Draft, target, ranks=ranks)
    report, path = merged((draft, 0.7))
    assert error(deltas_of(path)[target], 0.7 * dense_delta) < FLOAT32
    assert report.modules[0].rank == min(math.prod(ranks), *SIZES[target])


@pytest.mark.parametrize("target", SIZES)
def test_a_full_delta_becomes_plain_to_the_bit(target, Draft, merged):
    inputs, outputs = SIZES[target]
    draft = Draft(1, dtype=torch.bfloat16).put(target, "diff", outputs, inputs)
    (diff,) = draft.tensors.values()
    report, path = merged((draft, 0.5), dtype=None)
    assert report.dtype == "BF16"
    assert torch.equal(deltas_of(path)[target], 0.5 * diff.double())


def test_a_fused_file_is_cut_into_its_projections(Draft, merged, tiny, make_model):
    draft = Draft(1)
    fused = f"{BLOCK}.attn.to_qkv"
    draft.tensors[draft.key(fused, "down")] = draft.random(6, 128)
    draft.tensors[draft.key(fused, "up")] = draft.random(384, 6)
    draft.put(fused, "diff_b", 384)
    down, up, bias = (tensor.double() for tensor in draft.tensors.values())
    report, path = merged((draft, 0.5), diffs=True)
    names = [f"{BLOCK}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    found = deltas_of(path)
    assert list(found) == names
    for index, name in enumerate(names):
        rows = slice(128 * index, 128 * (index + 1))
        assert error(found[name], 0.5 * up[rows] @ down) < FLOAT32
        assert torch.allclose(
            load_file(path)[f"{PREFIX}{name}.diff_b"].double(), 0.5 * bias[rows], atol=1e-8
        )
    assert report.loras[0].modules_applied == 1


def test_equal_downs_are_shared(Draft, merged):
    target = f"{BLOCK}.attn.to_q"
    first = Draft(1).add(target, 8)
    second = Draft(2).add(target, 8, down=first.tensors[first.key(target, "down")])
    report, path = merged((first, 0.5), (second, -0.25))
    assert report.modules[0].rank == 8
    expected = 0.5 * first.deltas[target] - 0.25 * second.deltas[target]
    assert error(deltas_of(path)[target], expected) < FLOAT32


def test_more_ranks_than_a_module_has_are_not_written(Draft, merged):
    """proj_out has 64 rows; one LoRA alone stays as it is stored."""
    first, second = Draft(1).add("proj_out", 48), Draft(2).add("proj_out", 96)
    report, path = merged((first, 1.0), (second, 0.5))
    assert report.modules[0].rank == 64
    expected = first.deltas["proj_out"] + 0.5 * second.deltas["proj_out"]
    assert error(deltas_of(path)["proj_out"], expected) < FLOAT32
    report, path = merged((second, 1.0))
    assert report.modules[0].rank == 96


def test_what_cancels_and_what_is_zero_is_left_out(Draft, merged):
    first = Draft(1).add("proj_out", 4).add("img_in", 4)
    second = Draft(1).add("proj_out", 4)
    report, path = merged((first, 1.0), (second, -1.0))
    assert report.zero == ("proj_out",)
    assert report.complete
    assert list(modules_of(path)) == ["img_in"]
    none = Draft(3).add("proj_out", 4, up=torch.zeros(64, 4))
    report, _ = merged((first, 1.0), (none, 1.0))
    assert {module.path: module.rank for module in report.modules} == {"proj_out": 4, "img_in": 4}
    assert [lora.all_zero for lora in report.loras] == [False, True]
    with pytest.raises(errors.NothingToApplyError, match="the sum of all deltas is zero"):
        merged((none, 1.0))
    with pytest.raises(errors.NothingToApplyError, match="every strength is 0"):
        merged((first, 0.0))


def test_a_peft_folder_is_a_source(dense, tiny, merged, tmp_path):  # noqa: F811
    case = oracles.by_peft(dense, tmp_path / "peft", **oracles.PATTERNS)
    model = oracles.EmulatedQwenImageTransformer.from_diffusers(
        dense, rank=32, precision=oracles.Precision.EXACT, dtype=torch.float32
    )
    tiny(model)
    _, path = merged((case.source, 1.0))
    found, expected = deltas_of(path), oracles.oracle_deltas(case.oracle)
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name]) for name in expected) < FLOAT32


def test_the_network_s_scale_of_a_lokr_is_a_choice(Draft, merged, tmp_path):
    draft, dense_delta = lokr(Draft, "proj_out")
    path = draft.save(tmp_path / "a.safetensors", {"ss_network_alpha": "1", "ss_network_dim": "4"})
    for choice, scale in ((LokrScale.STANDARD, 1.0), (LokrScale.NETWORK, 0.25)):
        _, result = merged((path, 1.0), lokr_scale=choice)
        assert error(deltas_of(result)["proj_out"], scale * dense_delta) < FLOAT32


# ---- truncated ----


def stacks(Draft):
    """Sums of every make over one module, with their dense float64 delta."""
    target = f"{BLOCK}.attn.to_add_out"
    low, lower = Draft(1).add(target, 24), Draft(2).add(target, 40)
    kron, kron_delta = lokr(Draft, target, seed=3)
    halves, halves_delta = lokr(Draft, target, ranks=(None, 3), alpha=2.0)
    hadamard, hadamard_delta = loha(Draft, target, ranks=(12, 12))
    full = Draft(5).put(target, "diff", 128, 128)
    (diff,) = full.tensors.values()
    return {
        "one LoRA": ([low], low.deltas[target]),
        "two LoRAs": ([low, lower], low.deltas[target] + lower.deltas[target]),
        "LoKr": ([kron], kron_delta),
        "LoKr in halves": ([halves], halves_delta),
        "LoKr and LoRA": ([kron, low], kron_delta + low.deltas[target]),
        "LoHa": ([hadamard], hadamard_delta),
        "LoHa and LoRA": ([hadamard, low], hadamard_delta + low.deltas[target]),
        "full": ([full], diff.double()),
        "full and LoRA": ([full, low], diff.double() + low.deltas[target]),
    }


STACKS = ["one LoRA", "two LoRAs", "LoKr", "LoKr in halves", "LoKr and LoRA"]
STACKS += ["LoHa", "LoHa and LoRA", "full", "full and LoRA"]


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_a_rank_is_the_optimum(name, rank, Draft, merged):
    drafts, expected = stacks(Draft)[name]
    report, path = merged(*((draft, -0.5) for draft in drafts), cut=Cut(rank=rank))
    (module,) = report.modules
    (found,) = deltas_of(path).values()
    best = best_lost(expected, rank)
    assert module.rank == min(rank, int(torch.linalg.matrix_rank(expected)))
    assert energy_lost(found, -0.5 * expected) == pytest.approx(best, rel=1e-4, abs=1e-10)
    assert module.share_lost == pytest.approx(best, rel=1e-4, abs=1e-10)
    assert module.energy == pytest.approx(0.25 * float(expected.square().sum()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_an_energy_is_kept_with_the_fewest_ranks(name, share, Draft, merged):
    drafts, expected = stacks(Draft)[name]
    report, path = merged(*((draft, 2.0) for draft in drafts), cut=Cut(energy=share))
    (module,) = report.modules
    (found,) = deltas_of(path).values()
    assert energy_lost(found, 2.0 * expected) <= 1 - share + 1e-6
    assert best_lost(expected, module.rank - 1) > 1 - share - 1e-6
    assert module.share_lost == pytest.approx(best_lost(expected, module.rank), abs=1e-6)


@pytest.mark.parametrize("name", STACKS)
def test_all_of_the_energy_is_everything(name, Draft, merged):
    drafts, expected = stacks(Draft)[name]
    _, path = merged(*((draft, 1.0) for draft in drafts), cut=Cut(energy=1.0))
    (found,) = deltas_of(path).values()
    assert error(found, expected) < 1e-5


def test_more_ranks_than_are_looked_at_first(resize, Draft, merged):
    """Few leading ranks are decomposed first; they are doubled until the energy is there."""
    resize(merge_first_rank=2)
    for name in ("LoKr", "full", "LoKr and LoRA"):
        drafts, expected = stacks(Draft)[name]
        report, _ = merged(*((draft, 1.0) for draft in drafts), cut=Cut(energy=0.8))
        (module,) = report.modules
        assert module.share_lost <= 0.2
        assert best_lost(expected, module.rank - 1) > 0.2 - 1e-6


def test_what_fits_the_rank_is_not_touched(Draft, merged):
    target = f"{BLOCK}.attn.to_q"
    draft = Draft(1).add(target, 8)
    report, path = merged((draft, 1.0), cut=Cut(rank=8))
    down, up = modules_of(path)[target]
    assert torch.equal(down.float(), draft.tensors[draft.key(target, "down")])
    assert torch.equal(up.float(), draft.tensors[draft.key(target, "up")])
    assert (report.share_lost, report.worst) == (0.0, None)


def test_a_sum_too_large_for_a_full_decomposition_is_near_the_optimum(resize, Draft, merged):
    """Past `Sizes.exact_svd_side` a range finder stands in; what it lacks counts as lost."""
    resize(exact_svd_side=32)
    drafts, expected = stacks(Draft)["full and LoRA"]
    report, path = merged(*((draft, 1.0) for draft in drafts), cut=Cut(rank=16))
    (found,) = deltas_of(path).values()
    (module,) = report.modules
    assert module.share_lost == pytest.approx(energy_lost(found, expected), rel=1e-3)
    assert module.share_lost < 1.02 * best_lost(expected, 16)


@pytest.fixture
def large_sums(resize):
    """Sums of any number of ranks are large ones."""
    resize(merge_exact_rank=16, exact_side=16)


@pytest.mark.parametrize("cut", [Cut(rank=8), Cut(rank=24), Cut(energy=0.5), Cut(energy=0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("large_sums")
def test_a_large_sum_is_near_the_optimum(cut, dtype, resize, Draft, merged):
    """It is found by iteration; the loss stated is that of what is written."""
    resize(merge_first_rank=4)
    target = f"{BLOCK}.attn.to_add_out"
    drafts = [Draft(n, dtype=dtype).add(target, rank) for n, rank in enumerate((24, 40, 17), 1)]
    expected = sum(draft.deltas[target] for draft in drafts)
    report, path = merged(*((draft, 1.5) for draft in drafts), cut=cut)
    (found,), (module,) = deltas_of(path).values(), report.modules
    lost = energy_lost(found, 1.5 * expected)
    assert module.share_lost == pytest.approx(lost, abs=3e-6)
    assert lost < 1.05 * best_lost(expected, module.rank) + 3e-6
    if cut.energy is None:
        assert module.rank == cut.rank
    else:
        assert lost <= 1 - cut.energy + 3e-6
        # At most one rank in twenty, or one, more than the optimum takes.
        fewest = next(r for r in range(81) if best_lost(expected, r) <= 1 - cut.energy)
        assert module.rank <= max(1.05 * fewest, fewest + 1)
    resize(merge_exact_rank=512)
    _, exact = merged(*((draft, 1.5) for draft in drafts), cut=cut)
    assert not all(map(torch.equal, modules_of(path)[target], modules_of(exact)[target]))


@pytest.mark.usefixtures("large_sums")
def test_a_large_sum_of_which_nearly_all_is_kept_is_decomposed(Draft, merged):
    target = f"{BLOCK}.attn.to_add_out"
    drafts = [Draft(n).add(target, 30) for n in (1, 2, 3)]
    expected = sum(draft.deltas[target] for draft in drafts)
    for share in (1.0, 0.99999):
        _, path = merged(*((draft, 1.0) for draft in drafts), cut=Cut(energy=share))
        (found,) = deltas_of(path).values()
        assert energy_lost(found, expected) <= 1 - share + 1e-10


@pytest.mark.usefixtures("large_sums")
def test_a_large_sum_that_cancels_is_decomposed(Draft, merged):
    """Gram matrices do not hold it."""
    target = f"{BLOCK}.attn.to_add_out"
    one, other = Draft(1).add(target, 30), Draft(1).add(target, 30)
    other.tensors = {key: tensor * (1 + 2**-12) for key, tensor in other.tensors.items()}
    expected = one.deltas[target] * (1 - (1 + 2**-12) ** 2)
    report, path = merged((one, 1.0), (other, -1.0), cut=Cut(rank=8))
    (found,), (module,) = deltas_of(path).values(), report.modules
    lost = energy_lost(found, expected)
    assert lost == pytest.approx(module.share_lost, rel=1e-3)
    assert lost == pytest.approx(best_lost(expected, 8), rel=1e-3)


# ---- read by others ----


@pytest.fixture
def dense_merge(dense, tiny, merged, tmp_path):  # noqa: F811
    """Two files of real tools with ranks of every size, merged; and their deltas by PEFT."""
    model = oracles.EmulatedQwenImageTransformer.from_diffusers(
        dense, rank=32, precision=oracles.Precision.EXACT, dtype=torch.float32
    )
    tiny(model)
    cases = []
    for name in ("pipeline-rslora-patterns", "kohya"):
        write, options = oracles.CASES[name]
        folder = tmp_path / name
        folder.mkdir()
        cases.append(write(dense, folder, **options))
    report, path = merged(*((case.source, s) for case, s in zip(cases, (0.8, -0.5), strict=True)))
    assert len({module.rank for module in report.modules}) > 1
    expected = {}
    for case, strength in zip(cases, (0.8, -0.5), strict=True):
        for target, delta in oracles.oracle_deltas(case.oracle).items():
            expected[target] = expected.get(target, 0) + strength * delta
    return path, expected


def assert_deltas(found, expected):
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name]) for name in expected) < FLOAT32


def test_diffusers_reads_it_alike(dense, dense_merge):  # noqa: F811
    path, expected = dense_merge
    assert_deltas(oracles.oracle_deltas(oracles.read_by_pipeline(dense, path)), expected)


def test_diffusers_of_before_reads_it_alike(dense, dense_merge, monkeypatch):  # noqa: F811
    """It guesses the alphas of mixed ranks wrong, but not where the metadata says them."""
    guesses = []
    guess = peft_utils.get_peft_kwargs
    monkeypatch.setattr(peft_utils, "get_peft_kwargs", lambda *a, **k: guesses.append(a) or guess())
    path, expected = dense_merge
    assert_deltas(oracles.oracle_deltas(oracles.read_by_pipeline(dense, path)), expected)
    assert not guesses


def test_peft_reads_it_alike(dense, dense_merge):  # noqa: F811
    path, expected = dense_merge
    state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    config = {name.removeprefix("transformer."): value for name, value in metadata.items()}
    model = get_peft_model(copy.deepcopy(dense), LoraConfig(**config))
    keys = {f"base_model.model.{k.removeprefix('transformer.')}": t for k, t in state.items()}
    assert not set_peft_model_state_dict(model, keys).unexpected_keys
    assert_deltas(oracles.oracle_deltas(model), expected)


def test_a_file_of_one_rank_needs_no_metadata(Draft, merged):
    _, path = merged((Draft.full(1, 4), 1.0))
    with safe_open(path, "pt") as file:
        assert sorted(file.metadata()) == ["format", "qwenlora.merge"]


# ---- biases, norms, tables ----


def with_values(Draft):
    draft = Draft(1).add(f"{BLOCK}.attn.to_k", 4).put(f"{BLOCK}.attn.to_k", "diff_b", 128)
    draft.put(f"{BLOCK}.img_mod.1", "diff_b", 768).add(f"{BLOCK}.img_mod.1", 4)
    draft.put(f"{BLOCK}.txt_mlp.net.2", "diff_b", 128).add("proj_out", 2)
    return draft.put(f"{BLOCK}.attn.norm_q", "w_norm", 64).put("proj_out", "diff_b", 64)


def test_values_are_left_out_by_name(Draft, merged):
    draft = with_values(Draft)
    report, path = merged((draft, 0.5))
    assert not report.complete
    left_out = {skip.name for skip in report.loras[0].skipped if skip.matters}
    assert left_out == {key for key in draft.tensors if key.endswith((".diff_b", ".w_norm"))}
    assert not any(key.endswith((".diff", ".diff_b")) for key in load_file(path))
    only = Draft(2).put("proj_out", "diff_b", 64)
    with pytest.raises(errors.NothingToApplyError, match=r"deltas of biases.*\nhint: `--diffs`"):
        merged((only, 1.0))


def test_what_is_left_out_does_not_widen_the_dtype(Draft, merged):
    draft = Draft(1, dtype=torch.bfloat16).add("proj_out", 4)
    draft.tensors[draft.key("proj_out", "diff_b")] = torch.ones(64)
    assert merged((draft, 1.0), dtype=None)[0].dtype == "BF16"
    assert merged((draft, 1.0), dtype=None, diffs=True)[0].dtype == "F32"


def test_values_are_written_where_asked_for(Draft, merged, model, make_model, probe):
    draft, other = with_values(Draft), Draft(2).put("proj_out", "diff_b", 64)
    report, path = merged((draft, 0.5), (other, -1.0), diffs=True)
    assert report.complete
    assert set(report.values) == {
        f"{BLOCK}.attn.to_k.diff_b",
        f"{BLOCK}.img_mod.1.diff_b",
        f"{BLOCK}.txt_mlp.net.2.diff_b",
        f"{BLOCK}.attn.norm_q.diff",
        "proj_out.diff_b",
    }
    stacked = make_model()
    qwenlora.compose_loras(stacked, [(draft.tensors, 0.5), (other.tensors, -1.0)], strict=True)
    qwenlora.compose_loras(model, path, strict=True)
    expected = dict(probe.tensors(stacked))
    for name, tensor in probe.tensors(model):
        assert torch.allclose(tensor.double(), expected[name].double(), atol=1e-6), name


def test_a_table_s_delta_is_written_where_asked_for(tiny, merged, tmp_path):
    """Layered's embedding, at its real size."""
    tiny.slots = known.known_slots("qwen-image")
    key = "time_text_embed.addition_t_embedding"
    halves = {"lora_embedding_A": torch.randn(4, 2), "lora_embedding_B": torch.randn(3072, 4)}
    tensors = {f"base_model.model.{key}.{name}": half for name, half in halves.items()}
    tensors["base_model.model.img_in.lora_A.weight"] = torch.randn(4, 64)
    tensors["base_model.model.img_in.lora_B.weight"] = torch.randn(3072, 4)
    _, path = merged((tensors, 0.5), diffs=True)
    expected = 0.5 * (halves["lora_embedding_B"] @ halves["lora_embedding_A"]).mT
    assert torch.allclose(load_file(path)[f"{PREFIX}{key}.diff"], expected, atol=1e-6)
    assert qwenlora.read_keys(path)["verdict"] == "apply"


def test_diffusers_refuses_values(Draft, merged):
    """Why they are not written unless asked for."""
    draft = with_values(Draft)
    _, path = merged((draft, 1.0), diffs=True)
    with pytest.raises(ValueError, match="should be empty"):
        QwenImageLoraLoaderMixin.lora_state_dict(path)
    _, path = merged((draft, 1.0))
    assert QwenImageLoraLoaderMixin.lora_state_dict(path)


# ---- dtypes and numbers ----


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([torch.bfloat16], "BF16"),
        ([torch.float16], "F16"),
        ([torch.float8_e4m3fn], "BF16"),
        ([torch.float16, torch.bfloat16], "F32"),
        ([torch.float32, torch.bfloat16], "F32"),
        ([torch.float64], "F32"),
    ],
)
def test_the_dtype_is_the_narrowest_that_holds_the_sources(stored, expected, Draft, merged):
    drafts = [Draft(n, dtype=dtype).add("proj_out", 4) for n, dtype in enumerate(stored)]
    report, path = merged(*((draft, 1.0) for draft in drafts), dtype=None)
    assert report.dtype == expected
    factors = [t for key, t in load_file(path).items() if not key.endswith(".alpha")]
    assert {NAMES[tensor.dtype] for tensor in factors} == {expected}


def test_what_is_not_finite_is_named(Draft, merged, tmp_path):
    good, bad = Draft(1).add("proj_out", 4), Draft(2).add("proj_out", 4).add("img_in", 4)
    bad.tensors[bad.key("proj_out", "down")][0, 0] = float("nan")
    for cut in (None, Cut(rank=2), Cut(energy=0.5)):
        with pytest.raises(errors.NonFiniteError, match=r"`proj_out`: a tensor of `source-\d+`"):
            merged((good, 1.0), (bad, 1.0), cut=cut)
    with pytest.raises(errors.NonFiniteError, match=r"`proj_out` would hold .* in F16\nhint: "):
        merged((good, 1e9), dtype=torch.float16)
    assert not list(tmp_path.glob("merged-*"))
    assert not list(tmp_path.glob(".qwenlora-*"))


def test_what_is_too_small_for_the_dtype_is_named(Draft, merged):
    report, _ = merged(
        (Draft(1).add("proj_out", 4), 1e-30),
        (Draft(2).add("img_in", 4), 1.0),
        dtype=torch.float16,
    )
    assert report.vanished == ("proj_out",)
    assert not report.complete


# ---- small values in float16 ----

HALF = 4e-4
"""Relative error of a delta whose halves are rounded to float16; measured: 3.1e-4."""


def alphas_of(path):
    tensors = load_file(path)
    return {key.split(".")[1]: float(t) for key, t in tensors.items() if key.endswith(".alpha")}


def half_pair(Draft, seed, *, down=0.02, up=1e-2, dtype=torch.float16, alpha=None, rank=8):
    """A LoRA of `proj_out` with halves of these magnitudes, and its delta."""
    draft = Draft(seed, dtype=dtype)
    halves = {"down": draft.random(rank, 128), "up": draft.random(64, rank)}
    for role, size in (("down", down), ("up", up)):
        half = halves[role].double()
        halves[role] = (half / half.std() * size).to(dtype)
        draft.tensors[draft.key("proj_out", role)] = halves[role]
    if alpha is not None:
        draft.tensors[draft.key("proj_out", "alpha")] = torch.tensor(alpha)
    delta = halves["up"].double() @ halves["down"].double()
    return draft, delta * (1.0 if alpha is None else alpha / rank)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("alpha", [None, 1.0, 3e-4])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.3, -1e-4])
def test_small_ups_are_not_lost(size, alpha, strength, Draft, merged):
    draft, delta = half_pair(Draft, 1, up=size, alpha=alpha)
    report, path = merged((draft, strength), dtype=None)
    assert (report.dtype, report.vanished) == ("F16", ())
    (found,) = deltas_of(path).values()
    assert error(found, strength * delta) < HALF


def test_what_loses_nothing_keeps_its_bits(Draft, merged):
    """Values that are subnormal in the source stay what they are; alpha stays the rank."""
    for size, strength in ((1e-2, 0.5), (1e-6, 1.0), (1e-6, -1.0), (1e-6, 2.0)):
        draft, _ = half_pair(Draft, 1, up=size)
        _, path = merged((draft, strength), dtype=None)
        up = load_file(path)[f"{PREFIX}proj_out.lora_up.weight"]
        assert torch.equal(up, draft.tensors[draft.key("proj_out", "up")] * strength)
        assert alphas_of(path) == {"proj_out": 8.0}


def test_a_merged_file_merged_again_keeps_its_bits(Draft, merged):
    draft, _ = half_pair(Draft, 1, up=1e-5, alpha=1.0)
    _, path = merged((draft, 0.3), dtype=None)
    _, again = merged((path, 1.0), dtype=None)
    first, second = load_file(path), load_file(again)
    assert alphas_of(path)["proj_out"] < 1
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_down_is_never_changed_by_a_small_up(Draft, merged):
    draft, _ = half_pair(Draft, 1, up=1e-5, alpha=1.0)
    _, path = merged((draft, 0.5), dtype=None)
    down = load_file(path)[f"{PREFIX}proj_out.lora_down.weight"]
    assert torch.equal(down, draft.tensors[draft.key("proj_out", "down")])
    assert 0 < alphas_of(path)["proj_out"] < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("down", "up"), [(1e-7, 1e2), (1e-2, 1e-7), (1e-6, 1e-6)])
def test_small_halves_of_wider_dtypes_are_written_in_float16(down, up, dtype, Draft, merged):
    draft, delta = half_pair(Draft, 1, down=down, up=up, dtype=dtype)
    _, path = merged((draft, 0.7), dtype=torch.float16)
    (found,) = deltas_of(path).values()
    assert error(found, 0.7 * delta) < HALF
    # What has float32's exponents moves nothing: `deltas_of` checks the alphas.
    _, path = merged((draft, 0.7), dtype=dtype)
    deltas_of(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ranks_of_opposite_magnitudes_are_both_kept(dtype, Draft, merged):
    """One LoRA's `up` is large beside a small `down`, the other's the reverse; deltas are alike."""
    first, delta = half_pair(Draft, 1, down=2e-3, up=4.0, dtype=dtype)
    second, other = half_pair(Draft, 2, down=400.0, up=2e-5, dtype=dtype)
    _, path = merged((first, 0.3), (second, 0.3), dtype=torch.float16)
    (found,) = deltas_of(path).values()
    assert error(found, 0.3 * (delta + other)) < HALF
    # Alone in the sum: what is left once the first's own halves are taken away.
    down, up = modules_of(path)["proj_out"]
    assert error(up[:, 8:] @ down[8:], 0.3 * other) < HALF


def test_nothing_overflows_where_small_ranks_stand_beside_large_ones(Draft, merged):
    large, delta = half_pair(Draft, 1, down=1e-5, up=5e3, dtype=torch.float32)
    small, other = half_pair(Draft, 2, down=1e3, up=1e-7, dtype=torch.float32)
    _, path = merged((large, 1.0), (small, 1.0), dtype=torch.float16)
    (found,) = deltas_of(path).values()
    assert error(found, delta + other) < 5e-2
    assert all(bool(t.isfinite().all()) for t in load_file(path).values())


@pytest.mark.parametrize("cut", [Cut(rank=3), Cut(rank=8), Cut(energy=0.9)])
def test_what_is_cut_is_not_lost_either(cut, Draft, merged):
    first, delta = half_pair(Draft, 1, up=1e-5)
    second, other = half_pair(Draft, 2, up=1e-5)
    report, path = merged((first, 0.5), (second, 0.3), cut=cut, dtype=None)
    (found,), (module,) = deltas_of(path).values(), report.modules
    lost = energy_lost(found, 0.5 * delta + 0.3 * other)
    assert lost == pytest.approx(module.share_lost, abs=1e-6)


@pytest.mark.parametrize("name", STACKS)
def test_every_kind_is_written_in_float16(name, Draft, merged):
    drafts, expected = stacks(Draft)[name]
    _, path = merged(*((draft, 1e-5) for draft in drafts), dtype=torch.float16)
    (found,) = deltas_of(path).values()
    assert error(found, 1e-5 * expected) < HALF


def test_modules_move_each_by_its_own_power(Draft, merged):
    draft, delta = half_pair(Draft, 1, up=1e-5)
    draft.add("img_in", 4).tensors[draft.key("img_in", "up")] *= 0.5
    _, path = merged((draft, 0.3), dtype=torch.float16)
    assert alphas_of(path)["proj_out"] < 1
    assert alphas_of(path)["img_in"] == 4
    assert error(deltas_of(path)["proj_out"], 0.3 * delta) < HALF


def test_small_values_are_written_in_float32(Draft, merged):
    """There is no alpha beside them."""
    draft = Draft(1, dtype=torch.float16).add("proj_out", 4).put("proj_out", "diff_b", 64)
    draft.put("img_in", "diff_b", 128)
    for target, factor in (("proj_out", 1e-4), ("img_in", 1.0)):
        key = draft.key(target, "diff_b")
        draft.tensors[key] = draft.tensors[key] * factor
    _, path = merged((draft, 0.3), dtype=None, diffs=True)
    tensors = load_file(path)
    small, usual = (tensors[f"{PREFIX}{name}.diff_b"] for name in ("proj_out", "img_in"))
    assert (small.dtype, usual.dtype) == (torch.float32, torch.float16)
    expected = 0.3 * draft.tensors[draft.key("proj_out", "diff_b")].double()
    assert error(small.double(), expected) < FLOAT32


def test_diffusers_reads_small_values_alike(dense, tiny, merged, tmp_path):  # noqa: F811
    """It splits alpha over both halves, in their dtype: both keep more than `up` alone had."""
    write, options = oracles.CASES["kohya"]
    case = write(dense, tmp_path, **options)
    model = oracles.EmulatedQwenImageTransformer.from_diffusers(
        dense, rank=32, precision=oracles.Precision.EXACT, dtype=torch.float32
    )
    tiny(model)
    _, path = merged((case.source, 1e-4), dtype=torch.float16)
    assert any(alpha < 1e-1 for alpha in alphas_of(path).values())
    expected = {n: 1e-4 * d for n, d in oracles.oracle_deltas(case.oracle).items()}
    found = oracles.oracle_deltas(oracles.read_by_pipeline(dense, path))
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name]) for name in expected) < 2e-3


# ---- the file ----


def test_the_same_sources_give_the_same_bytes(Draft, merged):
    stack = [(Draft.full(1, 4), 0.8), (Draft(2).add("proj_out", 9), 0.5)]
    for cut in (None, Cut(rank=3), Cut(energy=0.9)):
        contents = []
        for folder in range(2):
            _, path = merged(*stack, cut=cut)
            contents.append(path.read_bytes())
            assert folder or path.stat().st_size
        # The sources' names are in the metadata; these differ by a number of one width.
        first, second = (json.loads(c[8 : 8 + int.from_bytes(c[:8], "little")]) for c in contents)
        assert first.keys() == second.keys()
        assert contents[0][-1000:] == contents[1][-1000:]


def test_the_file_says_what_it_is_made_of(Draft, merged):
    stack = [(Draft(1).add("proj_out", 8), 0.8), (Draft(2).add("proj_out", 8), -0.5)]
    report, path = merged(*stack, cut=Cut(rank=4))
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["qwenlora.merge"])
    assert [(s["strength"], s["modules"]) for s in document["sources"]] == [(0.8, 1), (-0.5, 1)]
    assert document["cut"] == {"rank": 4}
    assert float(document["energy_lost"]) == pytest.approx(report.share_lost, rel=1e-3)
    assert report.size_bytes == path.stat().st_size


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)
sizes = st.integers(1, 12)


@pytest.mark.slow
@given(rows=st.dictionaries(names, st.tuples(sizes, sizes, sizes, sizes), max_size=6))
def test_whatever_is_written_within_its_bounds_is_read_again(rows, tmp_path_factory):
    """Any dtype and any shape up to the bound; the header never outgrows its room."""
    path = tmp_path_factory.mktemp("writer") / "x.safetensors"
    dtypes = (torch.float32, torch.bfloat16)
    bounds = [
        (name, dtypes[i % 2], (2 * (r + more_r), c + more_c))
        for i, (name, (r, c, more_r, more_c)) in enumerate(rows.items())
    ]
    tensors = {
        name: torch.randn(2 * r, c).to(dtypes[i % 2])
        for i, (name, (r, c, _, _)) in enumerate(rows.items())
    }
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, path, bounds, {"a": "long enough"})
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish({"a": "shorter"})
    assert path.stat().st_size == writer.size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "shorter"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), t) for name, t in tensors.items())


@pytest.mark.parametrize("model", ["qwen-image", "z-image"])
def test_every_tensor_of_the_real_model_is_aligned(model):
    """Offsets of pairs in two bytes leave the alphas, in four, where they can be viewed."""
    for slot in known.known_slots(model).values():
        assert all(side % 2 == 0 for side in slot.sides if side != 1)
        assert sum(slot.sides) % 2 == 0 or min(slot.sides) == 1


@pytest.mark.slow
def test_the_real_table_is_the_real_model(tmp_path):
    """The published Lightning layout, through the real sizes."""
    slots = known.known_slots("qwen-image")
    assert sum(len(slot.parts) for slot in slots.values()) == 60 * 18 + 8
    assert slots["transformer_blocks.7.attn.to_qkv"].rows == {
        f"transformer_blocks.7.attn.{name}": (3072 * n, 3072 * (n + 1))
        for n, name in enumerate(("to_q", "to_k", "to_v"))
    }
    rows = {"txt_in": (3072, 3584), "transformer_blocks.59.attn.add_k_proj": (3072, 3072)}
    tensors = {}
    for name, (out, inputs) in rows.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, inputs)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4)
        tensors[f"{name}.alpha"] = torch.tensor(1)
    save_file(tensors, tmp_path / "a.safetensors")
    merge_loras(
        [LoraSpec(tmp_path / "a.safetensors", 2.0)], tmp_path / "b.safetensors", MergeOptions()
    )
    for name, delta in deltas_of(tmp_path / "b.safetensors").items():
        expected = 0.5 * (
            tensors[f"{name}.lora_up.weight"].double()
            @ tensors[f"{name}.lora_down.weight"].double()
        )
        assert error(delta, expected) < FLOAT32
    assert qwenlora.read_keys(tmp_path / "b.safetensors")["verdict"] == "apply"


# ---- memory and changes ----


def test_one_slot_is_in_memory_at_a_time(Draft, tiny, tmp_path, monkeypatch):
    paths = [Draft.full(n, 4, blocks=2).save(tmp_path / f"{n}.safetensors") for n in range(2)]
    alive: list[weakref.ref] = []
    most = []
    opened = FileSource.open

    def open_counting(source):
        fetcher = opened(source)
        fetch = fetcher.fetch

        def counting(refs):
            tensors = fetch(refs)
            alive.extend(weakref.ref(tensor) for tensor in tensors)
            most.append(sum(ref() is not None for ref in alive))
            return tensors

        fetcher.fetch = counting
        return fetcher

    monkeypatch.setattr(FileSource, "open", open_counting)
    specs = [LoraSpec(path) for path in paths]
    merge_loras(specs, tmp_path / "o.safetensors", MergeOptions(), known=tiny.slots)
    assert len(alive) == 2 * len(load_file(paths[0]))
    # Q, K and V of both files, two halves each, are the most that any slot has.
    assert max(most) == 2 * 3 * 2


def test_a_source_that_changes_meanwhile_gives_no_file(Draft, tiny, tmp_path):
    path = Draft.full(1, 4).save(tmp_path / "a.safetensors")

    def progress(done, _):
        if done == 3:
            with path.open("ab") as file:
                file.write(b"more")

    with pytest.raises(errors.LoraReadError, match="changed"):
        merge_loras(
            [LoraSpec(path)],
            tmp_path / "o.safetensors",
            MergeOptions(),
            progress=progress,
            known=tiny.slots,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_set_is_merged_as_its_loras(Draft, tiny, tmp_path):
    """Files and state dicts alike; a LoRA's modulation that is off stays off."""
    path = Draft.full(1, 4).save(tmp_path / "a.safetensors")
    held = Draft.full(2, 4).tensors
    specs = [LoraSpec(path, 0.5, modulation=False), LoraSpec(held, -1.0, name="held")]
    outputs = [tmp_path / f"{kind}.safetensors" for kind in ("specs", "set", "no modulation")]
    for loras, output in zip((specs, LoraSet.of(specs)), outputs, strict=False):
        report = merge_loras(loras, output, MergeOptions(), known=tiny.slots)
        assert [lora.name for lora in report.loras] == ["a", "held"]
        assert [bool(lora.turned_off) for lora in report.loras] == [True, False]
        assert report.complete
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    without = LoraSet.of(specs, options=ComposeOptions(modulation=False))
    merge_loras(without, outputs[2], MergeOptions(), known=tiny.slots)
    keys = [set(load_file(output)) for output in outputs]
    gone = {key for key in keys[0] if "_mod.1." in key}
    assert gone
    assert keys[2] == keys[0] - gone


def test_a_set_whose_file_changed_since_gives_no_file(Draft, tiny, tmp_path):
    path = Draft.full(1, 4).save(tmp_path / "a.safetensors")
    wanted = LoraSet.of(path)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(errors.LoraReadError, match="changed"):
        merge_loras(wanted, tmp_path / "o.safetensors", MergeOptions(), known=tiny.slots)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_composing_what_was_merged_by_energy(make_model, probe, Draft, merged):
    """The whole way: LoKr to a plain LoRA to the model, with the loss that was stated."""
    target = f"{BLOCK}.attn.to_add_out"
    draft, dense_delta = lokr(Draft, target)
    report, path = merged((draft, 1.0), cut=Cut(energy=0.95))
    model = make_model()
    qwenlora.compose_loras(model, path, strict=True, options=ComposeOptions())
    found = probe.delta(model, target)
    assert energy_lost(found, dense_delta) == pytest.approx(report.share_lost, rel=1e-3)
