"""Stacks of other packs in and out of our nodes, what is applied as text, and as one file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwenlora.merge import known
from qwenlora.slots.find import find_targets

from .comfy_host import tensors_of
from .test_nodes import A, B, C, bench, files, load, pack, wanted

__all__ = ["bench", "files", "pack"]


def stacked(bench, stack, node="QwenLoraStack", **inputs):
    """Run one node whose `lora_stack` is linked to another node; its outputs by name."""
    prompt = bench.prompt(sample=False, one=[(node, {**inputs, "lora_stack": ["stack", 0]})])
    prompt["stack"] = bench.graph.source(stack)
    return outputs(bench, prompt)


def outputs(bench, prompt, node="one 0"):
    for index, name in enumerate(("model", "report", "lora_stack", "applied")):
        prompt[f"out {name}"] = bench.graph.sink(name, [node, index])
    # A cached node hands its outputs to new sinks only.
    bench.graph.executor.reset()
    done = bench.graph.run(prompt)
    assert done.success, done.error
    return done.values


def refusal(bench, stack, node="QwenLoraStack", **inputs):
    prompt = bench.prompt(sample=False, one=[(node, {**inputs, "lora_stack": ["stack", 0]})])
    prompt["stack"] = bench.graph.source(stack)
    failed = bench.graph.run(prompt)
    assert failed.error["node_id"] == "one 0"
    assert "model" not in failed.executed
    return failed.error["exception_message"]


# ---- in ----


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param([(A, 0.7, 0.2), (C, -0.5, 1.0)], id="tuples in a list"),
        pytest.param(((A, 0.7, 0.2), (C, -0.5, 1.0)), id="tuples in a tuple"),
        pytest.param([[A, 0.7, 0.2], [C, -0.5, 1.0]], id="lists in a list"),
        pytest.param([(A, "0.7", 1), ("folder\\c.safetensors", "-0.5", 1)], id="texts, backslash"),
        pytest.param([(A, 0.7, 0.2), ("folder/c.safetensors", -0.5, 1.0)], id="slash"),
        pytest.param(
            [("None", 1.0, 1.0), (A, 0.7, 0.7), (B, 0.0, 0.0), (C, -0.5, 0.0), (None, 1.0, 1.0)],
            id="empty entries",
        ),
    ],
)
@pytest.mark.parametrize("node", ["QwenLoraStack", "QwenLoraLoader"])
def test_stacks_of_other_packs_are_applied_before_the_nodes_own(bench, node, stack):
    own = {"lora_name": B} if node == "QwenLoraLoader" else {"loras.0.lora_name": B}
    values = stacked(bench, stack, node, **own)
    assert wanted(values["model"]) == [("a", 0.7), ("c", -0.5), ("b", 1.0)]


def test_a_path_into_the_folders_is_a_name(bench, files, tmp_path):
    values = stacked(bench, [(str(files[C]), 1.0, 1.0)])
    assert wanted(values["model"]) == [("c", 1.0)]
    assert values["lora_stack"] == [(C, 1.0, 1.0)]
    elsewhere = shutil.copy(files[A], tmp_path / "elsewhere.safetensors")
    assert "is in none of ComfyUI's folders" in refusal(bench, [(str(elsewhere), 1.0, 1.0)])


@pytest.mark.parametrize("stack", [[], (), None])
def test_an_empty_stack_changes_nothing(bench, stack):
    values = stacked(bench, stack)
    assert values["model"] is bench.model
    assert values["lora_stack"] == []
    assert values["applied"] == ""


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ("a.safetensors", "`lora_stack` is 'a.safetensors': it must be a list of (name,"),
        ({"a": 1}, "`lora_stack` is {'a': 1}: it must be a list"),
        ([A], "lora_stack, entry 1, is 'a.safetensors': it must be (name, model strength, clip"),
        ([(A, 1.0, 1.0), (B, 1.0)], "lora_stack, entry 2, is ('b.safetensors', 1.0): it must be"),
        ([(3, 1.0, 1.0)], "a LoRA's name is 3"),
        ([(A, 101.0, 1.0)], "the strength of 'a.safetensors' is 101.0"),
        ([(A, 1.0, float("nan"))], "the strength of 'a.safetensors' is nan"),
        ([(A, 1.0, 1.0), ("gone.safetensors", 1.0, 1.0)], "lora_stack, entry 2: LoRA 'gone."),
        ([("A.SAFETENSORS", 1.0, 1.0)], "hint: the nearest: 'a.safetensors'"),
    ],
)
def test_a_stack_of_no_use_is_told_before_the_model_is_loaded(bench, stack, words):
    assert words in refusal(bench, stack)


def test_a_stack_that_changes_runs_the_node_again(bench):
    first = stacked(bench, [(A, 0.7, 1.0)])
    again = stacked(bench, [(A, 0.8, 1.0)])
    assert (wanted(first["model"]), wanted(again["model"])) == ([("a", 0.7)], [("a", 0.8)])


def test_it_samples_as_the_same_rows(bench, files):
    prompt = bench.prompt(one=[("QwenLoraStack", {"lora_stack": ["stack", 0]})])
    prompt["stack"] = bench.graph.source([(A, 0.7, 1.0), (B, -0.5, 1.0)])
    done = bench.graph.run(prompt)
    assert done.success, done.error
    expected = bench.expected((files[A], 0.7), (files[B], -0.5))
    assert torch.equal(done.values["one"]["samples"], expected)


def test_saved_nodes_have_no_such_sockets(bench, host):
    for name in ("NunchakuQwenImageLoraLoader", "NunchakuQwenImageLoraStackV3"):
        _, info = host.request("GET", f"/object_info/{name}")
        assert "lora_stack" not in info[name]["input"]["optional"]
        assert info[name]["output"] == ["MODEL", "STRING"]


# ---- out ----


def test_the_outputs_as_the_host_tells_them(bench, host):
    for name in ("QwenLoraLoader", "QwenLoraStack"):
        _, info = host.request("GET", f"/object_info/{name}")
        node = info[name]
        assert node["output"] == ["MODEL", "STRING", "LORA_STACK", "STRING"]
        assert node["output_name"] == ["model", "report", "lora_stack", "applied"]
        assert all(node["output_tooltips"])
        assert node["input"]["optional"]["lora_stack"][0] == "LORA_STACK"


def test_the_stack_goes_on_with_the_clip_strengths_as_they_came(bench):
    stack = [("folder\\c.safetensors", 0.5, 0.25), (A, 0.0, 0.75), (B, 0.0, 0.0)]
    rows = {"loras.0.lora_name": B, "loras.0.strength": -0.5}
    rows |= {"loras.1.lora_name": A, "loras.1.enabled": False}
    values = stacked(bench, stack, **rows)
    assert values["lora_stack"] == [(C, 0.5, 0.25), (A, 0.0, 0.75), (B, -0.5, -0.5)]
    assert all(isinstance(entry, tuple) for entry in values["lora_stack"])


def test_the_stack_is_the_nodes_own_and_the_text_is_the_chains(bench):
    chain = [load(A, 0.7), ("NunchakuQwenImageLoraLoader", {"lora_name": B}), load(C, -0.25)]
    values = outputs(bench, bench.prompt(sample=False, one=chain), "one 2")
    assert values["lora_stack"] == [(C, -0.25, -0.25)]
    assert values["applied"] == "<lora:a:0.7> <lora:b:1> <lora:c:-0.25>"


def test_a_node_that_does_nothing_tells_the_chain_before_it(bench):
    chain = [load(A, 0.7), load(B, 0.0)]
    values = outputs(bench, bench.prompt(sample=False, one=chain), "one 1")
    assert values["lora_stack"] == []
    assert values["applied"] == "<lora:a:0.7>"


def test_files_of_one_name_are_told_apart(bench, files, host):
    twin = host.loras / "folder" / A
    shutil.copy(files[B], twin)
    name = str(twin.relative_to(host.loras))
    values = outputs(bench, bench.prompt(sample=False, one=[load(A), load(name, 0.5)]), "one 1")
    first, second = values["applied"].split()
    assert first != second
    assert second == "<lora:folder/a:0.5>"


def test_a_stack_out_of_one_node_goes_into_another(bench):
    prompt = bench.prompt(sample=False, one=[load(A, 0.7)])
    prompt["two"] = bench.graph.node(
        "QwenLoraStack", model=["model", 0], lora_stack=["one 0", 2], **{"loras.0.lora_name": B}
    )
    values = outputs(bench, prompt, "two")
    assert wanted(values["model"]) == [("a", 0.7), ("b", 1.0)]
    assert values["lora_stack"] == [(A, 0.7, 0.7), (B, 1.0, 1.0)]


# ---- as one file ----


@pytest.fixture
def small_table(bench, monkeypatch):
    """The small model's own slots in the place of the released one's."""
    real = known.known_slots("qwen-image")
    targets = find_targets(bench.model.model.diffusion_model, {})
    slots = {path: known.KnownSlot(t.row, real[path].parts) for path, t in targets.items()}
    monkeypatch.setattr("qwenlora.merge.plan.known_slots", lambda model: slots)


@pytest.fixture
def output(host):
    """ComfyUI's output folder, its `loras` among the folders for LoRAs as `main.py` has it."""
    import folder_paths

    folder = Path(folder_paths.get_output_directory())
    paths, endings = folder_paths.folder_names_and_paths["loras"]
    folder_paths.folder_names_and_paths["loras"] = ([*paths, str(folder / "loras")], endings)
    yield folder
    folder_paths.folder_names_and_paths["loras"] = (paths, endings)
    shutil.rmtree(folder, ignore_errors=True)


def merging(bench, *chain, **inputs):
    prompt = bench.prompt(sample=False, one=list(chain))
    link = prompt["one model"]["inputs"]["value"]
    inputs = {"filename_prefix": "loras/merged", **inputs}
    prompt["merge"] = bench.graph.node("QwenLoraMerge", model=link, **inputs)
    prompt["said"] = bench.graph.sink("said", ["merge", 0])
    return prompt


def merge(bench, *chain, **inputs):
    done = bench.graph.run(merging(bench, *chain, **inputs))
    assert done.success, done.error
    executed = [data for name, data in done.events if name == "executed"]
    (shown,) = (data["output"] for data in executed if data["node"] == "merge")
    assert shown["text"] == [done.values["said"]]
    return done.values["said"]


def not_merged(bench, *chain, **inputs):
    failed = bench.graph.run(merging(bench, *chain, **inputs))
    assert failed.error["node_id"] == "merge"
    return failed.error["exception_message"]


@pytest.mark.usefixtures("small_table")
def test_what_is_applied_is_saved_as_one_file_that_does_the_same(bench, output):
    chain = [load(A, 0.7), ("QwenLoraStack", {"loras.0.lora_name": B, "loras.0.strength": -0.5})]
    said = merge(bench, *chain, dtype="fp32")
    lines = said.splitlines()
    assert lines[0] == f"2 LoRAs saved as `{Path('merged_00001_.safetensors')}`"
    assert lines[1].startswith("MERGED")
    path = output / "loras" / "merged_00001_.safetensors"
    assert f"{path}" in said
    one, two, base = bench.latents(one=chain, two=[load(path.name)], base=[])
    effect = (one - base).norm()
    assert effect > 1e-2 * base.norm()
    assert (two - one).norm() <= 1e-3 * effect


@pytest.mark.usefixtures("small_table")
def test_no_file_is_replaced(bench, output):
    merge(bench, load(A))
    first = (output / "loras" / "merged_00001_.safetensors").read_bytes()
    said = merge(bench, load(B))
    assert "merged_00002_.safetensors" in said
    assert (output / "loras" / "merged_00001_.safetensors").read_bytes() == first
    unchanged = bench.graph.run(merging(bench, load(B)))
    assert unchanged.success
    assert "merge" not in unchanged.executed
    assert len(list((output / "loras").iterdir())) == 2


@pytest.mark.usefixtures("small_table")
def test_ranks_and_numbers_as_asked(bench, output):
    said = merge(bench, load(A), load(B), rank=2, dtype="fp16", filename_prefix="other\\ab")
    assert "of the energy lost" in said
    assert said.splitlines()[0] == "2 LoRAs saved outside of the folders for LoRAs"
    tensors = tensors_of(output / "other" / "ab_00001_.safetensors")
    downs = [t for key, t in tensors.items() if key.endswith("lora_down.weight")]
    assert {tensor.shape[0] for tensor in downs} == {2}
    assert {tensor.dtype for tensor in downs} == {torch.float16}
    said = merge(bench, load(A), energy=0.5, filename_prefix="loras/half")
    assert "of the energy lost" in said


@pytest.mark.usefixtures("small_table")
def test_modulation_that_is_off_stays_off(bench, output):
    node = "NunchakuQwenImageLoraStackV2"
    off = (node, {"lora_name_1": A, "apply_awq_mod": False})
    said = merge(bench, off)
    assert "turned off" in said
    saved = tensors_of(output / "loras" / "merged_00001_.safetensors")
    assert saved
    assert not [key for key in saved if "_mod.1." in key]
    merge(bench, load(A), filename_prefix="loras/on")
    assert [
        key for key in tensors_of(output / "loras" / "on_00001_.safetensors") if "_mod.1." in key
    ]


@pytest.mark.usefixtures("small_table")
def test_what_needs_the_models_weights_is_told(bench, output, host, caplog):
    tensors = tensors_of(host.loras / A)
    (down,) = [key for key in tensors if "0.attn.to_q." in key and "lora_A" in key]
    stem = down.split("lora_A")[0]
    up = tensors[down.replace("lora_A", "lora_B")]
    tensors[f"{stem}lora_magnitude_vector"] = torch.ones(up.shape[0])
    save_file(tensors, str(host.loras / "dora.safetensors"))
    said = merge(bench, load("dora.safetensors"))
    assert said.splitlines()[0].endswith("; a part is left out")
    assert "`base" in said
    assert "--" not in said
    assert [r.levelname for r in caplog.records if "a part is left out" in r.getMessage()] == [
        "WARNING"
    ]


@pytest.mark.usefixtures("small_table")
def test_loras_of_comfyuis_own_nodes_are_part_of_it(bench, output):
    native = ("LoraLoaderModelOnly", {"lora_name": A, "strength_model": 0.7})
    chain = [("QwenLoraEnable", {}), native, load(B, -0.5)]
    values = outputs(bench, bench.prompt(sample=False, one=chain), "one 2")
    # Nodes of ours come first, whatever the order of the nodes.
    assert sorted(values["applied"].split()) == ["<lora:a:0.7>", "<lora:b:-0.5>"]
    assert values["lora_stack"] == [(B, -0.5, -0.5)]
    said = merge(bench, *chain, dtype="fp32")
    assert said.splitlines()[0].startswith("2 LoRAs saved as")
    one, two = bench.latents(one=chain, two=[load("merged_00001_.safetensors")])
    (base,) = bench.latents(base=[])
    assert (two - one).norm() <= 1e-3 * (one - base).norm()


@pytest.mark.usefixtures("small_table")
def test_a_schedule_has_no_place_in_a_file(bench, output):
    node = ("QwenLoraLoader", {"lora_name": A, "schedule": "0:1, 0.5:0.3"})
    assert "`a` has the schedule `0:1, 0.5:0.3`: a file holds one strength" in not_merged(
        bench, node
    )
    assert list((output / "loras").iterdir()) == []


@pytest.mark.usefixtures("small_table")
def test_factors_by_block_are_in_the_file(bench, output):
    node = ("QwenLoraLoader", {"lora_name": A, "blocks": "custom", "custom_blocks": "0:0"})
    merge(bench, node)
    saved = tensors_of(output / "loras" / "merged_00001_.safetensors")
    assert not [key for key in saved if ".0.attn" in key]
    assert [key for key in saved if ".1.attn" in key]


def test_a_model_without_loras_is_told(bench, output):
    assert "this model has no LoRA: there is nothing to merge" in not_merged(bench)
    assert not (output / "loras").exists()


def test_inputs_that_contradict_each_other_are_told(bench, output):
    text = not_merged(bench, load(A), rank=4, energy=0.9)
    assert "`rank` and `energy` are both set" in text


def test_a_wrong_model_is_told(bench, small_qwen, output):
    bench.sources["model"] = bench.graph.source(small_qwen)
    assert "only works with Nunchaku" in not_merged(bench)


@pytest.mark.parametrize(
    "prefix", ["../merged", "loras/../../x", "", "/tmp/x", "C:\\x", "loras\\..\\..\\x"]
)
def test_a_name_out_of_the_output_folder_is_refused_at_its_widget(bench, output, prefix):
    refused = bench.graph.run(merging(bench, load(A), filename_prefix=prefix))
    assert "merge" not in refused.executed
    (error,) = refused.node_errors["merge"]["errors"]
    assert error["extra_info"]["input_name"] == "filename_prefix"
    assert f"the file name {prefix!r} leads out" in error["details"]


@pytest.mark.usefixtures("small_table")
def test_a_file_that_changed_since_is_not_merged(bench, output, files, Draft):
    (model,) = bench.models(one=[load(A)])
    Draft.full(seed=9, rank=8, blocks=2).save(files[A])
    stat = files[A].stat()
    os.utime(files[A], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    bench.sources["model"] = bench.graph.source(model)
    assert "changed" in not_merged(bench)
    assert list((output / "loras").iterdir()) == []


@pytest.mark.usefixtures("small_table")
def test_a_stop_leaves_no_file(bench, output, monkeypatch):
    import sys

    import nodes

    from .test_nodes import PACK

    host_module = sys.modules[f"{PACK}.host"]
    progress = host_module.progress

    def press_stop(phase, done, total):
        if phase == "merge" and done == 3:
            nodes.interrupt_processing()
        progress(phase, done, total)

    monkeypatch.setattr(host_module, "progress", press_stop)
    stopped = bench.graph.run(merging(bench, load(A)))
    assert "execution_interrupted" in dict(stopped.events)
    assert list((output / "loras").iterdir()) == []
