"""The command `qwenlora norms`, its files, and who reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwenlora import cli
from qwenlora.errors import (
    LoraFileError,
    LoraNotFoundError,
    LoraReadError,
    NonFiniteError,
    NormsFileError,
    OtherModelError,
    PickleFileError,
    ShapeMismatchError,
    UnknownWeightError,
)
from qwenlora.norms import job, modules
from qwenlora.norms.job import write_norms
from qwenlora.source.norms_file import METADATA, NormsFile

QKV = ("layers.0.attention.to_q", "layers.0.attention.to_k", "layers.0.attention.to_v")
KNOWN = {
    "qwen-image": {
        "transformer_blocks.0.attn.to_q": (("transformer_blocks.0.attn.to_q",), (24, 16)),
        "transformer_blocks.0.img_mod.1": (("transformer_blocks.0.img_mod.1",), (96, 16)),
        "proj_out": (("proj_out",), (8, 16)),
    },
    "z-image": {
        "layers.0.attention.to_qkv": (QKV, (16, 16)),
        **{part: ((part,), (16, 16)) for part in QKV},
        "layers.0.attention.to_out.0": (("layers.0.attention.to_out.0",), (16, 16)),
        "all_x_embedder.2-1": (("all_x_embedder.2-1",), (16, 8)),
    },
}
"""Models of few weights."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qwen(prefix: str = "", dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """All weights of the small Qwen-Image, and others that have no norms."""
    weights = {
        f"{prefix}{path}.weight": randn(*sides, seed=at, dtype=dtype)
        for at, (path, (_, sides)) in enumerate(KNOWN["qwen-image"].items())
    }
    return {
        **weights,
        f"{prefix}proj_out.bias": randn(8, dtype=dtype),
        f"{prefix}txt_norm.weight": randn(16, dtype=dtype),
    }


@pytest.fixture
def output(tmp_path):
    return tmp_path / "norms.safetensors"


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def assert_norms(file: NormsFile, module: str, weight: torch.Tensor) -> None:
    squares = weight.double().square()
    for found, dim in ((file.row_norms(module), 1), (file.column_norms(module), 0)):
        assert found is not None
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, squares.sum(dim=dim), rtol=3e-7, atol=0)


# ---- values ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_norms_are_exact(tmp_path, output, dtype, prefix, monkeypatch):
    # Pieces of a few rows.
    monkeypatch.setattr(job, "_PANEL_BYTES", 7 * 16 * dtype.itemsize)
    weights = qwen(prefix, dtype)
    source = saved(tmp_path / "model.safetensors", weights)
    report = write_norms(source, output, known=KNOWN)
    assert (report.model, report.modules, report.missing) == ("qwen-image", 3, ())
    assert report.size_bytes == output.stat().st_size
    file = NormsFile.open(output)
    assert (file.model, file.source) == ("qwen-image", "model.safetensors")
    for module in KNOWN["qwen-image"]:
        assert_norms(file, module, weights[f"{prefix}{module}.weight"])
    assert file.row_norms("txt_norm") is None
    assert file.column_norms("transformer_blocks.1.attn.to_q") is None


def test_the_file_says_what_it_is(tmp_path, output):
    source = saved(tmp_path / "model.safetensors", qwen())
    write_norms(source, output, known=KNOWN)
    with safe_open(output, "pt") as file:
        entry = json.loads(file.metadata()[METADATA])
    size = source.stat().st_size
    assert entry["source"] == {"name": "model.safetensors", "size_bytes": size}
    assert (entry["schema"], entry["model"]) == (1, "qwen-image")
    found = load_file(output)
    assert {own.dtype for own in found.values()} == {torch.float32}
    assert found["proj_out.row_norms"].shape == (8,)
    assert found["proj_out.column_norms"].shape == (16,)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_fused_query_key_and_value_is_split(tmp_path, output, rows, monkeypatch):
    monkeypatch.setattr(job, "_PANEL_BYTES", rows * 16 * 2)
    weights = {
        "layers.0.attention.qkv.weight": randn(48, 16, seed=1),
        "layers.0.attention.out.weight": randn(16, 16, seed=2),
        "x_embedder.weight": randn(16, 8, seed=3),
    }
    report = write_norms(saved(tmp_path / "z.safetensors", weights), output, known=KNOWN)
    assert (report.model, report.modules, report.complete) == ("z-image", 5, True)
    file = NormsFile.open(output)
    for part, weight in zip(QKV, weights["layers.0.attention.qkv.weight"].split(16), strict=True):
        assert_norms(file, part, weight)
    assert_norms(file, "layers.0.attention.to_out.0", weights["layers.0.attention.out.weight"])
    assert_norms(file, "all_x_embedder.2-1", weights["x_embedder.weight"])


def test_released_models_have_norms_of_every_linear():
    qwen, z_image = (modules.known_sides(model) for model in modules.MODELS)
    parts = {part for parts, _ in qwen.values() for part in parts}
    assert len(parts) == 60 * 14 + 6
    assert qwen["transformer_blocks.59.img_mod.1"][1] == (18432, 3072)
    assert qwen["transformer_blocks.0.attn.to_qkv"][1] == (3072, 3072)
    parts = {part for parts, _ in z_image.values() for part in parts}
    assert len(parts) == 30 * 8 + 2 * 8 + 2 * 7 + 6
    assert z_image["layers.29.feed_forward.w2"][1] == (3840, 10240)


# ---- checkpoints in several files ----


def sharded(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Two files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"diffusion_pytorch_model-0000{at}-of-00002.safetensors" for at in (1, 2)]
    keys = list(weights)
    places = {key: names[at % 2] for at, key in enumerate(keys)}
    for name in names:
        saved(folder / name, {key: weights[key] for key in keys if places[key] == name})
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("named", ["index", "folder", "pipeline"])
def test_several_files_are_one_checkpoint(tmp_path, output, named):
    weights = qwen()
    folder = tmp_path / "pipeline" / "transformer"
    index = sharded(folder, weights)
    source = {"index": index, "folder": folder, "pipeline": folder.parent}[named]
    report = write_norms(source, output, known=KNOWN)
    assert report.complete
    for module in KNOWN["qwen-image"]:
        assert_norms(NormsFile.open(output), module, weights[f"{module}.weight"])


def test_a_folder_with_one_file(tmp_path, output):
    folder = tmp_path / "transformer"
    folder.mkdir()
    saved(folder / "diffusion_pytorch_model.safetensors", qwen())
    assert write_norms(folder, output, known=KNOWN).complete


def _lost(index):
    sorted(index.parent.glob("*-of-*"))[1].unlink()
    return LoraNotFoundError, "00002-of-00002"


def _swapped(index):
    one, other = sorted(index.parent.glob("*-of-*"))
    saved(other, {"other.weight": randn(4, 4)})
    assert one.exists()
    return LoraFileError, "which has it not"


def _twice(index):
    one, other = sorted(index.parent.glob("*-of-*"))
    other.write_bytes(one.read_bytes())
    return LoraFileError, "both have"


def _elsewhere(index):
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    return LoraFileError, "is no file of a checkpoint"


def _pickled_part(index):
    index.write_text(json.dumps({"weight_map": {"a": "model.bin"}}))
    return LoraFileError, "is no file of a checkpoint"


def _no_map(index):
    index.write_text("[]")
    return LoraFileError, "has no `weight_map`"


def _no_text(index):
    index.write_text(json.dumps({"weight_map": {"a": 3}}))
    return LoraFileError, "no text"


def _no_json(index):
    index.write_text("[" * 100_000)
    return LoraFileError, "is no JSON"


def _endless(index):
    with index.open("r+b") as file:
        file.truncate(40 << 20)
    return LoraFileError, "is no index"


INDEX_FAULTS = (
    _lost,
    _swapped,
    _twice,
    _elsewhere,
    _pickled_part,
    _no_map,
    _no_text,
    _no_json,
    _endless,
)


@pytest.mark.parametrize("damage", INDEX_FAULTS)
def test_files_that_contradict_their_index(tmp_path, output, damage):
    index = sharded(tmp_path / "model", qwen())
    error, words = damage(index)
    with pytest.raises(error, match=words):
        write_norms(index, output, known=KNOWN)
    assert not output.exists()


def test_folders_that_do_not_tell(tmp_path, output):
    with pytest.raises(LoraFileError, match="no file in safetensors"):
        write_norms(tmp_path, output, known=KNOWN)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(PickleFileError, match="pickles only"):
        write_norms(tmp_path, output, known=KNOWN)
    for name in ("a", "b"):
        saved(tmp_path / f"{name}.safetensors", qwen())
    with pytest.raises(LoraFileError, match="2 files in safetensors"):
        write_norms(tmp_path, output, known=KNOWN)


# ---- what is refused ----


def test_a_part_that_is_missing_is_named(tmp_path, output):
    weights = qwen()
    del weights["proj_out.weight"]
    report = write_norms(saved(tmp_path / "m.safetensors", weights), output, known=KNOWN)
    assert report.missing == ("proj_out",)
    assert not report.complete


def _foreign(weights):
    weights.clear()
    weights["double_blocks.0.img_attn.qkv.weight"] = randn(48, 16)
    return OtherModelError, "no model that is known"


def _other_shape(weights):
    weights["proj_out.weight"] = randn(8, 17)
    return ShapeMismatchError, r"\(8, 17\), the model's weight \(8, 16\)"


def _eight_bits(weights):
    weights["proj_out.weight"] = weights["proj_out.weight"].to(torch.float8_e4m3fn)
    return UnknownWeightError, "`proj_out.weight` is F8_E4M3"


def _packed(weights):
    weights["proj_out.weight"] = torch.zeros(8, 16, dtype=torch.int8)
    return UnknownWeightError, "`proj_out.weight` is I8"


def _infinite(weights):
    weights["proj_out.weight"][3, 4] = float("inf")
    return NonFiniteError, "`proj_out.weight`"


@pytest.mark.parametrize("change", [_foreign, _other_shape, _eight_bits, _packed, _infinite])
def test_a_checkpoint_that_is_refused(tmp_path, output, change):
    weights = qwen()
    error, words = change(weights)
    source = saved(tmp_path / "m.safetensors", weights)
    with pytest.raises(error, match=words):
        write_norms(source, output, known=KNOWN)
    assert sorted(own.name for own in tmp_path.iterdir()) == ["m.safetensors"]


def test_a_file_that_was_cut_short(tmp_path, output):
    source = saved(tmp_path / "m.safetensors", qwen())
    source.write_bytes(source.read_bytes()[:-4])
    with pytest.raises(LoraFileError):
        write_norms(source, output, known=KNOWN)
    assert not output.exists()


def test_a_file_that_changes_while_it_is_read(tmp_path, output):
    source = saved(tmp_path / "m.safetensors", qwen())

    def progress(_done, _all):
        os.utime(source, ns=(1, time.time_ns()))

    with pytest.raises(LoraReadError, match="changed"):
        write_norms(source, output, known=KNOWN, progress=progress)
    assert not output.exists()


# ---- reading ----


def test_norms_of_another_model_or_length_are_refused(tmp_path, output):
    write_norms(saved(tmp_path / "m.safetensors", qwen()), output, known=KNOWN)
    file = NormsFile.open(output)
    file.require_model("qwen-image")
    with pytest.raises(OtherModelError, match="of qwen-image, not z-image"):
        file.require_model("z-image")
    assert file.row_norms("proj_out", length=8) is not None
    with pytest.raises(NormsFileError, match=r"`proj_out\.column_norms` has 16 norms"):
        file.column_norms("proj_out", length=3072)


def test_a_file_that_changed_since_it_was_opened(tmp_path, output):
    write_norms(saved(tmp_path / "m.safetensors", qwen()), output, known=KNOWN)
    file = NormsFile.open(output)
    os.utime(output, ns=(1, 1))
    with pytest.raises(LoraReadError, match="changed"):
        file.row_norms("proj_out")


ENTRY = {"schema": 1, "model": "qwen-image", "source": {"name": "m"}}


@pytest.mark.parametrize(
    ("metadata", "norms", "words"),
    [
        (None, torch.ones(4), "is no file of norms"),
        ({"format": "pt"}, torch.ones(4), "is no file of norms"),
        ({METADATA: "{"}, torch.ones(4), "damaged"),
        ({METADATA: "[" * 100_000}, torch.ones(4), "damaged"),
        ({METADATA: "{}"}, torch.ones(4), "damaged"),
        ({METADATA: json.dumps({**ENTRY, "schema": 2})}, torch.ones(4), "another version"),
        ({METADATA: json.dumps({**ENTRY, "model": 3})}, torch.ones(4), "lacks model or source"),
        ({METADATA: json.dumps({**ENTRY, "source": "m"})}, torch.ones(4), "lacks model"),
        ({METADATA: json.dumps(ENTRY)}, torch.ones(2, 2), "no norms"),
        ({METADATA: json.dumps(ENTRY)}, torch.ones(4).half(), "no norms"),
    ],
)
def test_a_file_that_is_none_of_norms(output, metadata, norms, words):
    save_file({"proj_out.row_norms": norms}, output, metadata)
    with pytest.raises(NormsFileError, match=words):
        NormsFile.open(output)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_value_that_is_no_norm(output, value):
    norms = torch.ones(4)
    norms[2] = value
    save_file({"proj_out.row_norms": norms}, output, {METADATA: json.dumps(ENTRY)})
    with pytest.raises(NormsFileError, match="holds what is no norm"):
        NormsFile.open(output).row_norms("proj_out")


def test_no_file_of_norms(tmp_path):
    with pytest.raises(LoraNotFoundError):
        NormsFile.open(tmp_path / "none.safetensors")


# ---- the command ----


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs the command in a folder with a part of a real model."""
    monkeypatch.chdir(tmp_path)
    weights = {"proj_out.weight": randn(64, 3072), "img_in.weight": randn(3072, 64, seed=1)}
    saved(tmp_path / "part.safetensors", weights)

    def run(*args):
        status = cli.main(["norms", *map(str, args)])
        out, err = capfd.readouterr()
        return int(status), out, err

    return run


def test_a_screen(run, tmp_path):
    status, out, err = run("part.safetensors")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[0] == "PARTIAL     part.norms.safetensors"
    assert lines[1] == "  model     qwen-image, 2 modules"
    assert lines[2].startswith("  missing   844 modules, e.g. transformer_blocks.0.")
    assert lines[3].startswith("  file      ")
    file = NormsFile.open(tmp_path / "part.norms.safetensors")
    assert_norms(file, "proj_out", load_file("part.safetensors")["proj_out.weight"])


def test_json(run):
    status, out, _ = run("part.safetensors", "-o", "n.safetensors", "--json")
    report = json.loads(out)
    assert status == 1
    assert (report["schema"], report["complete"], report["modules"]) == (1, False, 2)
    assert (report["model"], report["path"]) == ("qwen-image", "n.safetensors")


def test_a_file_is_replaced_only_by_force(run, tmp_path):
    (tmp_path / "n.safetensors").write_bytes(b"mine")
    status, _, err = run("part.safetensors", "-o", "n.safetensors")
    assert status == 74
    assert "`--force` replaces it" in err
    assert (tmp_path / "n.safetensors").read_bytes() == b"mine"
    assert run("part.safetensors", "-o", "n.safetensors", "-f")[0] == 1
    assert run("part.safetensors", "-o", "part.safetensors", "-f")[0] == 74


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ((), 64, "no checkpoint is named"),
        (("a", "b"), 64, "one checkpoint at a time, got 2"),
        (("a", "--rank"), 64, "unknown option: `--rank`"),
        (("a", "-o"), 64, "`-o` needs a value"),
        (("a", "-o", "n.bin"), 64, "does not end in .safetensors"),
        (("a", "--json=1"), 64, "takes no value"),
        (("missing.safetensors",), 3, "missing.safetensors"),
        (("part.safetensors", "-o", "none/n.safetensors"), 74, "there is no folder"),
    ],
)
def test_what_makes_no_sense(run, args, status, words):
    found, out, err = run(*args)
    assert (found, out) == (status, "")
    assert err.startswith("error: ")
    assert words in err


def test_another_model_is_rejected(run, tmp_path):
    saved(tmp_path / "flux.safetensors", {"double_blocks.0.img_mlp.0.weight": randn(4, 4)})
    status, _, err = run("flux.safetensors")
    assert status == 2
    assert "no model that is known" in err
    assert not (tmp_path / "flux.norms.safetensors").exists()


def test_help(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.slow
def test_the_program(run, tmp_path):
    command = [sys.executable, "-c", "import sys; from qwenlora.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*command, "norms", "part.safetensors"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert (tmp_path / "part.norms.safetensors").exists()
