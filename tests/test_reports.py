"""What reports say: which LoRA is which, who wished for what, and numbers with their nouns."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, LoraSet, LoraSpec, compat, errors
from qwenlora.compose.planning import plan_report
from qwenlora.words import counted

from .test_adapters import BLOCK

NAME = "pytorch_lora_weights"
TURNED_OFF = "modulation layers are turned off"


@pytest.fixture
def pets(Draft, tmp_path):
    """Three files of one name; one of them has a tensor of unknown kind."""
    paths = {}
    for seed, name in enumerate(("cats", "dogs", "old/dogs")):
        draft = Draft(seed).add("proj_out", 4)
        if name == "dogs":
            draft.tensors["transformer_blocks.0.attn.to_q.lora_C.weight"] = torch.ones(2, 2)
        (tmp_path / name).mkdir(parents=True)
        paths[name] = draft.save(tmp_path / name / f"{NAME}.safetensors")
    return paths


def test_files_of_one_name_are_told_apart(model, pets, tmp_path, caplog):
    caplog.set_level(logging.INFO, "qwenlora")
    wanted = LoraSet.of(list(pets.values()))
    planned = plan_report(model, wanted)
    report = qwenlora.compose_loras(model, list(pets.values()))
    names = [f"cats/{NAME}", f"{tmp_path.name}/dogs/{NAME}", f"old/dogs/{NAME}"]
    assert wanted.names == tuple(names)
    for said in (planned, report, qwenlora.applied(model)):
        assert [lora.name for lora in said.loras] == names
        (remark,) = re.findall(r"`([^`]*)` lacks 1 ", said.summary())
        assert remark == names[1]
        for name in names:
            assert f"\n  {name} x 1: 1 module" in said.text()
    assert f"`{names[1]}` lacks 1" in caplog.text


def test_a_change_of_strengths_keeps_the_names(model, pets):
    cats, dogs = pets["cats"], pets["dogs"]
    before = qwenlora.compose_loras(model, [(cats, 0.5), (dogs, 1.0)])
    after = qwenlora.compose_loras(model, [(cats, 0.75), (dogs, 1.0)])
    assert [lora.strength for lora in after.loras] == [0.75, 1.0]
    assert [lora.name for lora in after.loras] == [lora.name for lora in before.loras]
    alone = qwenlora.compose_loras(model, [(cats, 0.75)])
    assert [lora.name for lora in alone.loras] == [NAME]


def test_one_file_twice_is_numbered(model, pets):
    report = qwenlora.compose_loras(model, [(pets["cats"], 0.5), (pets["cats"], -0.25)])
    assert (
        f"\n  {NAME} (1) x 0.5: 1 module, exact\n  {NAME} (2) x -0.25: 1 module, exact"
        in report.text()
    )


def test_state_dicts_and_given_names_are_told_apart(model, Draft, pets):
    tensors = Draft(5).add("img_in", 2).tensors
    stack = [tensors, dict(tensors), LoraSpec(tensors, name="mine"), LoraSpec(pets["cats"])]
    report = qwenlora.compose_loras(model, stack)
    assert [lora.name for lora in report.loras] == [
        "state dict (1)",
        "state dict (2)",
        "mine",
        NAME,
    ]


def test_errors_name_the_right_one(model, Draft, pets, tmp_path):
    stack = [pets["cats"], pets["dogs"]]
    with pytest.raises(errors.UnsupportedAdapterError, match=f"`dogs/{NAME}`"):
        qwenlora.compose_loras(model, stack, strict=True)
    empty = tmp_path / "none" / f"{NAME}.safetensors"
    empty.parent.mkdir()
    Draft(9).put("img_in", "dora_scale", 128, 1).save(empty)
    with pytest.raises(errors.NothingToApplyError, match=f"`none/{NAME}`.*: 1 module is left"):
        qwenlora.compose_loras(model, [pets["cats"], empty])


# ---- what the caller wished ----


@pytest.fixture
def modulating(Draft):
    """A LoRA of modulations alone."""
    return Draft(7).add(f"{BLOCK}.img_mod.1", 4).add(f"{BLOCK}.txt_mod.1", 4).tensors


@pytest.mark.parametrize(
    ("by_one", "by_all", "wish"),
    [
        (True, False, "`ComposeOptions(modulation=False)`"),
        (False, True, "`LoraSpec(modulation=False)`"),
        (False, False, "`ComposeOptions(modulation=False)` and `LoraSpec(modulation=False)`"),
    ],
)
def test_what_is_turned_off_is_said_with_the_wish(by_one, by_all, wish, model, modulating):
    spec = LoraSpec(modulating, name="mod", modulation=by_one)
    options = ComposeOptions(modulation=by_all)
    planned = plan_report(model, LoraSet.of(spec, options=options))
    report = qwenlora.compose_loras(model, spec, strict=True, options=options)
    for said in (planned, report):
        assert said.summary().startswith("1 LoRA on 0 slots, ")
        assert said.summary().endswith(f"; `mod` without 2 ({TURNED_OFF}: {wish})")
        assert f"    left out as wished: 2 x {TURNED_OFF}: {wish} (e.g. {BLOCK}." in said.text()
        assert "complete" not in said.text()
        assert said.complete, "nothing is left out against the caller's wish"
        assert len(said.loras[0].turned_off) == 2


def test_what_is_turned_off_stands_beside_what_is_missing(model, modulating, Draft):
    tensors = modulating | Draft(8).add("proj_out", 4).tensors
    tensors["transformer_blocks.0.attn.to_q.lora_C.weight"] = torch.ones(2, 2)
    stack = [LoraSpec(tensors, name="mod", modulation=False), LoraSpec(modulating, name="on")]
    report = qwenlora.compose_loras(model, stack)
    _, _, remarks = report.summary().partition("; ")
    first, second = remarks.split("; ")
    assert first.startswith("`mod` lacks 1 (")
    assert second == f"`mod` without 2 ({TURNED_OFF}: `LoraSpec(modulation=False)`)"
    assert not report.complete


def test_scripts_of_the_earlier_loader_are_told_too(model, modulating):
    compat.compose_loras_v2(model, [(modulating, 1.0)], apply_awq_mod=False)
    assert "complete" not in qwenlora.applied(model).summary()


def test_a_switch_that_turns_nothing_off_is_not_mentioned(model, Draft):
    tensors = Draft(8).add("proj_out", 4).tensors
    report = qwenlora.compose_loras(model, tensors, options=ComposeOptions(modulation=False))
    assert report.summary().endswith("; complete")
    assert "wished" not in report.text()


# ---- numbers ----


def test_a_number_has_its_noun():
    assert [counted(n, "slot") for n in (0, 1, 2)] == ["0 slots", "1 slot", "2 slots"]
    assert [counted(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]


def test_one_of_each_is_singular(model, Draft):
    one = Draft(1).add("proj_out", 24).tensors
    report = qwenlora.compose_loras(model, one, max_rank=16)
    assert report.summary().startswith("1 LoRA on 1 slot, rank +16, ")
    assert ", 1 slot compressed, up to " in report.summary()
    assert " on 1 of 1 slot, " in report.text()
    assert "x 1: 1 module" in report.text()
    two = [Draft(n).add("proj_out", 24).add("img_in", 24).tensors for n in (1, 2)]
    report = qwenlora.compose_loras(model, two, max_rank=16)
    assert report.summary().startswith("2 LoRAs on 2 slots, rank +16, ")
    assert ", 2 slots compressed, " in report.summary()
    assert " on 2 of 2 slots, " in report.text()
    assert "x 1: 2 modules" in report.text()


COUNTED = re.compile(
    r"\{[^{}]+\} (?:slots|modules|LoRAs|tensors|ranks|files|entries|nodes|sums|values|pickles)\b"
)


def test_no_text_puts_a_number_before_a_bare_plural():
    """Of the package and the nodes: `counted` writes both."""
    root = Path(__file__).parents[1]
    sources = [
        *root.glob("python/qwenlora/*.py"),
        *root.glob("python/qwenlora/merge/*.py"),
        *root.glob("python/qwenlora/doctor/**/*.py"),
        *root.glob("comfy/qwenlora_nodes/*.py"),
    ]
    assert len(sources) > 50
    found = {
        f"{path.name}: {match}"
        for path in sources
        for match in COUNTED.findall(path.read_text(encoding="utf-8"))
    }
    assert not found
