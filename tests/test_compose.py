"""`compose_loras`, `reset_loras` and `applied` on tiny emulated models."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qwenlora
from qwenlora import _core, cache, compat, compose, errors
from qwenlora.emulation import Precision
from qwenlora.plan import StackPlan
from qwenlora.slots import BRANCH_DOWN, BRANCH_UP
from qwenlora.spec import ComposeOptions, LoraSpec
from qwenlora.targets import find_targets

EXACT = 2e-6
"""Relative error of float32 tensors against float64 formulas."""

BLOCK = "transformer_blocks.0"


class Reads:
    """Counts what is read of files: plans and tensors."""

    def __init__(self) -> None:
        self.plans = 0
        self.tensors = 0
        self.open = 0


@pytest.fixture
def reads(monkeypatch):
    counted = Reads()
    plan, reader = _core.FilePlan, _core.TensorReader

    class CountingPlan:
        from_tensors = plan.from_tensors

        @staticmethod
        def read(path):
            counted.plans += 1
            return plan.read(path)

    class CountingReader:
        def __init__(self, path):
            self._reader = reader(path)
            self._closed = False
            counted.open += 1

        def __getattr__(self, name):
            return getattr(self._reader, name)

        def read_into(self, ranges, dest, *, threads):
            counted.tensors += len(ranges)
            return self._reader.read_into(ranges, dest, threads=threads)

        def close(self):
            counted.open -= not self._closed
            self._closed = True
            self._reader.close()

    monkeypatch.setattr(_core, "FilePlan", CountingPlan)
    monkeypatch.setattr(_core, "TensorReader", CountingReader)
    return counted


# ---- what a stack may look like ----


def _forms(path: Path, tensors):
    return {
        "Path": (path, 1.0),
        "str": (str(path), 1.0),
        "state dict": (tensors, 1.0),
        "pair": ((path, 0.5), 0.5),
        "pair of str and int": ((str(path), 2), 2.0),
        "pair of state dict": ((tensors, -0.5), -0.5),
        "LoraSpec": (LoraSpec(path, 0.25), 0.25),
        "LoraSpec of state dict": (LoraSpec(tensors, strength=0.25, name="mine"), 0.25),
        "list": ([path], 1.0),
        "tuple of items": ((LoraSpec(path),), 1.0),
        "list of pair": ([(path, 0.75)], 0.75),
        "mixed list": ([path, (tensors, 0.5), LoraSpec(str(path), -0.25)], 1.25),
        "the same twice": ([path, path], 2.0),
        "strength 0 is absent": ([(path, 0.0), (path, 1.5), LoraSpec(path, 0)], 1.5),
    }


@pytest.mark.parametrize("form", list(_forms(Path("x"), {})))
def test_every_form_of_a_stack(form, model, lora, probe):
    path, draft = lora
    loras, strength = _forms(path, draft.tensors)[form]
    report = qwenlora.compose_loras(model, loras)
    probe.assert_holds(model, [(draft, strength)], within=EXACT)
    assert report.complete
    assert qwenlora.applied(model) is report


@pytest.mark.parametrize("item", [3, None, [["x", 1.0]], [("x", "1.0")], [("x", 1.0, 2.0)]])
def test_other_forms_are_type_errors(item, model):
    with pytest.raises(TypeError):
        qwenlora.compose_loras(model, item)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_strengths_are_finite(strength, model, lora):
    with pytest.raises(ValueError, match=r"strength is .*: it must be finite"):
        qwenlora.compose_loras(model, (lora[0], strength))


def test_peft_folder(model, probe, Draft, tmp_path):
    draft = Draft.full(seed=3)
    folder = tmp_path / "peft"
    draft.save(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    qwenlora.compose_loras(model, folder)
    probe.assert_holds(model, [(draft, 2.0)], within=EXACT)
    # Another configuration beside the same weights is another LoRA.
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    qwenlora.compose_loras(model, folder)
    probe.assert_holds(model, [(draft, 4.0)], within=EXACT)


def test_kohya_keys_and_alphas(model, probe, Draft, kohya, tmp_path):
    draft = Draft(5, style=kohya)
    draft.add(f"{BLOCK}.attn.to_q", 8, alpha=2.0).add(f"{BLOCK}.attn.to_v", 3, alpha=12.0)
    draft.add(f"{BLOCK}.img_mod.1", 4, alpha=1.0).add("proj_out", 5, alpha=5.0)
    qwenlora.compose_loras(model, draft.save(tmp_path / "kohya.safetensors"))
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_of_files(dtype, model, probe, Draft, tmp_path):
    draft = Draft.full(seed=4, dtype=dtype)
    qwenlora.compose_loras(model, (draft.save(tmp_path / "a.safetensors"), 0.3))
    probe.assert_holds(model, [(draft, 0.3)], within=EXACT)


# ---- nothing to do ----


def test_the_same_stack_is_no_work(model, lora, probe, reads):
    stack = [(lora[0], 0.5), (lora[0], -0.25)]
    report = qwenlora.compose_loras(model, stack, max_rank=20)
    before, read = probe.addresses(model), (reads.plans, reads.tensors)
    assert qwenlora.compose_loras(model, list(stack), max_rank=20) is report
    assert probe.addresses(model) == before
    assert (reads.plans, reads.tensors) == read
    assert reads.open == 0


@pytest.mark.parametrize("change", ["strength", "order", "max_rank", "modulation", "name"])
def test_another_stack_is_work(change, model, lora, Draft, tmp_path):
    other = Draft.full(seed=8, rank=2).save(tmp_path / "other.safetensors")
    stack = [LoraSpec(lora[0]), LoraSpec(other)]
    report = qwenlora.compose_loras(model, stack)
    changed = {
        "strength": lambda: qwenlora.compose_loras(model, [stack[0], LoraSpec(other, 0.5)]),
        "order": lambda: qwenlora.compose_loras(model, stack[::-1]),
        "max_rank": lambda: qwenlora.compose_loras(model, stack, max_rank=3),
        "modulation": lambda: qwenlora.compose_loras(
            model, stack, options=ComposeOptions(modulation=False)
        ),
        "name": lambda: qwenlora.compose_loras(model, [stack[0], LoraSpec(other, name="n")]),
    }[change]()
    assert changed is not report
    assert qwenlora.applied(model) is changed


def _absent(path: Path):
    return {
        "nothing": [],
        "no items": (),
        "one of strength 0": (path, 0),
        "all of strength 0": [(path, 0.0), LoraSpec(path, -0.0)],
        "a file that is not there": [("missing.safetensors", 0.0)],
    }


@pytest.mark.parametrize("form", list(_absent(Path("x"))))
@pytest.mark.parametrize("composed_before", [False, True])
def test_an_empty_stack_is_a_model_never_touched(form, composed_before, model, lora, probe):
    before, output = probe.snapshot(model), probe.output(model)
    if composed_before:
        qwenlora.compose_loras(model, lora[0])
        assert probe.snapshot(model).differences(before)
        assert not torch.equal(probe.output(model), output)
    report = qwenlora.compose_loras(model, _absent(lora[0])[form])
    assert probe.snapshot(model).differences(before) == []
    assert torch.equal(probe.output(model), output)
    assert report.summary() == "base model: no LoRA"
    assert report.complete
    assert qwenlora.applied(model) == report


def test_parameters_stay_the_same_objects(model, lora):
    before = dict(model.named_parameters())
    qwenlora.compose_loras(model, lora[0])
    qwenlora.reset_loras(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_no_base_tensor_is_written_to(model, lora, probe):
    kept = {name: tensor.data for name, tensor in probe.tensors(model)}
    values = {name: tensor.clone() for name, tensor in kept.items()}
    qwenlora.compose_loras(model, lora[0])
    qwenlora.compose_loras(model, (lora[0], 2.0))
    assert all(torch.equal(kept[name], values[name]) for name in kept)


# ---- cache and files ----


def test_a_change_of_strength_reads_no_file(model, lora, probe, reads):
    path, draft = lora
    qwenlora.compose_loras(model, path)
    read = (reads.plans, reads.tensors)
    assert read == (1, len(draft.tensors))
    qwenlora.compose_loras(model, (path, 0.5))
    qwenlora.compose_loras(model, [])
    qwenlora.compose_loras(model, [(path, -2.0), (path, 1.0)])
    assert (reads.plans, reads.tensors) == read
    probe.assert_holds(model, [(draft, -1.0)], within=EXACT)
    assert reads.open == 0


def test_within_one_composition_nothing_is_read_twice(model, lora, reads):
    qwenlora.compose_loras(model, lora[0], options=ComposeOptions(cache_bytes=0))
    assert reads.tensors == len(lora[1].tensors)


def test_cache_bytes_0_keeps_nothing(model, lora, probe, reads):
    options = ComposeOptions(cache_bytes=0)
    qwenlora.compose_loras(model, lora[0], options=options)
    assert cache.pieces.nbytes == 0
    qwenlora.compose_loras(model, (lora[0], 0.5), options=options)
    assert reads.tensors == 2 * len(lora[1].tensors)
    probe.assert_holds(model, [(lora[1], 0.5)], within=EXACT)


def test_clear_cache_reads_again_and_leaves_the_model(model, lora, probe, reads):
    qwenlora.compose_loras(model, lora[0])
    before = probe.snapshot(model)
    assert cache.pieces.nbytes > 0
    qwenlora.clear_cache()
    assert cache.pieces.nbytes == 0
    assert probe.snapshot(model).differences(before) == []
    qwenlora.compose_loras(model, (lora[0], 0.5))
    assert reads.plans == 2
    assert reads.tensors == 2 * len(lora[1].tensors)


@pytest.mark.parametrize("limit_bytes", [10_000, 40_000, 1 << 30])
def test_the_cache_holds_no_more_memory_than_it_may(limit_bytes, model, lora):
    qwenlora.compose_loras(model, lora[0], options=ComposeOptions(cache_bytes=limit_bytes))
    storages = {}
    for pair in cache.pieces._pairs.values():
        for tensor in (pair.down, pair.up):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    held = sum(storages.values())
    # What the cache says it holds is what it keeps alive.
    assert 0 < held <= cache.pieces.nbytes <= limit_bytes


def test_a_dropped_model_is_let_go(make_model, lora):
    model = make_model()
    qwenlora.compose_loras(model, lora[0])
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_an_edited_file_is_composed_again(model, lora, probe, Draft):
    path, draft = lora
    first = qwenlora.compose_loras(model, path)
    edited = Draft.full(seed=77, rank=4).save(path)
    later = edited.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))
    assert qwenlora.compose_loras(model, path) is not first
    probe.assert_holds(model, [(Draft.full(seed=77, rank=4), 1.0)], within=EXACT)
    assert not torch.equal(probe.delta(model, "proj_out"), draft.slot_delta("proj_out", (64, 128)))


@pytest.mark.parametrize("moment", ["before reading", "while reading"])
@pytest.mark.parametrize("previous", [False, True])
def test_a_file_that_changes_meanwhile(
    moment, previous, model, lora, probe, Draft, tmp_path, monkeypatch
):
    path, _ = lora
    if previous:
        qwenlora.compose_loras(model, Draft.full(seed=9).save(tmp_path / "previous.safetensors"))
    before, addresses = probe.snapshot(model), probe.addresses(model)
    reader = _core.TensorReader

    def changed():
        os.utime(path, ns=(1, 1))

    class ChangingReader:
        def __init__(self, name):
            if moment == "before reading":
                changed()
            self._reader = reader(name)

        def __getattr__(self, name):
            return getattr(self._reader, name)

        def read_into(self, ranges, dest, *, threads):
            changed()
            return self._reader.read_into(ranges, dest, threads=threads)

    monkeypatch.setattr(_core, "TensorReader", ChangingReader)
    with pytest.raises(errors.LoraReadError, match="changed") as caught:
        qwenlora.compose_loras(model, path)
    assert isinstance(caught.value, OSError)
    assert probe.snapshot(model).differences(before) == []
    assert probe.addresses(model) == addresses
    monkeypatch.undo()
    qwenlora.compose_loras(model, path)
    probe.assert_holds(model, [(lora[1], 1.0)], within=EXACT)


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_file_cut_short_after_planning(is_cached, model, lora, probe, reads):
    path, _ = lora
    qwenlora.compose_loras(model, path)
    before = probe.snapshot(model)
    if not is_cached:
        cache.pieces.clear()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(errors.LoraFileError):
        qwenlora.compose_loras(model, (path, 0.5))
    assert probe.snapshot(model).differences(before) == []
    assert reads.open == 0


def test_no_file_stays_open_after_an_error(model, lora, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(compose.DeltaBuilder, "build", _raise_memory_error)
    with pytest.raises(MemoryError):
        qwenlora.compose_loras(model, lora[0])
    assert reads.open == 0


def test_no_file_stays_open_where_another_cannot_be_opened(model, lora, Draft, tmp_path, reads):
    second = Draft.full(seed=2).save(tmp_path / "second.safetensors")
    opened = _core.TensorReader.__init__

    def open_first(self, path):
        if path == second:
            raise errors.LoraReadError("gone")
        opened(self, path)

    _core.TensorReader.__init__ = open_first
    with pytest.raises(errors.LoraReadError, match="gone"):
        qwenlora.compose_loras(model, [lora[0], second])
    assert reads.open == 0


def _raise_memory_error(*_args, **_options):
    raise MemoryError


# ---- errors ----


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _unusable(folder: Path, Draft):
    """(source, error, words of its message) by name."""
    pickle = folder / "pickle.safetensors"
    torch.save({"x": torch.zeros(2)}, pickle)
    flux = Draft(1).put("single_transformer_blocks.0.attn.to_q", "down", 4, 128)
    flux.put("single_transformer_blocks.0.attn.to_q", "up", 128, 4)
    z_image = {
        f"diffusion_model.layers.0.attention.to_q.lora_{half}.weight": torch.ones(shape)
        for half, shape in (("A", (4, 3840)), ("B", (3840, 4)))
    }
    wide = {
        f"transformer.{BLOCK}.attn.{name}.lora_{half}.weight": torch.ones(shape)
        for name in ("to_q", "to_k")
        for half, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    unknown = {"something.else": torch.ones(3)}
    lokr = Draft(1).put(f"{BLOCK}.attn.to_q", "lokr_w1", 4, 4)
    lokr.put(f"{BLOCK}.attn.to_q", "lokr_w2", 32, 32)
    infinite = Draft(1).add(f"{BLOCK}.attn.to_q", 4, alpha=float("inf"))
    empty = folder / "empty"
    empty.mkdir()
    return {
        "missing": (folder / "no.safetensors", errors.LoraNotFoundError, "no.safetensors"),
        "folder": (empty, errors.LoraReadError, "adapter_model"),
        "empty": (_write(folder / "0.safetensors", b""), errors.LoraFileError, "0.safetensors"),
        "malformed": (
            _write(folder / "m.safetensors", (9).to_bytes(8, "little") + b'{"a":"b"}'),
            errors.LoraFileError,
            "m.safetensors",
        ),
        "header beyond the file": (
            _write(folder / "l.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"),
            errors.LoraFileError,
            "l.safetensors",
        ),
        "pickle": (pickle, errors.PickleFileError, "safetensors"),
        "FLUX": (flux.tensors, errors.OtherModelError, "FLUX"),
        "Z-Image": (z_image, errors.OtherModelError, "Z-Image"),
        "other widths": (wide, errors.OtherModelError, "to_q"),
        "no module": (unknown, errors.OtherModelError, "something.else"),
        "no tensor": ({}, errors.OtherModelError, "no tensor"),
        "only unsupported": (lokr.tensors, errors.NothingToApplyError, "LoKr"),
        "infinite alpha": (infinite.tensors, errors.LoraFileError, "alpha"),
        "not tensors": ({"x": [1.0]}, errors.LoraFileError, "`x` is list"),
        "complex": ({"x": torch.zeros(1, dtype=torch.complex64)}, errors.LoraFileError, "complex"),
    }


_BUILT_IN = {
    errors.LoraNotFoundError: FileNotFoundError,
    errors.LoraReadError: OSError,
    errors.LoraFileError: ValueError,
    errors.PickleFileError: ValueError,
    errors.OtherModelError: ValueError,
    errors.NothingToApplyError: ValueError,
}


@pytest.mark.parametrize(
    "name",
    [
        *("missing", "folder", "empty", "malformed", "header beyond the file", "pickle", "FLUX"),
        *("Z-Image", "other widths", "no module", "no tensor", "only unsupported"),
        *("infinite alpha", "not tensors", "complex"),
    ],
)
def test_unusable_loras_raise_and_leave_the_model(name, model, lora, probe, Draft, tmp_path):
    source, error, words = _unusable(tmp_path, Draft)[name]
    report = qwenlora.compose_loras(model, lora[0])
    before = probe.snapshot(model)
    for stack in (source, [lora[0], source]):
        with pytest.raises(error, match=words) as caught:
            qwenlora.compose_loras(model, stack)
        assert type(caught.value) is error
        assert isinstance(caught.value, (errors.QwenLoraError, _BUILT_IN[error]))
        assert isinstance(caught.value, _BUILT_IN[error])
    assert probe.snapshot(model).differences(before) == []
    assert qwenlora.applied(model) is report


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", ["down", "up"])
@pytest.mark.parametrize("target", [f"{BLOCK}.attn.to_k", f"{BLOCK}.txt_mod.1", "img_in"])
@pytest.mark.parametrize("max_rank", [None, 2])
def test_non_finite_weights_name_the_module(bad, half, target, max_rank, model, probe, Draft):
    draft = Draft.full(seed=1)
    draft.tensors[draft.key(target, half)][1, 2] = bad
    before = probe.snapshot(model)
    slot = target.replace("to_k", "to_qkv").replace(".", r"\.")
    with pytest.raises(errors.NonFiniteError, match=rf"`{slot}` would hold NaN or infinity"):
        qwenlora.compose_loras(model, draft.tensors, max_rank=max_rank)
    assert probe.snapshot(model).differences(before) == []


def test_a_nan_beside_zeros_is_not_called_zero(model, Draft):
    draft = Draft(1).add("img_in", 2, up=torch.zeros(128, 2))
    draft.tensors[draft.key("img_in", "down")][0, 0] = float("nan")
    with pytest.raises(errors.NonFiniteError, match="`img_in`"):
        qwenlora.compose_loras(model, draft.tensors)


def test_float16_overflow_is_an_error(make_model, probe, Draft):
    model = make_model(dtype=torch.float16)
    before = probe.snapshot(model)
    draft = Draft(1).add(f"{BLOCK}.attn.to_q", 4, up=torch.full((128, 4), 100.0))
    qwenlora.compose_loras(model, (draft.tensors, 600.0))
    for strength in (700.0, -700.0, 1e39):
        with pytest.raises(errors.NonFiniteError, match=r"to_qkv.*float16") as caught:
            qwenlora.compose_loras(model, (draft.tensors, strength))
        assert isinstance(caught.value, ArithmeticError)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("not_a_model", [None, "model", {}, torch.zeros(1), object()])
def test_what_is_no_model(not_a_model, lora):
    for loras in (lora[0], []):
        with pytest.raises(errors.UnsupportedModelError, match="expected a transformer module"):
            qwenlora.compose_loras(not_a_model, loras)


def test_models_without_slots(lora):
    for other in (torch.nn.Linear(8, 8), torch.nn.Sequential()):
        with pytest.raises(errors.UnsupportedModelError, match="no Nunchaku SVDQuant layer"):
            qwenlora.compose_loras(other, lora[0])
        assert issubclass(errors.UnsupportedModelError, TypeError)


def test_offload_is_refused(model, lora, probe):
    before = probe.snapshot(model)
    model.offload, model.offload_manager = True, object()
    with pytest.raises(errors.UnsupportedModelError, match=r"set_offload\(False\)"):
        qwenlora.compose_loras(model, lora[0])
    model.offload = False
    qwenlora.compose_loras(model, lora[0])
    qwenlora.reset_loras(model)
    del model.offload, model.offload_manager
    assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("change", ["one half", "both halves", "base", "dtype", "gone", "branch"])
def test_a_slot_that_something_else_changed(change, model, lora):
    qwenlora.compose_loras(model, lora[0])
    attention = model.transformer_blocks[0].attn
    qkv = attention.to_qkv
    size = qkv.proj_down.shape[1]
    if change == "one half":
        qkv.proj_down.data = qkv.proj_down.data[:, : size - 16].contiguous()
    elif change in ("both halves", "base"):
        kept = size - 16 if change == "both halves" else 32
        qkv.proj_down.data = qkv.proj_down.data[:, :kept].contiguous()
        qkv.proj_up.data = qkv.proj_up.data[:, :kept].contiguous()
    elif change == "dtype":
        qkv.proj_up.data = qkv.proj_up.data.half()
    elif change == "gone":
        attention.to_qkv = torch.nn.Identity()
    else:
        del model.proj_out._buffers[BRANCH_DOWN]
    for call in (
        lambda: qwenlora.applied(model),
        lambda: qwenlora.reset_loras(model),
        lambda: qwenlora.compose_loras(model, lora[0]),
    ):
        with pytest.raises(errors.ModelStateError, match=r"something else changed|reload"):
            call()


@pytest.mark.parametrize(
    ("max_rank", "base_rank", "words"),
    [(0, 32, "max_rank is 0: it must be at least 1"), (None, 1024, "has base rank 1024")],
)
def test_ranks_that_leave_nothing(max_rank, base_rank, words, make_model, lora, probe):
    model = make_model(rank=base_rank)
    before = probe.snapshot(model)
    with pytest.raises(errors.RankError, match=words):
        qwenlora.compose_loras(model, lora[0], max_rank=max_rank)
    assert probe.snapshot(model).differences(before) == []


def _partial(Draft, kind: str):
    """A LoRA of which something is left out, and the name of what."""
    draft = Draft(1).add(f"{BLOCK}.attn.to_out.0", 4)
    target = f"{BLOCK}.attn.to_q"
    if kind == "unsupported":
        draft.put(target, "lokr_w1", 4, 4).put(target, "lokr_w2", 32, 32)
    elif kind == "no up":
        draft.put(target, "down", 4, 128)
    elif kind == "ranks differ":
        draft.put(target, "down", 4, 128).put(target, "up", 128, 8)
    elif kind == "shape":
        draft.put(target, "down", 4, 64).put(target, "up", 128, 4)
    elif kind == "block that the model lacks":
        target = "transformer_blocks.7.attn.to_q"
        draft.put(target, "down", 4, 128).put(target, "up", 128, 4)
    return draft, target


_STRICT = {
    "unsupported": errors.UnsupportedAdapterError,
    "no up": errors.BrokenPairError,
    "ranks differ": errors.BrokenPairError,
    "shape": errors.ShapeMismatchError,
    "block that the model lacks": errors.ShapeMismatchError,
}


@pytest.mark.parametrize("kind", list(_STRICT))
def test_left_out_is_reported_or_raised(kind, model, probe, Draft):
    draft, target = _partial(Draft, kind)
    before = probe.snapshot(model)
    with pytest.raises(_STRICT[kind], match=f"`{target}` would be left out"):
        qwenlora.compose_loras(model, draft.tensors, strict=True)
    assert probe.snapshot(model).differences(before) == []
    report = qwenlora.compose_loras(model, draft.tensors)
    assert not report.complete
    (skip,) = [skip for skip in report.loras[0].skipped if skip.matters]
    assert skip.name == target
    assert skip.reason
    assert skip.reason in report.summary()
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)
    # In place already or not: what strict raises, it raises always.
    with pytest.raises(_STRICT[kind]):
        qwenlora.compose_loras(model, draft.tensors, strict=True)
    assert qwenlora.applied(model) is report


def test_strict_passes_what_is_whole(model, lora):
    assert qwenlora.compose_loras(model, lora[0], strict=True).complete


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("LoKr", {"lokr_w1": (4, 4), "lokr_w2": (32, 32)}),
        (
            "LoHa",
            {f"hada_w{n}_{h}": (128, 4)[:: 1 if h == "a" else -1] for n in "12" for h in "ab"},
        ),
        ("DoRA", {"down": (4, 128), "up": (128, 4), "dora_scale": (128,)}),
        (
            "GLoRA",
            {"a1.weight": (4, 128), "a2.weight": (128, 4), "b1.weight": (4, 128)}
            | {"b2.weight": (128, 4)},
        ),
        ("OFT", {"oft_blocks": (4, 32, 32), "alpha": ()}),
        ("BOFT", {"oft_blocks": (2, 4, 32, 32), "alpha": ()}),
        ("IA3", {"weight": (128,), "on_input": ()}),
        ("full delta", {"diff": (128, 128)}),
    ],
)
@pytest.mark.parametrize("target", [f"{BLOCK}.attn.to_add_out", f"{BLOCK}.attn.to_q"])
def test_unsupported_adapters_are_named_and_never_applied(
    name, tensors, target, model, probe, Draft
):
    draft = Draft(1).add("proj_out", 4)
    for role, shape in tensors.items():
        draft.put(target, role, *shape)
    report = qwenlora.compose_loras(model, draft.tensors)
    (skip,) = [skip for skip in report.loras[0].skipped if skip.matters]
    assert (skip.name, skip.kind) == (target, "unsupported")
    assert skip.reason == f"{name} is not supported yet"
    assert [slot.path for slot in report.slots] == ["proj_out"]
    assert probe.delta(model, target.replace("to_q", "to_qkv")).norm() == 0


@pytest.mark.parametrize("role", ["diff_b", "lora_B.bias"])
def test_a_bias_delta_beside_a_pair_is_reported(role, model, probe, Draft):
    target = f"{BLOCK}.attn.to_add_out"
    draft = Draft(1).add(target, 4).put(target, role, 128)
    bias = model.transformer_blocks[0].attn.to_add_out.bias.clone()
    report = qwenlora.compose_loras(model, draft.tensors)
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)
    (skip,) = report.loras[0].skipped
    assert (skip.name, skip.matters) == (draft.key(target, role), True)
    assert skip.reason == "bias deltas are not supported yet"
    assert not report.complete
    assert torch.equal(model.transformer_blocks[0].attn.to_add_out.bias, bias)
    with pytest.raises(errors.UnsupportedAdapterError):
        qwenlora.compose_loras(model, draft.tensors, strict=True)


# ---- the report ----


def test_report_of_a_whole_lora(model, lora, probe):
    bytes_before = sum(tensor.nbytes for _, tensor in probe.tensors(model))
    report = qwenlora.compose_loras(model, (lora[0], 0.5))
    (entry,) = report.loras
    assert (entry.name, entry.strength) == ("full", 0.5)
    assert entry.modules_applied == len(lora[1].deltas)
    assert (entry.skipped, entry.zero_slots, entry.all_zero) == ((), (), False)
    assert report.complete
    assert report.failure is None
    assert report.energy_lost == 0.0
    assert {slot.energy_lost for slot in report.slots} == {None}
    slots = {slot.path: slot for slot in report.slots}
    qkv = slots[f"{BLOCK}.attn.to_qkv"]
    assert (qkv.kind, qkv.base_rank, qkv.rank, qkv.rank_added) == ("svdq", 32, 12, 16)
    for path, kind in ((f"{BLOCK}.img_mod.1", "awq"), ("proj_out", "linear")):
        side = slots[path]
        assert (side.kind, side.base_rank, side.rank, side.rank_added) == (kind, 0, 4, 4)
    bytes_after = sum(tensor.nbytes for _, tensor in probe.tensors(model))
    assert report.added_bytes == bytes_after - bytes_before
    assert "\n" not in report.summary()
    assert report.summary().startswith(f"1 LoRA on {len(slots)} slots, rank +4 to +16, ")
    assert report.summary().endswith("; complete")
    assert "full x 0.5: 20 modules" in report.text()
    assert json.loads(json.dumps(report.to_dict()))["complete"] is True


def test_shared_downs_are_counted_once(model, probe, Draft):
    draft = Draft(1)
    shared = draft.random(5, 128)
    draft.add(f"{BLOCK}.attn.to_q", 5, down=shared, alpha=2.0)
    draft.add(f"{BLOCK}.attn.to_k", 7)
    draft.add(f"{BLOCK}.attn.to_v", 5, down=shared.clone(), alpha=4.0)
    report = qwenlora.compose_loras(model, draft.tensors)
    assert (report.slots[0].rank, report.slots[0].rank_added) == (12, 16)
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)


def test_skipped_tensors_of_other_components_do_not_matter(model, Draft):
    draft = Draft(1).add("proj_out", 4)
    draft.tensors["lora_te1_text_model_encoder.lora_down.weight"] = torch.ones(4, 8)
    report = qwenlora.compose_loras(model, draft.tensors, strict=True)
    (skip,) = report.loras[0].skipped
    assert (skip.kind, skip.reason, skip.matters) == ("foreign", "text encoder", False)
    assert report.complete
    assert "ignored: 1 x text encoder" in report.text()


def test_a_zero_lora_is_said_to_be_zero(model, probe, Draft):
    untouched = probe.snapshot(model)
    zero = Draft(1).add("proj_out", 4, up=torch.zeros(64, 4))
    zero.add(f"{BLOCK}.attn.to_k", 4, down=torch.zeros(4, 128))
    report = qwenlora.compose_loras(model, LoraSpec(zero.tensors, name="untrained"))
    (entry,) = report.loras
    assert entry.all_zero
    assert set(entry.zero_slots) == {"proj_out", f"{BLOCK}.attn.to_qkv"}
    assert report.slots == ()
    assert "`untrained` is all zero" in report.summary()
    assert "its delta is all zero" in report.text()
    assert probe.snapshot(model).tensors == untouched.tensors
    # In one slot only, beside a LoRA that is not zero there.
    partly = Draft(2).add("proj_out", 4).add("img_in", 4, up=torch.zeros(128, 4))
    report = qwenlora.compose_loras(model, [zero.tensors, partly.tensors])
    assert [lora.all_zero for lora in report.loras] == [True, False]
    assert report.loras[1].zero_slots == ("img_in",)
    assert [(slot.path, slot.rank) for slot in report.slots] == [("proj_out", 4)]
    # A LoRA's zero takes the place of another's delta.
    qwenlora.compose_loras(model, zero.tensors)
    assert probe.snapshot(model).tensors == untouched.tensors


def test_modulation_turned_off_is_reported_and_no_failure(model, lora, probe):
    report = qwenlora.compose_loras(
        model, lora[0], strict=True, options=ComposeOptions(modulation=False)
    )
    skipped = {skip.name: skip for skip in report.loras[0].skipped}
    assert set(skipped) == {f"{BLOCK}.img_mod.1", f"{BLOCK}.txt_mod.1"}
    assert {skip.kind for skip in skipped.values()} == {"turned_off"}
    assert report.complete
    assert probe.delta(model, f"{BLOCK}.img_mod.1").norm() == 0


def test_progress_is_told(model, lora):
    calls = []
    options = ComposeOptions(progress=lambda *call: calls.append(call))
    report = qwenlora.compose_loras(model, lora[0], options=options)
    count = len(report.slots)
    assert calls == [(phase, n, count) for phase in ("stage", "write") for n in range(count)]


@pytest.mark.parametrize("max_rank", [1, 5, 16, 20])
def test_max_rank_holds_in_every_slot(max_rank, model, Draft):
    stack = [Draft.full(seed=seed, rank=9).tensors for seed in (1, 2)]
    report = qwenlora.compose_loras(model, stack, max_rank=max_rank)
    for slot in report.slots:
        held = model.get_submodule(slot.path)
        assert slot.rank <= max_rank
        padded = -(-max_rank // 16) * 16 if slot.kind == "svdq" else max_rank
        assert slot.rank_added <= padded
        if slot.kind == "svdq":
            assert held.proj_down.shape[1] == held.proj_up.shape[1] == 32 + slot.rank_added
        else:
            assert held.get_buffer(BRANCH_DOWN).shape[0] == slot.rank_added
            assert held.get_buffer(BRANCH_UP).shape[1] == slot.rank_added
    assert report.energy_lost > 0
    assert "slots compressed, up to" in report.summary()


# ---- copies, dtypes, modes ----


def test_a_copy_of_a_composed_model_stands_alone(model, lora, probe):
    untouched = probe.snapshot(model)
    qwenlora.compose_loras(model, lora[0])
    composed, output = probe.snapshot(model), probe.output(model)
    twin = copy.deepcopy(model)
    assert probe.snapshot(twin).differences(composed) == []
    assert torch.equal(probe.output(twin), output)
    qwenlora.reset_loras(twin)
    assert probe.snapshot(twin).differences(untouched) == []
    assert probe.snapshot(model).differences(composed) == []
    assert torch.equal(probe.output(model), output)
    twin = copy.deepcopy(model)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(untouched) == []
    assert probe.snapshot(twin).differences(composed) == []
    qwenlora.compose_loras(twin, (lora[0], -1.0))
    probe.assert_holds(twin, [(lora[1], -1.0)], within=EXACT)
    assert torch.equal(probe.output(twin), probe.output(copy.deepcopy(twin)))


def test_a_copy_of_one_block_carries_its_side_branches(model, lora):
    qwenlora.compose_loras(model, lora[0])
    twin = copy.deepcopy(model.transformer_blocks[0])
    x = torch.ones(1, 128)
    expected = model.transformer_blocks[0].img_mod(x)
    qwenlora.reset_loras(model)
    with torch.no_grad():
        assert torch.equal(twin.img_mod(x), expected)
        assert not torch.equal(model.transformer_blocks[0].img_mod(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(dtype, make_model, lora, probe):
    model = make_model(dtype=dtype)
    before, output = probe.snapshot(model), probe.output(model)
    qwenlora.compose_loras(model, (lora[0], 0.7))
    probe.assert_holds(model, [(lora[1], 0.7)], within=2 * torch.finfo(dtype).eps)
    assert {p.dtype for n, p in model.named_parameters() if "proj_" in n} == {dtype}
    assert {b.dtype for b in model.buffers()} == {dtype}
    assert not torch.equal(probe.output(model), output)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_composed_model_may_be_cast(dtype, make_model, lora, probe):
    model = make_model(precision=Precision.W4A4)
    base = copy.deepcopy(model).to(dtype)
    untouched, fresh = probe.snapshot(base), copy.deepcopy(base)
    qwenlora.compose_loras(fresh, lora[0])
    qwenlora.compose_loras(model, lora[0])
    model.to(dtype)
    assert probe.snapshot(model).differences(probe.snapshot(fresh)) == []
    assert torch.isfinite(probe.output(model)).all()
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(untouched) == []


def test_callers_in_inference_mode(model, lora, probe):
    untouched = probe.snapshot(model)
    with torch.inference_mode():
        qwenlora.compose_loras(model, [lora[0], (dict(lora[1].tensors), 0.5)])
        tensors = [tensor for _, tensor in probe.tensors(model)]
        assert not any(tensor.is_inference() for tensor in tensors)
        assert not any(pair.up.is_inference() for pair in cache.pieces._pairs.values())
    probe.assert_holds(model, [(lora[1], 1.5)], within=EXACT)
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(untouched) == []


def test_models_made_in_inference_mode(make_model, lora, probe):
    with torch.inference_mode():
        model = make_model()
    untouched, output = probe.snapshot(model), probe.output(model)
    parameters = dict(model.named_parameters())
    fresh = make_model()
    qwenlora.compose_loras(fresh, lora[0])
    for strength in (0.5, 1.0):
        qwenlora.compose_loras(model, (lora[0], strength))
    assert probe.snapshot(model).differences(probe.snapshot(fresh)) == []
    assert torch.equal(probe.output(model), probe.output(fresh))
    twin = copy.deepcopy(model)
    qwenlora.reset_loras(twin)
    qwenlora.reset_loras(model)
    for reset in (model, twin):
        assert probe.snapshot(reset).differences(untouched) == []
        assert torch.equal(probe.output(reset), output)
    assert list(dict(model.named_parameters())) == list(parameters)


def test_state_dicts_of_inference_tensors(model, lora, probe):
    draft = lora[1]
    with torch.inference_mode():
        tensors = {key: tensor.clone() for key, tensor in draft.tensors.items()}
        qwenlora.compose_loras(model, tensors)
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)
    assert not any(tensor.is_inference() for _, tensor in probe.tensors(model))


def test_a_state_dict_changed_in_place_is_another_lora(model, probe, Draft):
    draft = Draft(1).add("proj_out", 4)
    report = qwenlora.compose_loras(model, draft.tensors)
    assert qwenlora.compose_loras(model, dict(draft.tensors)) is report
    draft.tensors[draft.key("proj_out", "up")].mul_(3.0)
    assert qwenlora.compose_loras(model, draft.tensors) is not report
    probe.assert_holds(model, [(draft, 3.0)], within=EXACT)


def test_state_dicts_are_not_written_to(model, lora):
    before = {key: tensor.clone() for key, tensor in lora[1].tensors.items()}
    qwenlora.compose_loras(model, [(lora[1].tensors, 0.5), (lora[1].tensors, 2.0)])
    assert all(torch.equal(lora[1].tensors[key], before[key]) for key in before)


def test_state_dicts_that_require_gradients(model, probe, Draft):
    draft = Draft.full(seed=2)
    tensors = {key: t.clone().requires_grad_() for key, t in draft.tensors.items()}
    qwenlora.compose_loras(model, tensors)
    probe.assert_holds(model, [(draft, 1.0)], within=EXACT)
    assert not any(buffer.requires_grad for buffer in model.buffers())


# ---- forward ----


@pytest.mark.parametrize("target", ["proj_out", f"{BLOCK}.img_mod.1", f"{BLOCK}.attn.to_q"])
def test_each_kind_of_slot_changes_the_output(target, model, probe, Draft):
    before = probe.output(model)
    draft = Draft(1).add(target, 4)
    qwenlora.compose_loras(model, (draft.tensors, 4.0))
    strong = probe.output(model) - before
    assert strong.norm() > 1e-3 * before.norm()
    qwenlora.compose_loras(model, (draft.tensors, 1e-3))
    assert 0 < (probe.output(model) - before).norm() < 1e-2 * strong.norm()


def test_layers_add_the_delta_of_their_input(model, lora, probe):
    base = copy.deepcopy(model)
    qwenlora.compose_loras(model, lora[0])
    for path in ("img_in", f"{BLOCK}.attn.to_qkv", f"{BLOCK}.txt_mod.1"):
        layer, plain = model.get_submodule(path), base.get_submodule(path)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            change = layer(x) - plain(x)
        delta = probe.delta(model, path)
        if "mod" in path:  # the layer's rows are interleaved: (C, 6) -> (6, C)
            change = change.view(3, -1, 6).transpose(1, 2).reshape(3, -1)
        assert torch.allclose(change.double(), x.double() @ delta.T, atol=1e-5)


def test_side_branches_take_keyword_arguments(model, Draft):
    draft = Draft(1).add("img_in", 4)
    qwenlora.compose_loras(model, draft.tensors)
    x = torch.ones(1, 64)
    with torch.no_grad():
        assert torch.equal(model.img_in(input=x), model.img_in(x))
        assert not torch.equal(model.img_in(input=x), torch.nn.Linear.forward(model.img_in, x))


def test_side_branches_are_not_saved(model, lora):
    keys = list(model.state_dict())
    qwenlora.compose_loras(model, lora[0])
    assert list(model.state_dict()) == keys


def test_other_hooks_stay(model, lora, probe):
    seen = []
    handle = model.proj_out.register_forward_hook(lambda *_: seen.append(1))
    before = probe.snapshot(model)
    qwenlora.compose_loras(model, lora[0])
    qwenlora.reset_loras(model)
    assert probe.snapshot(model).differences(before) == []
    probe.output(model)
    assert seen == [1]
    handle.remove()


# ---- slots that share an offload buffer ----


def _offloaded(find):
    """Targets as they would be under offload: every block's slots share one buffer."""

    def found(model, base_ranks):
        targets = find(model, base_ranks)
        return {
            path: replace(t, row=replace(t.row, offloaded=path.startswith("transformer_blocks.")))
            for path, t in targets.items()
        }

    return found


def test_offloaded_slots_are_planned_in_groups(make_model, Draft):
    model = make_model(num_layers=3)
    draft = Draft(1).add("transformer_blocks.0.attn.to_q", 20)
    draft.add("transformer_blocks.2.attn.to_k", 40).add("transformer_blocks.1.txt_mod.1", 5)
    draft.add("proj_out", 3)
    rows = [vars(t.row) for t in _offloaded(find_targets)(model, {}).values()]
    tensors = [(k, "F32", list(t.shape), t.nbytes) for k, t in draft.tensors.items()]
    plan = _core.FilePlan.from_tensors("x", tensors, scalars=[None] * len(tensors), metadata=[])
    options = {"max_rank": None, "strict": False, "modulation": True}
    document = _core.plan_stack([("x", plan, 1.0)], json.dumps(rows), json.dumps(options))
    stack = StackPlan.from_json(document)
    groups = {group.pattern: group for group in stack.groups}
    assert {name: group.rank for name, group in groups.items()} == {
        "transformer_blocks.*.attn.to_qkv": 48,
        "transformer_blocks.*.txt_mod.1": 16,
    }
    qkv = groups["transformer_blocks.*.attn.to_qkv"]
    assert qkv.slots == tuple(f"transformer_blocks.{n}.attn.to_qkv" for n in range(3))
    assert {slot.path: slot.group is None for slot in stack.slots}["proj_out"]
    added = 4 * (3 * 48 * (128 + 384) + 3 * 16 * (128 + 768) + 16 * (128 + 64))
    assert stack.added_bytes == added


def test_offloaded_slots_get_one_rank_per_path(make_model, probe, Draft, monkeypatch):
    model = make_model(num_layers=3)
    untouched = probe.snapshot(model)
    monkeypatch.setattr(compose, "find_targets", _offloaded(compose.find_targets))
    draft = Draft(1).add("transformer_blocks.0.attn.to_q", 20)
    draft.add("transformer_blocks.2.attn.to_k", 40).add("transformer_blocks.1.txt_mod.1", 5)
    draft.add("proj_out", 3)
    for placement in (qwenlora.Placement.BY_PATH, qwenlora.Placement.WHOLE):
        options = ComposeOptions(placement=placement)
        report = qwenlora.compose_loras(model, draft.tensors, options=options)
        added = {slot.path: slot.rank_added for slot in report.slots}
        assert added == {
            **{f"transformer_blocks.{n}.attn.to_qkv": 48 for n in range(3)},
            **{f"transformer_blocks.{n}.txt_mod.1": 16 for n in range(3)},
            "proj_out": 3,
        }
        probe.assert_holds(model, [(draft, 1.0)], within=EXACT)
        assert probe.delta(model, "transformer_blocks.1.attn.to_qkv").norm() == 0
        # Buffers of equal shapes and order on every block: offload copies them by position.
        shapes = [
            [(name, t.shape) for name, t in probe.tensors(block)]
            for block in model.transformer_blocks
        ]
        assert shapes[0] == shapes[1] == shapes[2]
        qwenlora.reset_loras(model)
        assert probe.snapshot(model).differences(untouched) == []


# ---- names of the earlier loader ----


def test_compat(model, lora, probe):
    untouched = probe.snapshot(model)
    configs = [(lora[0], 0.5), (str(lora[0]), 0.25, {"save_precompiled": True})]
    assert compat.compose_loras_v2(model, configs) is True
    probe.assert_holds(model, [(lora[1], 0.75)], within=EXACT)
    compat.compose_loras_v2(model, configs, apply_awq_mod=False, cache_dir="x")
    assert probe.delta(model, f"{BLOCK}.img_mod.1").norm() == 0
    assert compat.reset_lora_v2(model) is None
    assert probe.snapshot(model).differences(untouched) == []
    with pytest.raises(errors.LoraReadError):
        compat.compose_loras_v2(model, [("missing.safetensors", 1.0)])
