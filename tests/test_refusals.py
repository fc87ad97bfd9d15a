"""What raises, what is reported, and that the model is untouched by either."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

import qwenlora
from qwenlora import ComposeOptions, Placement, emulation, errors
from qwenlora.slots.branch import BRANCH_DOWN

if TYPE_CHECKING:
    from pathlib import Path

EXACT = 2e-6
"""Relative error of float32 tensors against float64 formulas."""

BLOCK = "transformer_blocks.0"


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _unusable(folder: Path, Draft):
    """(source, error, words of its message) by name."""
    pickle = folder / "pickle.safetensors"
    torch.save({"x": torch.zeros(2)}, pickle)
    pickled = folder / "pickled"
    pickled.mkdir()
    torch.save({"x": torch.zeros(2)}, pickled / "adapter_model.bin")
    archive = folder / "zip.safetensors"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("style.safetensors", b"none of this is read")
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
    hira = Draft(1).put(f"{BLOCK}.attn.to_q", "hira_A", 4, 128)
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
        "pickled folder": (pickled, errors.PickleFileError, "`adapter_model.bin`"),
        "zip": (archive, errors.LoraFileError, "a zip archive.*: it holds `style.safetensors`"),
        "a site's message": (
            _write(folder / "t.safetensors", b"Invalid username or password."),
            errors.LoraFileError,
            "plain text.*`Invalid username",
        ),
        "FLUX": (flux.tensors, errors.OtherModelError, "FLUX"),
        "Z-Image": (
            z_image,
            errors.OtherModelError,
            "a Z-Image LoRA, and the model is Qwen-Image",
        ),
        "other widths": (wide, errors.OtherModelError, "to_q"),
        "no module": (unknown, errors.OtherModelError, "something.else"),
        "no tensor": ({}, errors.OtherModelError, "no tensor"),
        "only unsupported": (hira.tensors, errors.NothingToApplyError, "HiRA"),
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


@pytest.mark.in_turn("name")
@pytest.mark.parametrize(
    "name",
    [
        *("missing", "folder", "empty", "malformed", "header beyond the file", "pickle", "FLUX"),
        *("Z-Image", "other widths", "no module", "no tensor", "only unsupported", "zip"),
        *("infinite alpha", "not tensors", "complex", "a site's message", "pickled folder"),
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


@pytest.mark.in_turn("bad", "half", "target")
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


@pytest.mark.slow
@pytest.mark.in_turn("dtype", "bad")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("placement", [Placement.WHOLE, Placement.BY_PATH])
def test_a_damaged_file_is_refused_each_time(
    dtype, bad, offloaded, placement, make_model, probe, Draft, tmp_path
):
    """The slot with the damage is named, whatever else is being filled, and nothing is applied."""
    model = make_model(num_layers=3, dtype=dtype)
    if offloaded:
        model.set_offload(True)
    before = probe.snapshot(model)
    draft = Draft(1)
    for block in range(3):
        for name in ("attn.to_q", "img_mlp.net.2", "txt_mlp.net.0.proj"):
            draft.add(f"transformer_blocks.{block}.{name}", 4)
    draft.tensors[draft.key("transformer_blocks.2.img_mlp.net.2", "up")][5, 1] = bad
    path = draft.save(tmp_path / "damaged.safetensors")
    options = ComposeOptions(placement=placement)
    for _ in range(5):
        qwenlora.clear_cache()
        with pytest.raises(
            errors.NonFiniteError, match=r"`transformer_blocks\.2\.img_mlp\.net\.2`"
        ):
            qwenlora.compose_loras(model, path, options=options)
        qwenlora.reset_loras(model)
        assert probe.snapshot(model).differences(before) == []


@pytest.mark.parametrize("offloaded", [False, True])
def test_strengths_that_just_fit_are_applied_each_time(
    offloaded, make_model, probe, Draft, tmp_path
):
    model = make_model(num_layers=3, dtype=torch.float16)
    if offloaded:
        model.set_offload(True)
    draft = Draft(1)
    for block in range(3):
        draft.add(f"transformer_blocks.{block}.attn.to_q", 4, up=torch.full((128, 4), 100.0))
    path = draft.save(tmp_path / "large.safetensors")
    for _ in range(5):
        qwenlora.clear_cache()
        qwenlora.compose_loras(model, (path, 600.0))
        probe.assert_holds(model, [(draft, 600.0)], within=2e-3)
        with pytest.raises(errors.NonFiniteError, match=r"attn\.to_qkv.*float16"):
            qwenlora.compose_loras(model, (path, 700.0))
        qwenlora.reset_loras(model)


@pytest.mark.in_turn("not_a_model")
@pytest.mark.parametrize("not_a_model", [None, "model", {}, torch.zeros(1), object()])
def test_what_is_no_model(not_a_model, lora):
    for loras in (lora[0], []):
        with pytest.raises(errors.UnsupportedModelError, match="expected a transformer module"):
            qwenlora.compose_loras(not_a_model, loras)


def test_models_without_slots(lora):
    for other in (torch.nn.Linear(8, 8), torch.nn.Sequential()):
        with pytest.raises(errors.UnsupportedModelError, match="has no SVDQuant layer"):
            qwenlora.compose_loras(other, lora[0])
        assert issubclass(errors.UnsupportedModelError, TypeError)


@pytest.mark.in_turn("change")
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
        draft.put(target, "hira_A", 4, 128)
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


@pytest.mark.in_turn("kind")
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


@pytest.mark.in_turn("reason", "tensors", "target")
@pytest.mark.parametrize(
    ("reason", "tensors"),
    [
        ("AdaLoRA is not supported: ", {"lora_A": (4, 128), "lora_B": (128, 4), "lora_E": (4, 1)}),
        ("HiRA is not supported: ", {"hira_A": (4, 128), "hira_B": (128, 4)}),
        ("PEFT's BOFT of 2 butterfly factors ", {"boft_R": (2, 4, 32, 32), "boft_s": (128, 1)}),
        ("`set_weight` is not supported on a quantized layer", {"set_weight": (128, 128)}),
    ],
    ids=["adalora", "hira", "boft", "set_weight"],
)
@pytest.mark.parametrize("target", [f"{BLOCK}.attn.to_add_out", f"{BLOCK}.attn.to_q"])
def test_unsupported_adapters_are_named_and_never_applied(
    reason, tensors, target, model, probe, Draft
):
    draft = Draft(1).add("proj_out", 4)
    for role, shape in tensors.items():
        draft.put(target, role, *shape)
    report = qwenlora.compose_loras(model, draft.tensors)
    (skip,) = [skip for skip in report.loras[0].skipped if skip.matters]
    assert (skip.name, skip.kind) == (target, "unsupported")
    assert skip.reason.startswith(reason)
    assert [slot.path for slot in report.slots] == ["proj_out"]
    assert probe.delta(model, target.replace("to_q", "to_qkv")).norm() == 0


@pytest.mark.usefixtures("diffusers", "workers")
@pytest.mark.parametrize("workers", ["rust"], indirect=True)
def test_a_lora_of_the_other_model_is_refused_by_name(Draft):
    z_image = emulation.z_image_transformer(
        emulation.tiny_z_image(layers=1),
        form=emulation.ZImageForm.FUSED,
        rank=16,
        precision=emulation.Precision.EXACT,
        dtype=torch.float32,
    )
    before = {name: tensor.clone() for name, tensor in z_image.state_dict().items()}
    real = {
        "transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(4, 3072),
        "transformer_blocks.7.attn.to_q.lora_B.weight": torch.ones(3072, 4),
    }
    tiny = Draft(1).add(f"{BLOCK}.attn.to_q", 4).tensors
    with pytest.raises(errors.OtherModelError, match="a Qwen-Image LoRA, and the model is Z-Image"):
        qwenlora.compose_loras(z_image, real)
    with pytest.raises(errors.NothingToApplyError, match="the model has no such module"):
        qwenlora.compose_loras(z_image, tiny)
    after = z_image.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
