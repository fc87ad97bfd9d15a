"""Strength over the course of sampling: the text form, its factors, and what is composed."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

import qwenlora
from qwenlora import ComfyQwenImageWrapper, ComposeOptions, LoraSet, LoraSpec, Schedule
from qwenlora._reference import schedule_factor
from qwenlora.compose.planning import plan_report
from qwenlora.errors import OtherModelError, QwenLoraError, ScheduleError
from qwenlora.merge.plan import MergeOptions, MergePlan
from qwenlora.runtime import OPTIONS_KEY
from qwenlora.schedule import ONE_THROUGHOUT, ScheduleMode

LINEAR, STEPS = ScheduleMode.LINEAR, ScheduleMode.STEPS
BLOCKS = 3
SHARES = [step / 8 for step in range(8)]

SHARE = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 5e-324, 1e-9, 0.9999999999])
FACTOR = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.4e38, -3.4e38])
KEYFRAMES = st.lists(st.tuples(SHARE, FACTOR), min_size=1, max_size=6, unique_by=lambda own: own[0])
MODES = st.sampled_from([LINEAR, STEPS])

# ---- the text form ----


@pytest.mark.parametrize(
    ("text", "keyframes", "mode"),
    [
        ("0:1, 0.5:0.3", ((0.0, 1.0), (0.5, 0.3)), LINEAR),
        (" 50 % :.3,0%:1 ;", ((0.0, 1.0), (0.5, 0.3)), LINEAR),
        ("0:1, 0.5:0.3; steps", ((0.0, 1.0), (0.5, 0.3)), STEPS),
        ("STEPS; 0.25:-1, 1:2e0", ((0.0, -1.0), (1.0, 2.0)), STEPS),
        ("0.25:-1, 1:2", ((0.25, -1.0), (1.0, 2.0)), LINEAR),
        ("0:1; 0.5:0; linear", ((0.0, 1.0), (0.5, 0.0)), LINEAR),
        ("0.7:0.5", ((0.0, 0.5),), LINEAR),
        ("0.7:0.5; steps", ((0.0, 0.5),), LINEAR),
        ("", ((0.0, 1.0),), LINEAR),
        (" ; steps", ((0.0, 1.0),), LINEAR),
        ("0:1, 0.2:1, 0.8:1", ((0.0, 1.0),), LINEAR),
        ("0:1, 0.2:1, 0.4:1, 0.6:0, 0.8:0, 1:0", ((0.4, 1.0), (0.6, 0.0)), LINEAR),
        ("0:1, 0.2:0, 0.4:0, 0.5:0, 0.6:1", ((0.0, 1.0), (0.2, 0.0), (0.5, 0.0), (0.6, 1)), LINEAR),
        ("0.1:1, 0.2:1, 0.4:0, 0.6:0; steps", ((0.0, 1.0), (0.4, 0.0)), STEPS),
        ("0:-0, 1:1", ((0.0, 0.0), (1.0, 1.0)), LINEAR),
    ],
)
def test_texts(text, keyframes, mode):
    found = Schedule.parse(text)
    assert (found.keyframes, found.mode) == (keyframes, mode)
    assert Schedule.parse(str(found)) == found
    assert bool(found) == (text not in ("", " ; steps", "0:1, 0.2:1, 0.8:1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:1,", "`` at character 5 is an empty entry: leave out one comma"),
        ("0.5", "`0.5` at character 1 has no factor: write it behind a colon; the modes are"),
        ("half:1", "`half` at character 1 is no share of the course: write `0.5` or `50%`"),
        ("0:1, 1.5:0", "`1.5` at character 6 is outside of the course: it goes from 0 to 1"),
        ("-10%:0", "`-10%` at character 1 is outside of the course"),
        ("0:1, 50%:0, 0.5:1", "`0.5` at character 13 is `50%` again: name it once"),
        ("0:on", "`on` at character 3 is no factor: a factor is a number such as 0.5 or -1"),
        ("0:1e39", "`1e39` at character 3 is too large a factor"),
        ("0:nan", "`nan` at character 3 is no factor"),
        ("0:1; steps; linear", "`linear` at character 13 is a second mode: name the mode once"),
        ("0:1:2", "`1:2` at character 3 is no factor"),
    ],
)
def test_what_is_wrong_with_a_text(text, message):
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text)
    assert str(caught.value).startswith(message)
    assert "hint: for example `0:1, 0.5:0.3`" in str(caught.value)
    assert text[caught.value.position :].startswith(caught.value.part)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, QwenLoraError)


@given(st.text(max_size=60) | st.text("0123456789.:,;%e- stepslinar", max_size=60), MODES)
@example("0:1" + ",0:1" * 50, STEPS)
@example("٣:1", LINEAR)
@example("0:1\x00", LINEAR)
@example("1" * 5000 + ":1", LINEAR)
def test_any_text_is_read_or_refused_by_its_part(text, mode):
    found = read_or_refused(text, mode)
    if isinstance(found, ScheduleError):
        assert text[found.position :].startswith(found.part)
        assert len(str(found)) < 400
    else:
        assert Schedule.parse(str(found)) == found
        assert all(map(math.isfinite, itertools.chain(*found.keyframes)))


def read_or_refused(text, mode):
    try:
        return Schedule.parse(text, mode=mode)
    except ScheduleError as error:
        return error


def test_many_keyframes_are_read_and_too_many_refused():
    text = ", ".join(f"{at / 10_000}:{at % 2}" for at in range(10_000))
    assert len(Schedule.parse(text).keyframes) == 10_000
    with pytest.raises(ScheduleError, match="10001 keyframes"):
        Schedule.parse(f"{text}, 1:1")


@given(KEYFRAMES, MODES)
def test_every_form_is_one_schedule(keyframes, mode):
    found = Schedule.of(keyframes, mode=mode)
    text = ", ".join(f"{share!r}:{factor!r}" for share, factor in reversed(keyframes))
    assert Schedule.parse(f"{text}; {mode.value}") == found == Schedule.of(found)
    assert hash(Schedule.parse(text, mode=mode)) == hash(found)
    assert Schedule.parse(str(found)) == found == pickle.loads(pickle.dumps(found))


@pytest.mark.parametrize("value", [3, [1, 2], [("0", "x")], [(0, 1, 2)], ["0:1"], object()])
def test_what_is_no_schedule_is_named(value):
    with pytest.raises(TypeError, match="a schedule is text such as"):
        Schedule.of(value)


# ---- the factor ----


@given(KEYFRAMES, MODES, SHARE)
@example([(0.0, 1.0), (0.3, 0.1)], LINEAR, 0.1)
def test_the_factor_is_that_of_the_reference(keyframes, mode, share):
    found = Schedule.of(keyframes, mode=mode).factor(share)
    wanted = schedule_factor(keyframes, share, linear=mode is LINEAR)
    if mode is STEPS:
        assert found == wanted
    else:
        largest = max(abs(factor) for _, factor in keyframes)
        assert abs(found - wanted) <= 4e-16 * largest


@given(KEYFRAMES, MODES)
def test_a_keyframe_has_its_own_factor_and_the_ends_hold(keyframes, mode):
    schedule = Schedule.of(keyframes, mode=mode)
    for share, factor in keyframes:
        assert schedule.factor(share) == factor
    assert schedule.factor(-3.0) == min(keyframes)[1]
    assert schedule.factor(7.0) == max(keyframes)[1]


def test_no_factor_without_a_share():
    with pytest.raises(ValueError, match="not a number"):
        Schedule.parse("0:1, 1:0").factor(math.nan)


@given(KEYFRAMES, KEYFRAMES, st.lists(SHARE, min_size=3, max_size=9))
def test_schedules_of_steps_are_equal_where_all_factors_are(one, two, shares):
    ours, theirs = (Schedule.of(own, mode=STEPS) for own in (one, two))
    shares = [*shares, *(share for share, _ in (*one, *two)), 0.0, 1.0]
    same = all(ours.factor(share) == theirs.factor(share) for share in shares)
    assert same == (ours == theirs)


# ---- specs and sets ----


@pytest.fixture
def files(Draft, tmp_path):
    """Two LoRAs that overlap."""
    return [
        Draft.full(seed, rank=4 * seed, blocks=BLOCKS).save(tmp_path / f"{seed}.safetensors")
        for seed in (1, 2)
    ]


def test_a_spec_holds_a_schedule(files):
    spec = LoraSpec(files[0], 0.5, schedule="0:1, 50%:0.3")
    assert spec.schedule == Schedule.parse("0:1, 0.5:0.3")
    assert spec == LoraSpec(files[0], 0.5, schedule=[(0.5, 0.3), (0, 1)])
    assert hash(spec) == hash(LoraSpec(files[0], 0.5, schedule=spec.schedule))
    assert spec != LoraSpec(files[0], 0.5)
    assert spec != LoraSpec(files[0], 0.5, schedule="0:1, 0.5:0.3; steps")
    assert pickle.loads(pickle.dumps(spec)) == spec
    for ones in ("", "0:1", "0:1, 0.7:1; steps", [(0, 1)], ONE_THROUGHOUT):
        assert LoraSpec(files[0], schedule=ones) == LoraSpec(files[0])
        assert LoraSpec(files[0], schedule=ones).schedule is None
    with pytest.raises(ScheduleError, match="no factor"):
        LoraSpec(files[0], schedule="0:x")
    assert spec.at(0.25) == LoraSpec(files[0], 0.5 * 0.65)
    assert LoraSpec(files[0]).at(0.25) == LoraSpec(files[0])


def test_a_set_at_a_share_is_the_set_of_these_strengths(files):
    blocks = "0:0.5; mod:0"
    wanted = LoraSet.of(
        [LoraSpec(files[0], 0.8, schedule="0:1, 0.5:0; steps", blocks=blocks), (files[1], -0.5)]
    )
    assert wanted.has_schedule
    early, late = wanted.at(0.0), wanted.at(0.5)
    assert early == LoraSet.of([LoraSpec(files[0], 0.8, blocks=blocks), (files[1], -0.5)])
    assert late == LoraSet.of((files[1], -0.5))
    assert wanted.at(0.1) == early
    assert wanted.at(0.75) == late
    assert len({wanted.at(share).key for share in SHARES}) == 2
    assert not early.has_schedule
    assert early.at(0.9) is early
    # Every forward asks: the same factors cost nothing.
    assert wanted.at(0.6) is wanted.at(0.7)
    assert wanted.key not in (early.key, late.key)
    assert wanted.scaled(0.5).at(0.2) == early.scaled(0.5)
    assert pickle.loads(pickle.dumps(wanted)) == wanted
    with pytest.raises(ValueError, match="not a number"):
        wanted.at(math.nan)


def test_a_lora_of_no_strength_anywhere_is_absent(files):
    assert LoraSet.of(LoraSpec(files[0], schedule="0:0")) == LoraSet.of()
    assert len(LoraSet.of(LoraSpec(files[0], schedule="0:0, 1:1")).specs) == 1


def test_a_set_knows_what_it_passes_through(files):
    wanted = LoraSet.of([LoraSpec(files[0], schedule="0:1, 0.5:0"), files[1]])
    for share in SHARES:
        assert wanted.passes(wanted.at(share).key)
    assert wanted.passes(())
    assert wanted.passes(wanted.key)
    assert wanted.passes(LoraSet.of((files[0], 3.0)).key)
    others = [
        LoraSet.of(files[::-1]),
        LoraSet.of(LoraSpec(files[0], name="other")),
        LoraSet.of(files[0], max_rank=32),
        LoraSet.of(files[0], options=ComposeOptions(mlp="rank")),
    ]
    assert not any(wanted.passes(other.key) for other in others)
    assert not wanted.passes(None)
    plain = LoraSet.of(files)
    assert plain.passes(plain.key)
    assert not plain.passes(LoraSet.of([files[0], (files[1], 0.5)]).key)


# ---- composing ----


@pytest.fixture
def model(make_model):
    return make_model(num_layers=BLOCKS)


def sampled(model, probe, *, shares=SHARES):
    """A forward at each share."""
    runtime = ComfyQwenImageWrapper.of(model)
    outputs = []
    for share in shares:
        runtime.course = lambda share=share: share
        outputs.append(probe.output(model))
    return outputs


def by_hand(model, probe, stack_at, *, shares=SHARES, **settings):
    """The same on a model that is composed anew for each share, from strengths set by hand."""
    outputs = []
    for share in shares:
        twin = copy.deepcopy(model)
        qwenlora.compose_loras(twin, stack_at(share), **settings)
        outputs.append(probe.output(twin))
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("mode", ["linear", "steps"])
def test_each_step_is_as_composed_by_hand(model, probe, files, composed, rescalings, mode, offload):
    def factor(share):
        reached = min(share / 0.5, 1.0) if mode == "linear" else float(share >= 0.5)
        return 1.0 - 0.7 * reached

    expected = by_hand(model, probe, lambda share: [(files[0], 0.8 * factor(share)), files[1]])
    base = probe.output(model)
    if offload:
        model.set_offload(True, num_blocks_on_gpu=1)
    runtime = ComfyQwenImageWrapper.of(model)
    schedule = f"0:1, 0.5:0.3; {mode}"
    runtime.loras[:] = [LoraSpec(files[0], 0.8, schedule=schedule), files[1]]
    for _ in range(2):
        for found, wanted in zip(sampled(model, probe), expected, strict=True):
            assert torch.equal(found, wanted)
    changes = 5 if mode == "linear" else 2
    # The first of a run begins anew.
    assert len(composed) == 2 * changes
    assert len(rescalings) == 2 * changes - 1
    runtime.loras[:] = []
    assert torch.equal(probe.output(model), base)


def test_a_lora_that_comes_and_goes(model, probe, files, composed):
    base = probe.output(model)
    expected = by_hand(model, probe, lambda share: files[0] if 0.25 <= share < 0.75 else ())
    runtime = ComfyQwenImageWrapper.of(model)
    values = probe.values(model)
    runtime.loras[:] = [LoraSpec(files[0], schedule="0:0, 0.25:1, 0.75:0; steps")]
    for _ in range(2):
        outputs = sampled(model, probe)
        for found, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(found, wanted)
        assert all(torch.equal(outputs[step], base) for step in (0, 1, 6, 7))
        # At factor 0 nothing of it is in the model.
        assert probe.values(model) == values
    assert len(composed) == 5


def test_adapters_that_read_the_base_weight(model, probe, composed, rescalings, tmp_path):
    # DoRA's delta is W' - W: a strength is a factor on it, whatever the kind.
    generator = torch.Generator().manual_seed(5)
    stem = "transformer.transformer_blocks.1.attn.to_out.0"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(4, 128, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(128, 4, generator=generator),
        f"{stem}.lora_magnitude_vector": torch.rand(128, generator=generator) + 0.5,
    }
    path = tmp_path / "dora.safetensors"
    save_file(tensors, path)
    expected = by_hand(model, probe, lambda share: (path, 1.0 - share))
    runtime = ComfyQwenImageWrapper.of(model)
    runtime.loras[:] = [LoraSpec(path, schedule="0:1, 1:0")]
    for found, wanted in zip(sampled(model, probe), expected, strict=True):
        assert torch.equal(found, wanted)
    assert len(composed) == len(SHARES)
    assert rescalings == []


@pytest.mark.slow
def test_compressed_slots(model, probe, files, rescalings):
    options = {"max_rank": 16}
    expected = by_hand(
        model, probe, lambda share: [(path, 1.0 - share) for path in files], **options
    )
    runtime = ComfyQwenImageWrapper.of(model)
    runtime.max_rank = 16
    runtime.loras[:] = [LoraSpec(path, schedule="0:1, 1:0") for path in files]
    for found, wanted in zip(sampled(model, probe), expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert rescalings == []


def test_sets_of_branches_are_resolved_by_their_host(model, probe, files):
    ComfyQwenImageWrapper.of(model)
    wanted = LoraSet.of(LoraSpec(files[0], schedule="0:1, 1:0"))
    at_half = probe.output(model, transformer_options={OPTIONS_KEY: wanted.at(0.5)})
    assert torch.equal(at_half, by_hand(model, probe, lambda _: (files[0], 0.5))[0])
    with pytest.raises(ScheduleError, match="`1` has a schedule, and nothing tells"):
        probe.output(model, transformer_options={OPTIONS_KEY: wanted})
    assert torch.equal(probe.output(model), by_hand(model, probe, lambda _: ())[0])


def test_composing_eagerly_is_refused_before_anything_is_touched(model, probe, files):
    snapshot = probe.snapshot(model)
    with pytest.raises(ScheduleError, match=r"hint: set `course` .* or .*LoraSpec.at"):
        qwenlora.compose_loras(model, [files[1], LoraSpec(files[0], schedule="0:1, 1:0")])
    assert probe.snapshot(model).differences(snapshot) == []
    report = qwenlora.compose_loras(model, LoraSpec(files[0], schedule="0:1, 1:0").at(0.5))
    assert report.loras[0].strength == 0.5


def test_a_plan_counts_all_that_ever_comes(model, files):
    schedules = ["0:1, 0.5:0; steps", "0:0, 0.5:1; steps"]
    wanted = LoraSet.of([LoraSpec(*row) for row in zip(files, [0.5, 0.7], strict=True)])
    scheduled = LoraSet.of(
        [
            LoraSpec(path, strength, schedule=text)
            for path, strength, text in zip(files, [0.5, 0.7], schedules, strict=True)
        ]
    )
    plain, planned = plan_report(model, wanted), plan_report(model, scheduled)
    assert planned.added_bytes == plain.added_bytes
    assert [lora.schedule for lora in planned.loras] == schedules
    assert "1 x 0.5 over the steps (0:1, 0.5:0; steps): " in planned.text()
    assert planned.to_dict()["loras"][1]["schedule"] == schedules[1]
    for share in SHARES:
        assert plan_report(model, scheduled.at(share)).added_bytes <= planned.added_bytes


def test_step_caches_are_forgotten_where_the_factor_changes(model, probe, files):
    runtime = ComfyQwenImageWrapper.of(model)
    runtime.loras[:] = [LoraSpec(files[0], schedule="0:1, 0.5:0.5; steps")]
    kept = []
    for share in SHARES:
        model._cache_context = context = object()
        sampled(model, probe, shares=[share])
        kept.append(model._cache_context is context)
    assert kept == [share not in (0.0, 0.5) for share in SHARES]


@pytest.mark.slow
def test_scale_and_copies(model, probe, files):
    expected = by_hand(model, probe, lambda _: (files[0], 0.375))[0]
    runtime = ComfyQwenImageWrapper.of(model)
    runtime.loras[:] = [LoraSpec(files[0], schedule="0:1, 1:0")]
    runtime.course = lambda: 0.25
    assert torch.equal(probe.output(model, attention_kwargs={"scale": 0.5}), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(probe.output(twin), probe.output(model))
    stored = pickle.loads(pickle.dumps(model))
    # What tells the course belongs to a sampler of this process.
    with pytest.raises(ScheduleError):
        probe.output(stored)
    ComfyQwenImageWrapper.of(stored).course = lambda: 0.25
    assert torch.equal(probe.output(stored), probe.output(model))


def test_a_merge_needs_one_strength(files):
    spec = LoraSpec(files[0], schedule="0:1, 1:0")
    with pytest.raises(ScheduleError, match="`1` has the schedule `0:1, 1:0`: a file holds one"):
        MergePlan.of([spec], MergeOptions())
    # This one it takes, and looks at: the model is too small a one.
    with pytest.raises(OtherModelError, match="is 128x64 where the model has 3072x64"):
        MergePlan.of([spec.at(0.5)], MergeOptions())
