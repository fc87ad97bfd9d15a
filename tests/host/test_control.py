"""Strength over the steps and by block in a real ComfyUI: nodes, samplers, stages, the share."""

from __future__ import annotations

import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import qwenlora
from qwenlora import LoraSet, LoraSpec
from qwenlora.runtime import OPTIONS_KEY

from .test_nodes import PACK

A, B = "a.safetensors", "b.safetensors"
STEPS = 4
SWITCH = 2
SAMPLERS = ["euler", "heun", "dpm_2", "dpmpp_2m", "lcm", "uni_pc", "dpmpp_sde"]
"""Some evaluate the model twice a step, or between steps."""
OFF_AT_HALF = "0:1, 0.5:0"
FADING = "0:1, 1:0.2"


@pytest.fixture
def files(host, Draft):
    """Two LoRAs where the host looks for them."""
    for seed, name in ((1, A), (2, B)):
        Draft.full(seed, rank=4 * seed, blocks=2).save(host.loras / name)
    yield {name: host.loras / name for name in (A, B)}
    shutil.rmtree(host.loras)
    host.loras.mkdir()


@pytest.fixture
def pack(graph, files):
    graph.load_pack(PACK)
    names = ("control", "course", "host", "presets", "registry")
    return SimpleNamespace(**{name: sys.modules[f"{PACK}.{name}"] for name in names})


@pytest.fixture
def loaded(pack):
    """Give a model what a node of ours gives it."""

    def run(model, node="QwenLoraLoader", **inputs):
        made = pack.registry.NODE_CLASS_MAPPINGS[node]()
        assert made.check_lazy_status(None, **inputs) == ["model"]
        return made.load(model, **inputs)["result"][:2]

    return run


@pytest.fixture
def fresh(small_qwen, nunchaku):
    """A model that never saw anything else."""
    return lambda: nunchaku.emulated_qwen(small_qwen)


def hand_set(patcher, stack_at):
    """A clone whose set is put into its options at every evaluation, by the noise level alone."""
    from comfy.patcher_extension import WrappersMP

    clone = patcher.clone()
    qwenlora.ComfyQwenImageWrapper.of(clone.model.diffusion_model)

    def put(executor, model, conds, x, timestep, model_options):
        # Qwen-Image's levels: s t / (1 + (s - 1) t), where t = 1 - share and s is e to the shift.
        level = float(timestep[0])
        shift = math.exp(model.model_sampling.shift)
        share = 1 - level / (shift - (shift - 1) * level)
        options = {**model_options["transformer_options"], OPTIONS_KEY: stack_at(share)}
        model_options = {**model_options, "transformer_options": options}
        return executor(model, conds, x, timestep, model_options)

    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "by hand", put)
    return clone


def close(found, expected):
    """Whether two latents differ by rounding only."""
    return (found - expected).norm() <= 1e-5 * expected.norm()


# ---- what the frontend is told ----


@pytest.mark.parametrize("node", ["QwenLoraLoader", "QwenLoraStack"])
def test_inputs_are_appended_hidden_and_change_nothing(host, pack, node):
    _, info = host.request("GET", f"/object_info/{node}")
    optional = info[node]["input"]["optional"]
    names = ["blocks", "custom_blocks", "schedule", "schedule_mode"]
    assert info[node]["input_order"]["optional"][-5:] == [*names, "lora_stack"]
    assert all(optional[name][1]["advanced"] and optional[name][1]["tooltip"] for name in names)
    defaults = {name: optional[name][1]["default"] for name in names}
    assert defaults == {
        "blocks": "all",
        "custom_blocks": "",
        "schedule": "",
        "schedule_mode": "linear",
    }
    assert optional["blocks"][0] == [
        "all",
        "attention only",
        "style",
        "composition",
        "first half",
        "last half",
        "custom",
    ]
    assert optional["schedule_mode"][0] == ["linear", "steps"]
    assert pack.control.Control.read(defaults) == pack.control.Control.read({})


def test_defaults_are_the_node_without_them(loaded, emulated_qwen):
    plain, report = loaded(emulated_qwen, lora_name=A)
    defaults = {
        "blocks": "all",
        "custom_blocks": "",
        "schedule": "",
        "schedule_mode": "linear",
    }
    other, same = loaded(emulated_qwen, lora_name=A, **defaults)
    sets = [own.model_options["transformer_options"][OPTIONS_KEY] for own in (plain, other)]
    assert sets[0] == sets[1]
    assert report == same


# ---- the share of the course ----


def samplings():
    import comfy.model_sampling as kinds

    return [
        kinds.ModelSamplingDiscreteFlow(),
        shifted(kinds.ModelSamplingDiscreteFlow(), shift=3.1),
        shifted(kinds.ModelSamplingDiscreteFlow(), shift=12.0, multiplier=1.0),
        kinds.ModelSamplingFlux(),
        kinds.ModelSamplingDiscrete(),
        kinds.ModelSamplingContinuousEDM(),
    ]


def shifted(sampling, **parameters):
    sampling.set_parameters(**parameters)
    return sampling


def test_the_share_is_the_hosts_function_the_other_way_round(host, pack):
    for sampling in samplings():
        for percent in (0.001, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.75, 0.9, 0.999):
            level = float(sampling.percent_to_sigma(percent))
            share = pack.course.share_of(sampling.percent_to_sigma, level)
            assert abs(share - percent) <= 1.1e-3
            if "Flow" in type(sampling).__name__ or "Flux" in type(sampling).__name__:
                # Levels come as float32: what begins at a keyframe has it all the same.
                rounded = float(torch.tensor(level))
                assert pack.course.share_of(sampling.percent_to_sigma, rounded) == round(percent, 5)
        assert pack.course.share_of(sampling.percent_to_sigma, 0.0) == 1.0
        assert pack.course.share_of(sampling.percent_to_sigma, 1e12) == 0.0
        largest = pack.course.share_of(sampling.percent_to_sigma, float(sampling.sigma_max))
        assert largest <= 1.1e-3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.05, 60), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_a_keyframe_begins_where_the_hosts_own_would(host, pack, shift, share, percent):
    import comfy.model_sampling as kinds

    sampling = shifted(kinds.ModelSamplingDiscreteFlow(), shift=shift)
    found = pack.course.share_of(sampling.percent_to_sigma, sampling.percent_to_sigma(percent))
    if abs(share - percent) > 2e-5:
        assert (found >= share) == (percent >= share)


def test_the_first_level_of_a_batch_counts(host, pack, emulated_qwen, files):
    wanted = LoraSet.of(LoraSpec(files[A], schedule="0:1, 1:0"))
    options = {OPTIONS_KEY: wanted, "other": []}
    model = emulated_qwen.model
    level = model.model_sampling.percent_to_sigma(0.25)
    for sigma in (torch.tensor(level), torch.tensor([level, 0.1]), torch.tensor([[level], [0.9]])):
        found = pack.course.resolved(model, sigma, options)
        assert found[OPTIONS_KEY] == LoraSet.of((files[A], 0.75))
        assert found["other"] is options["other"]
    assert options[OPTIONS_KEY] is wanted
    plain = {OPTIONS_KEY: LoraSet.of(files[A])}
    assert pack.course.resolved(model, None, plain) is plain
    assert pack.course.resolved(model, None, {}) == {}


def test_a_sampling_that_tells_no_share_is_named(pack, loaded, emulated_qwen, qwen):
    model, _ = loaded(emulated_qwen, lora_name=A, schedule=FADING)

    class Levels(torch.nn.Module):
        """A sampling of another pack's."""

    with pytest.raises(qwenlora.errors.ScheduleError, match="Levels does not tell how far"):
        pack.course.resolved(
            SimpleNamespace(model_sampling=Levels()),
            torch.tensor([0.5]),
            model.model_options["transformer_options"],
        )


# ---- samplers ----


@pytest.fixture
def stage(host, qwen):
    """Do what KSampler (Advanced) does with steps `begin` to `end`."""
    import nodes

    def run(model, latent, begin, end, sampler="euler", steps=STEPS, positive=None):
        with torch.inference_mode():
            (result,) = nodes.KSamplerAdvanced().sample(
                model,
                "enable" if begin == 0 else "disable",
                3,
                steps,
                2.0,
                sampler,
                "simple",
                positive or qwen.conditioning(1),
                qwen.conditioning(2, tokens=3),
                latent,
                begin,
                end,
                "enable" if end < steps else "disable",
            )
        return result

    return run


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [("euler", OFF_AT_HALF), ("euler", "0:0.3, 0.5:1"), ("ddim", "0:0, 50%:-0.7")],
)
def test_a_scheduled_run_is_two_plain_ones_stitched(
    loaded, emulated_qwen, fresh, files, stage, qwen, composed, sampler, schedule
):
    first, last = (float(entry.split(":")[1]) for entry in schedule.split(", "))
    twins = [fresh(), fresh()]
    for twin, strength in zip(twins, (first, last), strict=True):
        qwenlora.compose_loras(twin.model.diffusion_model, (files[A], strength))
    half = stage(twins[0], qwen.empty_latent(), 0, SWITCH, sampler)
    expected = stage(twins[1], half, SWITCH, STEPS, sampler)["samples"]
    base = stage(emulated_qwen, qwen.empty_latent(), 0, STEPS, sampler)["samples"]
    model, _ = loaded(emulated_qwen, lora_name=A, schedule=schedule, schedule_mode="steps")
    half = stage(model, qwen.empty_latent(), 0, SWITCH, sampler)
    assert torch.equal(stage(model, half, SWITCH, STEPS, sampler)["samples"], expected)
    # Without a break the host does not round the latent between the stages.
    whole = stage(model, qwen.empty_latent(), 0, STEPS, sampler)["samples"]
    assert close(whole, expected)
    bare = stage(emulated_qwen, qwen.empty_latent(), 0, STEPS, sampler)["samples"]
    assert torch.equal(bare, base)


@pytest.mark.parametrize(
    ("sampler", "mode"),
    [*((sampler, "steps") for sampler in SAMPLERS), ("euler", "linear"), ("dpm_2", "linear")],
)
def test_every_sampler_has_the_strength_of_its_noise_level(
    loaded, emulated_qwen, fresh, files, stage, qwen, sampler, mode
):
    def strength(share):
        # Levels are float32.
        share = round(share, 5)
        return 0.8 * (1 - 0.8 * share if mode == "linear" else 1.0 if share < 0.5 else 0.25)

    schedule = "0:1, 1:0.2" if mode == "linear" else "0:1, 0.5:0.25"
    reference = hand_set(fresh(), lambda share: LoraSet.of([files[B], (files[A], strength(share))]))
    expected = stage(reference, qwen.empty_latent(), 0, STEPS, sampler)["samples"]
    model, _ = loaded(emulated_qwen, lora_name=B)
    model, report = loaded(model, lora_name=A, strength=0.8, schedule=schedule, schedule_mode=mode)
    assert f"a x 0.8 over the steps ({schedule}" in report
    found = stage(model, qwen.empty_latent(), 0, STEPS, sampler)["samples"]
    assert torch.equal(found, expected) if mode == "steps" else close(found, expected)


def test_an_image_refined_begins_in_the_middle_of_the_course(
    loaded, emulated_qwen, fresh, files, qwen
):
    # Half of the noise: the course begins at one half, as for the host's own start percent.
    image = {"samples": qwen.ksample(fresh())[:, :, 0]}
    options = {"latent": image, "steps": 3, "denoise": 0.45}
    base = qwen.ksample(emulated_qwen, **options)
    model, _ = loaded(emulated_qwen, lora_name=A, schedule="0:1, 0.5:0", schedule_mode="steps")
    assert torch.equal(qwen.ksample(model, **options), base)
    other, _ = loaded(emulated_qwen, lora_name=A, schedule="0:0, 0.5:1", schedule_mode="steps")
    twin = fresh()
    qwenlora.compose_loras(twin.model.diffusion_model, files[A])
    assert torch.equal(qwen.ksample(other, **options), qwen.ksample(twin, **options))


def test_a_shifted_sampling_moves_the_course(loaded, emulated_qwen, fresh, files, stage, qwen):
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    def shifted_model(model):
        return ModelSamplingAuraFlow().patch_aura(model, 3.1)[0]

    twins = [fresh(), fresh()]
    qwenlora.compose_loras(twins[0].model.diffusion_model, files[A])
    half = stage(shifted_model(twins[0]), qwen.empty_latent(), 0, SWITCH)
    expected = stage(shifted_model(twins[1]), half, SWITCH, STEPS)["samples"]
    model, _ = loaded(emulated_qwen, lora_name=A, schedule=OFF_AT_HALF, schedule_mode="steps")
    half = stage(shifted_model(model), qwen.empty_latent(), 0, SWITCH)
    assert torch.equal(stage(shifted_model(model), half, SWITCH, STEPS)["samples"], expected)
    assert close(stage(shifted_model(model), qwen.empty_latent(), 0, STEPS)["samples"], expected)


def test_custom_samplers(host, graph, loaded, emulated_qwen, fresh, files, qwen):
    def run(model):
        from comfy_extras import nodes_custom_sampler as custom

        with torch.inference_mode():
            guider = custom.BasicGuider.execute(model, qwen.conditioning(1)).args[0]
            sigmas = custom.BasicScheduler.execute(model, "simple", STEPS, 1.0).args[0]
            sampler = custom.KSamplerSelect.execute("euler").args[0]
            noise = custom.RandomNoise.execute(3).args[0]
            out = custom.SamplerCustomAdvanced.execute(
                noise, guider, sampler, sigmas, qwen.empty_latent()
            )
        return out.args[0]["samples"]

    reference = hand_set(
        fresh(), lambda share: LoraSet.of((files[A], 1.0 if round(share, 5) < 0.5 else 0.0))
    )
    model, _ = loaded(emulated_qwen, lora_name=A, schedule=OFF_AT_HALF, schedule_mode="steps")
    assert torch.equal(run(model), run(reference))


def test_nothing_is_composed_in_vain(loaded, emulated_qwen, stage, qwen, composed):
    model, _ = loaded(emulated_qwen, lora_name=A, schedule="0:1, 0.5:0.4", schedule_mode="steps")
    for runs in (1, 2):
        stage(model, qwen.empty_latent(), 0, STEPS, "heun")
        assert len(composed) == 2 * runs


def test_the_bar_of_a_run_under_way_is_the_samplers(loaded, emulated_qwen, stage, qwen, pack):
    """What a step composes is shown before the first one alone, and can be stopped in any."""
    import comfy.model_management as management
    import comfy.utils

    shown = []
    model, _ = loaded(emulated_qwen, lora_name=A, schedule=FADING)
    with pytest.MonkeyPatch.context() as patch:
        bar = comfy.utils.ProgressBar.update_absolute
        patch.setattr(
            comfy.utils.ProgressBar,
            "update_absolute",
            lambda self, *args: shown.append(self.total) or bar(self, *args),
        )
        stage(model, qwen.empty_latent(), 0, STEPS)
    steps = [at for at, total in enumerate(shown) if total == STEPS]
    assert steps == list(range(len(shown) - STEPS, len(shown)))
    assert steps[0] > 0
    asked = iter([False] * 3)

    def stop():
        if next(asked, True):
            raise management.InterruptProcessingException

    options = model.model_options["transformer_options"] | {"sample_sigmas": torch.tensor([1.0, 0])}
    later = pack.course.resolved(emulated_qwen.model, torch.tensor([0.5]), options)[OPTIONS_KEY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "throw_exception_if_processing_interrupted", stop)
        with pytest.raises(management.InterruptProcessingException):
            qwenlora.ComfyQwenImageWrapper.of(emulated_qwen.model.diffusion_model).reconcile(
                {OPTIONS_KEY: later}
            )


def test_hooks_beside_a_schedule(host, loaded, emulated_qwen, fresh, files, stage, qwen):
    """ComfyUI's own LoRA hook on one condition: two sets in each step, one of them scheduled."""
    import nodes

    def with_hook(conditioning):
        made = nodes.NODE_CLASS_MAPPINGS
        (hooks,) = made["CreateHookLoraModelOnly"]().create_hook_model_only(B, 0.6)
        setting = made["ConditioningSetProperties"]()
        (found,) = setting.set_properties(conditioning, 1.0, "default", hooks=hooks)
        return found

    def run(first, last):
        positive = with_hook(qwen.conditioning(1))
        half = stage(first, qwen.empty_latent(), 0, SWITCH, positive=positive)
        return stage(last, half, SWITCH, STEPS, positive=positive)["samples"]

    whole, _ = loaded(fresh(), lora_name=A)
    weak, _ = loaded(fresh(), lora_name=A, strength=0.3)
    scheduled, report = loaded(
        emulated_qwen, lora_name=A, schedule="0:1, 0.5:0.3", schedule_mode="steps"
    )
    assert "over the steps" in report
    found = run(scheduled, scheduled)
    assert torch.equal(found, run(whole, weak))
    assert not close(found, run(whole, whole))


def test_branches_of_different_schedules_over_one_model(
    loaded, emulated_qwen, fresh, files, stage, qwen
):
    schedules = [OFF_AT_HALF, ""]
    models = [loaded(emulated_qwen, lora_name=A, schedule=own)[0] for own in schedules]
    expected = []
    for own in schedules:
        alone, _ = loaded(fresh(), lora_name=A, schedule=own)
        expected.append(stage(alone, qwen.empty_latent(), 0, STEPS)["samples"])
    for _ in range(2):
        for model, wanted in zip(models, expected, strict=True):
            found = stage(model, qwen.empty_latent(), 0, STEPS)["samples"]
            assert torch.equal(found, wanted)


def test_under_offload(loaded, emulated_qwen, fresh, stage, qwen):
    alone, _ = loaded(fresh(), lora_name=A, schedule=OFF_AT_HALF)
    expected = stage(alone, qwen.empty_latent(), 0, STEPS)["samples"]
    emulated_qwen.model.diffusion_model.set_offload(True, num_blocks_on_gpu=1)
    model, _ = loaded(emulated_qwen, lora_name=A, schedule=OFF_AT_HALF)
    for _ in range(2):
        found = stage(model, qwen.empty_latent(), 0, STEPS)["samples"]
        assert torch.equal(found, expected)


def test_the_callers_options_stay_as_they_are(loaded, emulated_qwen, stage, qwen):
    model, _ = loaded(emulated_qwen, lora_name=A, schedule=FADING)
    before = model.model_options["transformer_options"][OPTIONS_KEY]
    stage(model, qwen.empty_latent(), 0, STEPS)
    assert model.model_options["transformer_options"][OPTIONS_KEY] is before
    assert before.has_schedule


def test_the_hosts_step_cache(host, loaded, emulated_qwen, fresh, files, stage, qwen):
    from comfy_extras.nodes_easycache import EasyCacheNode

    def cached(model, threshold):
        return EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).args[0]

    model, _ = loaded(emulated_qwen, lora_name=A, schedule=FADING)
    plain = stage(model, qwen.empty_latent(), 0, STEPS)["samples"]
    # It skips no step: what it computes has the step's own strength.
    assert torch.equal(stage(cached(model, 0.0), qwen.empty_latent(), 0, STEPS)["samples"], plain)
    skipping = stage(cached(model, 100.0), qwen.empty_latent(), 0, STEPS)["samples"]
    assert torch.isfinite(skipping).all()
    assert not torch.equal(skipping, plain)


# ---- blocks ----


def test_presets_as_they_are_documented(pack):
    table = {
        "all": ("", ""),
        "attention only": ("mlp:0, mod:0, rest:0", "mlp:0, mod:0, rest:0"),
        "style": ("0-19:0, 20-39:0.5", "0-9:0, 10-19:0.5"),
        "composition": ("20-39:0.5, 40-59:0", "10-19:0.5, 20-29:0"),
        "first half": ("30-59:0", "15-29:0"),
        "last half": ("0-29:0", "0-14:0"),
    }
    assert list(pack.presets.PRESETS) == list(table)
    text = (PACK.parent / "README.md").read_text(encoding="utf-8")
    for name, texts in table.items():
        preset = pack.presets.PRESETS[name]
        assert tuple(str(preset.factors(count)) for count in (60, 30)) == texts
        assert str(preset.factors(0)) == ("mlp:0, mod:0, rest:0" if "only" in name else "")
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(f"`{own}`" in row for own in texts if own)


@pytest.mark.parametrize(
    ("inputs", "factors"),
    [
        ({"blocks": "first half"}, (1.0, 0.0, {})),
        ({"blocks": "last half"}, (0.0, 1.0, {})),
        ({"blocks": "attention only"}, (1.0, 1.0, {"mlp": 0.0, "mod": 0.0, "rest": 0.0})),
        ({"blocks": "composition"}, (1.0, 0.5, {})),
        ({"blocks": "custom", "custom_blocks": "1:2; mlp:0.5"}, (1.0, 2.0, {"mlp": 0.5})),
        ({"blocks": "custom"}, (1.0, 1.0, {})),
    ],
)
@pytest.mark.parametrize("node", ["QwenLoraLoader", "QwenLoraStack"])
def test_block_strengths_are_these_factors_written_into_the_file(
    loaded, emulated_qwen, fresh, host, qwen, files, Draft, node, inputs, factors
):
    *blocks, kinds = factors
    draft = Draft.full(1, rank=4, blocks=2)
    tensors = {}
    for key, tensor in draft.tensors.items():
        block = key.partition("transformer_blocks.")[2].partition(".")[0]
        factor = blocks[int(block)] if block else kinds.get("rest", 1.0)
        factor *= kinds.get("mlp", 1.0) if "_mlp." in key else 1.0
        factor *= kinds.get("mod", 1.0) if "_mod." in key else 1.0
        if factor:
            tensors[key] = tensor * factor if "lora_B" in key else tensor
    save_file(tensors, host.loras / B)
    twin = fresh()
    qwenlora.compose_loras(twin.model.diffusion_model, files[B])
    model, _ = loaded(emulated_qwen, node, lora_name=A, lora_name_1=A, **inputs)
    assert torch.equal(qwen.ksample(model), qwen.ksample(twin))


def test_a_schedule_of_no_strength_is_the_base(loaded, emulated_qwen, qwen):
    base = qwen.ksample(emulated_qwen)
    model, report = loaded(emulated_qwen, lora_name=A, schedule="0:0")
    assert report.startswith("base model: no LoRA")
    assert torch.equal(qwen.ksample(model), base)


def test_custom_factors_beside_a_preset_are_said_to_be_without_effect(loaded, emulated_qwen):
    _, report = loaded(emulated_qwen, lora_name=A, blocks="style", custom_blocks="mlp:0")
    assert "`custom_blocks` has no effect: `blocks` is 'style', not 'custom'" in report
    _, report = loaded(emulated_qwen, lora_name=A, blocks="custom", custom_blocks="7:0, mlp:0.5")
    assert "no effect" not in report
    assert "`blocks` names 7, but the model has the blocks 0 to 1" in report


# ---- what is refused ----


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"schedule": "0:1, half:0"}, "schedule: `half` at character 6 is no share"),
        ({"custom_blocks": "x:1"}, "custom_blocks: `x` at character 1 is neither a block nor"),
        ({"blocks": "no such"}, "blocks: there is no preset 'no such': choose out of 'all'"),
        ({"schedule_mode": "cubic"}, "schedule_mode: it is 'cubic', which must be 'linear' or"),
        ({"schedule": 3}, "schedule: it is 3, which must be text"),
    ],
)
@pytest.mark.parametrize("node", ["QwenLoraLoader", "QwenLoraStack"])
def test_texts_are_judged_before_the_model_is_loaded(
    pack, loaded, emulated_qwen, node, inputs, message
):
    made = pack.registry.NODE_CLASS_MAPPINGS[node]
    rows = {"lora_name": A} if node == "QwenLoraLoader" else {"lora_name_1": A}
    with pytest.raises(ValueError, match=f"^{message}"):
        made().check_lazy_status(None, **rows, **inputs)
    assert message in made.IS_CHANGED(None, **rows, **inputs)


def test_a_wrong_text_stops_the_prompt_at_its_node(graph, pack, emulated_qwen):
    prompt = {
        "model": graph.source(emulated_qwen),
        "load": graph.node("QwenLoraLoader", model=["model", 0], lora_name=A, schedule="0:1, 2:0"),
        "out": graph.sink("model", ["load", 0]),
    }
    done = graph.run(prompt)
    assert not done.success
    assert done.error["node_id"] == "load"
    assert done.error["exception_message"].startswith("schedule: `2` at character 6 is outside")
    assert "model" not in done.executed
    prompt["load"] = graph.node("QwenLoraLoader", model=["model", 0], lora_name=A, blocks="x")
    refused = graph.run(prompt)
    assert refused.status == 400
    (error,) = refused.node_errors["load"]["errors"]
    assert error["extra_info"]["input_name"] == "blocks"


def test_what_changes_runs_the_node_again(pack):
    changed = pack.registry.NODE_CLASS_MAPPINGS["QwenLoraLoader"].IS_CHANGED
    same = [
        {},
        {"schedule": "0:1", "blocks": "all"},
        {"schedule_mode": "steps"},
        {"custom_blocks": "mlp:0"},
    ]
    assert len({changed(None, lora_name=A, **own) for own in same}) == 1
    others = [
        *same[:1],
        {"schedule": FADING},
        {"schedule": FADING, "schedule_mode": "steps"},
        {"blocks": "style"},
        {"blocks": "custom", "custom_blocks": "mlp:0"},
    ]
    assert len({changed(None, lora_name=A, **own) for own in others}) == len(others)
