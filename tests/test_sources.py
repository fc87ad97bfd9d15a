"""State dicts in memory and paths: what is accepted, what is refused, what is kept alive."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qwenlora
from qwenlora import LoraSet, _core, errors

BLOCK = "transformer_blocks.0"
KEY = f"{BLOCK}.attn.to_q"


def pair(rank: int = 4, width: int = 128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{KEY}.lora_A.weight": torch.randn(rank, width, generator=generator),
        f"{KEY}.lora_B.weight": torch.randn(width, rank, generator=generator),
    }


def test_a_state_dict_is_not_kept_alive(model):
    tensors = pair()
    alive = weakref.ref(tensors[f"{KEY}.lora_A.weight"])
    qwenlora.compose_loras(model, tensors)
    del tensors
    gc.collect()
    assert alive() is None
    assert qwenlora.applied(model).complete
    # Another one in its place is another LoRA, whatever number it was given.
    qwenlora.compose_loras(model, pair(rank=5))
    assert qwenlora.applied(model).slots[0].rank == 5


def test_inference_tensors_are_never_taken_for_unchanged(model):
    with torch.inference_mode():
        tensors = {key: tensor.clone() for key, tensor in pair().items()}
        first = qwenlora.compose_loras(model, tensors)
        tensors[f"{KEY}.lora_B.weight"].mul_(3)
        layer = model.get_submodule(f"{BLOCK}.attn.to_qkv")
        before = layer.proj_up.clone()
        second = qwenlora.compose_loras(model, tensors)
    assert second is not first
    assert not torch.equal(layer.proj_up, before)


def test_what_a_state_dict_may_not_hold(model):
    key = f"{KEY}.lora_A.weight"
    for bad, words in (
        ({key: torch.empty(4, 128, device="meta")}, "meta"),
        ({key: torch.eye(128).to_sparse()}, "sparse"),
        ({3: torch.ones(1)}, "printable text"),
        ({"a\ud800": torch.ones(1)}, "printable text"),
        ({"a\nb": torch.ones(1)}, "printable text"),
    ):
        with pytest.raises(errors.LoraFileError, match=words):
            qwenlora.compose_loras(model, pair() | bad)


def test_very_long_keys_do_no_harm(model):
    with pytest.raises(errors.LoraFileError):
        qwenlora.compose_loras(model, pair() | {"dit." * 100_000 + "x.weight": torch.ones(1)})


def test_foreign_integers_are_ignored_as_in_a_file(model):
    report = qwenlora.compose_loras(
        model, pair() | {"_aux.step": torch.ones(2, dtype=torch.uint16)}
    )
    assert report.complete


def test_strength_may_be_any_real_number(model):
    report = qwenlora.compose_loras(model, (pair(), np.float32(0.5)))
    assert report.loras[0].strength == 0.5


@pytest.mark.parametrize("max_rank", [0, -1])
def test_a_limit_that_leaves_nothing(model, max_rank):
    with pytest.raises(errors.RankError, match="at least 1"):
        qwenlora.compose_loras(model, pair(), max_rank=max_rank)


@pytest.mark.parametrize("max_rank", [2.0, True, "all", ["auto"]])
def test_a_limit_that_is_no_number(model, max_rank):
    with pytest.raises(TypeError, match="whole number"):
        qwenlora.compose_loras(model, pair(), max_rank=max_rank)


@pytest.mark.skipif(sys.platform != "linux", reason="only there names are bytes")
def test_a_file_name_that_is_not_text(model, tmp_path, lora):
    path = os.fsencode(tmp_path) + b"/l\xff.safetensors"
    with open(path, "wb") as file:
        file.write(Path(lora[0]).read_bytes())
    report = qwenlora.compose_loras(model, os.fsdecode(path))
    assert report.loras[0].name == "l\\udcff"
    report.summary().encode()


def test_deltas_too_large_to_sum_name_the_module(model):
    tensors = {key: torch.full_like(tensor, 1e25) for key, tensor in pair(rank=8).items()}
    with pytest.raises(errors.NonFiniteError, match="to_qkv"):
        qwenlora.compose_loras(model, tensors, max_rank=4)


def test_a_compiled_transformer_is_the_transformer(model, probe):
    compiled = torch.compile(model, backend="eager")
    base = probe.snapshot(model)
    report = qwenlora.compose_loras(compiled, pair())
    assert qwenlora.applied(model) is report
    assert qwenlora.applied(compiled) is report
    qwenlora.reset_loras(compiled)
    assert probe.snapshot(model).differences(base) == []


def test_a_module_around_the_transformer_is_refused(model):
    outer = nn.Module()
    outer.diffusion_model = model
    for call in (qwenlora.reset_loras, qwenlora.applied):
        with pytest.raises(errors.UnsupportedModelError, match="`diffusion_model`"):
            call(outer)


def test_layers_that_share_a_parameter_are_refused(model):
    attention = model.transformer_blocks[0].attn
    attention.add_qkv_proj.proj_down = attention.to_qkv.proj_down
    with pytest.raises(errors.UnsupportedModelError, match="share one proj_down"):
        qwenlora.compose_loras(model, pair())


def test_a_linear_without_values_is_refused(model):
    model.proj_out = nn.Linear(128, 64, device="meta")
    with pytest.raises(errors.ModelStateError, match="meta"):
        qwenlora.compose_loras(model, pair())


def test_the_record_may_be_pickled(model):
    qwenlora.compose_loras(model, pair())
    again = pickle.loads(pickle.dumps(copy.deepcopy(qwenlora.applied(model))))
    assert again == qwenlora.applied(model)


def test_a_modulation_lora_with_modulation_off_is_no_error(model):
    key = f"{BLOCK}.img_mod.1"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(4, 128),
        f"{key}.lora_B.weight": torch.ones(768, 4),
    }
    report = qwenlora.compose_loras(
        model, tensors, options=qwenlora.ComposeOptions(modulation=False)
    )
    assert report.slots == ()
    (skip,) = report.loras[0].skipped
    assert skip.reason == "modulation layers are turned off: `ComposeOptions(modulation=False)`"


def test_files_are_planned_side_by_side_and_state_dicts_here(lora, Draft, tmp_path, monkeypatch):
    """Each file once, at most eight at a time; a state dict on the thread that asks."""
    paths = [Draft(seed).add(KEY, 4).save(tmp_path / f"{seed}.safetensors") for seed in range(10)]
    asking, seen, plan = threading.get_ident(), {}, _core.FilePlan
    turns, eight = itertools.count(), threading.Barrier(8)

    class WatchingPlan:
        @staticmethod
        def read(path):
            seen.setdefault(path, []).append(threading.get_ident())
            if next(turns) < 8:
                eight.wait(10)
            return plan.read(path)

        @staticmethod
        def from_tensors(*args, **options):
            seen.setdefault("state dict", []).append(threading.get_ident())
            return plan.from_tensors(*args, **options)

    monkeypatch.setattr(_core, "FilePlan", WatchingPlan)
    stack = [*paths[:5], pair(), *paths[5:], (paths[0], 0.5)]
    qwenlora.clear_cache()
    found = LoraSet.of(stack)
    assert seen["state dict"] == [asking]
    assert all(len(seen[path]) == 1 for path in paths)
    threads = {seen[path][0] for path in paths}
    assert len(threads) == 8
    assert asking not in threads
    assert [source.plan for source in found.sources[:5]] == [
        LoraSet.of(path).sources[0].plan for path in paths[:5]
    ]
    assert found.sources[-1].plan is found.sources[0].plan
    # Known files, one unknown file, and one file alone take no thread.
    seen.clear()
    assert LoraSet.of(stack).key == LoraSet.of(found.specs).key
    Draft(99).add(KEY, 4).save(paths[3])
    LoraSet.of(stack)
    qwenlora.clear_cache()
    LoraSet.of([paths[0], pair(), (paths[0], 0.5)])
    assert {ident for idents in seen.values() for ident in idents} == {asking}
    assert seen.keys() == {paths[0], paths[3], "state dict"}


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_the_first_lora_that_fails_is_told(Draft, tmp_path, monkeypatch, known):
    good = [Draft(seed).add(KEY, 4).save(tmp_path / f"{seed}.safetensors") for seed in range(3)]
    bad = []
    for number in range(2):
        bad.append(tmp_path / f"bad{number}.safetensors")
        bad[-1].write_bytes(b"\xff" * (8 + number))
    late, plan = threading.Event(), _core.FilePlan

    class SlowPlan:
        from_tensors = plan.from_tensors

        @staticmethod
        def read(path):
            if path == bad[0]:
                # The other one has failed long before.
                assert late.wait(10)
            try:
                return plan.read(path)
            finally:
                if path == bad[1]:
                    late.set()

    monkeypatch.setattr(_core, "FilePlan", SlowPlan)
    qwenlora.clear_cache()
    if known:
        LoraSet.of(good)
    with pytest.raises(errors.LoraFileError, match="bad0"):
        LoraSet.of([good[0], bad[0], good[1], bad[1], good[2]])
    with pytest.raises(errors.LoraReadError, match="missing"):
        LoraSet.of([good[0], tmp_path / "missing.safetensors", bad[1]])
    with pytest.raises(errors.LoraFileError, match="printable"):
        LoraSet.of([good[0], {"a\nb": torch.ones(1)}, bad[1], good[1]])
    with pytest.raises(errors.LoraFileError, match="bad1"):
        LoraSet.of([good[0], bad[1], {"a\nb": torch.ones(1)}, good[1]])
