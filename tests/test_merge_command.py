"""The command `qwenlora merge`: arguments, screens, exit statuses, and what an error leaves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwenlora import cli, merge
from qwenlora.merge import arguments
from qwenlora.merge.talk import Talk

PROGRAM = Path(sys.executable).with_name("qwenlora")


def write_lora(path: Path, modules=("proj_out",), *, rank: int = 4, seed: int = 0, **extra) -> Path:
    """A LoRA of real sizes under keys of a trainer."""
    sizes = {"proj_out": (64, 3072), "img_in": (3072, 64), "txt_in": (3072, 3584)}
    sizes |= {"x_embedder": (3840, 64), "t_embedder.mlp.0": (1024, 256)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        out, columns = sizes[name]
        down = 0.05 * torch.randn(rank, columns, generator=generator)
        tensors[f"{name}.lora_A.weight"] = down.bfloat16()
        up = 0.05 * torch.randn(out, rank, generator=generator)
        tensors[f"{name}.lora_B.weight"] = up.bfloat16()
    tensors |= {key.replace("__", "."): value for key, value in extra.items()}
    save_file(tensors, path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with two LoRAs."""
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "a.safetensors", ("proj_out", "img_in"), seed=1)
    write_lora(tmp_path / "b.safetensors", ("proj_out",), rank=8, seed=2)
    return tmp_path


@pytest.fixture
def run(folder, capfd):
    """Runs the command; status, standard output and error, the time and paths made constant."""

    def run(*args):
        status = cli.main(["merge", *map(str, args)])
        out, err = capfd.readouterr()
        out = re.sub(r"in \d+\.\d s", "in [time]", out)
        return int(status), out.replace(str(folder), "[dir]"), err.replace(str(folder), "[dir]")

    return run


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- arguments ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-.5", ("a.safetensors", -0.5)),
        ("a.safetensors:+1e-2", ("a.safetensors", 0.01)),
        ("a.safetensors:2.", ("a.safetensors", 2.0)),
        (r"C:\loras\b.safetensors", (r"C:\loras\b.safetensors", 1.0)),
        (r"C:\loras\b.safetensors:0.5", (r"C:\loras\b.safetensors", 0.5)),
        ("C:/loras/b.safetensors:-1", ("C:/loras/b.safetensors", -1.0)),
        ("at 12:30.safetensors", ("at 12:30.safetensors", 1.0)),
        ("at 12:30.safetensors:0.5", ("at 12:30.safetensors", 0.5)),
        ("peft folder:0.25", ("peft folder", 0.25)),
        ("a:b:c:3", ("a:b:c", 3.0)),
        (":0.5", (":0.5", 1.0)) if os.name == "nt" else (":x", (":x", 1.0)),
    ],
)
def test_a_source_is_a_path_and_a_strength(text, expected):
    parsed = arguments.parse([text, "-o", "x.safetensors"])
    assert parsed.sources == [(Path(expected[0]), expected[1])]


@pytest.mark.skipif(os.name == "nt", reason="no such name there")
def test_a_name_that_ends_like_a_strength_is_a_name_where_it_is_a_file(folder):
    write_lora(folder / "v:2")
    assert arguments.parse(["v:2", "-o", "x.safetensors"]).sources == [(Path("v:2"), 1.0)]
    assert arguments.parse(["v:2:0.5", "-o", "x.safetensors"]).sources == [(Path("v:2"), 0.5)]


def test_options_in_any_place_and_form():
    parsed = arguments.parse(
        ["--rank=16", "a", "--output=x.safetensors", "-f", "--dtype", "bf16", "--diffs", "--", "-b"]
    )
    assert parsed.sources == [(Path("a"), 1.0), (Path("-b"), 1.0)]
    assert (parsed.rank, parsed.dtype, parsed.force, parsed.diffs) == (16, "bf16", True, True)
    assert parsed.output == Path("x.safetensors")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no file is named"),
        (["a.safetensors"], "where to is not said"),
        (["a.safetensors", "-o"], "`-o` needs a value"),
        (["a.safetensors", "-o", "x.pt"], "`x.pt` does not end in .safetensors"),
        (["a.safetensors", "-o", "x.safetensors", "--rank", "0"], "`--rank` is a whole number"),
        (["a.safetensors", "-o", "x.safetensors", "--rank", "-4"], "`--rank` is a whole number"),
        (["a.safetensors", "-o", "x.safetensors", "--energy", "99"], "`--energy` is a share above"),
        (["a.safetensors", "-o", "x.safetensors", "--energy", "nan"], "`--energy` is a share"),
        (["a.safetensors", "-o", "x.safetensors", "--dtype", "fp8"], "`--dtype` is bf16, fp16 or"),
        (["a.safetensors", "--lokr-scale=x"], "`--lokr-scale` is standard or network: `x`"),
        (["a.safetensors", "--force=1"], "`--force` takes no value: `1`"),
        (["a.safetensors", "--what"], "unknown option: `--what`"),
        (
            ["a.safetensors", "-o", "x.safetensors", "--rank", "4", "--energy", "0.9"],
            "`--rank` and `--energy` cannot be used together",
        ),
        (["a.safetensors:0", "-o", "x.safetensors"], "every strength is 0"),
        (["a.safetensors:0.8x", "-o", "x.safetensors"], "`0.8x` is no strength"),
        (["a.safetensors:", "-o", "x.safetensors"], "`` is no strength"),
        (["a.safetensors:1e999", "-o", "x.safetensors"], "`1e999` is no strength"),
        (["a.safetensors:nan", "-o", "x.safetensors"], "`nan` is no strength"),
        (["--blocks", "0:1", "a.safetensors"], "`--blocks` stands behind the file"),
        (["a.safetensors", "--blocks"], "`--blocks` needs a value"),
        (
            ["a.safetensors", "--blocks", "0:1", "--blocks=1:0"],
            "`--blocks` is given twice for `a.safetensors`",
        ),
        (
            ["a.safetensors", "--blocks", "0:1,\n1-2:x", "-o", "x.safetensors"],
            "`--blocks`: `x` at character 10 is no factor",
        ),
    ],
)
def test_arguments_that_make_no_sense(args, message, run, folder):
    before = listing(folder)
    status, out, err = run(*args)
    assert (status, out) == (64, "")
    first, hint = err.splitlines()
    assert first.startswith(f"error: {message}")
    assert hint.startswith("hint: ")
    assert listing(folder) == before


def test_help_teaches_and_fits_the_screen(run):
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    named = {*arguments._FLAGS, *arguments._VALUES, "--blocks"}
    assert named <= set(re.findall(r"--?[a-z-]+", out))
    codes = set(map(int, re.findall(r"^ +(\d+)  ", out, flags=re.MULTILINE)))
    assert codes == {0, 1, 2, 3, 64, 69, 74}
    assert {status.value for status in merge.Exit} == codes | {130}


def test_factors_are_for_the_file_before_them():
    args = ["a:0.5", "--blocks", "0-19:0.5; mod:0", "b", "c", "--blocks=0-59:1", "-o", "x.sft"]
    parsed = arguments.parse(args)
    assert [str(path) for path, _ in parsed.sources] == ["a", "b", "c"]
    assert {at: str(own) for at, own in parsed.blocks.items()} == {0: "0-19:0.5; mod:0", 2: ""}


# ---- screens ----


def test_the_screen_with_factors_by_block(run):
    status, out, err = run(
        "a.safetensors:0.8", "--blocks", "img: 1; rest:0.5, 70:0", "b.safetensors", "-o", "o.sft"
    )
    assert (status, err) == (0, "")
    assert (
        out
        == """\
MERGED       o.sft
             2 modules, exact to the rounding of BF16

  source     a x 0.8 (70:0; rest:0.5): 2 modules
  note       `blocks` names 70, but the model has the blocks 0 to 59
  source     b x 1: 1 module
  file       99.2 KiB, BF16, in [time]
  ranks      4 (1), 12 (1)
"""
    )
    found = load_file("o.sft")
    up = load_file("a.safetensors")["img_in.lora_B.weight"]
    expected = (up.float() * torch.tensor(0.4, dtype=torch.float32)).bfloat16()
    assert torch.equal(found["diffusion_model.img_in.lora_up.weight"], expected)


def test_the_screen_with_what_is_turned_off(run):
    status, out, err = run("a.safetensors", "--blocks=txt:0, img:0", "-o", "o.sft")
    assert (status, out) == (2, "")
    assert "nothing of `a` can be merged: its factors `img:0, txt:0` turn all of it off" in err
    status, out, _ = run("a.safetensors", "b.safetensors", "--blocks", "img:0", "-o", "o.sft")
    assert status == 2
    write_lora(Path("c.safetensors"), ("txt_in", "img_in"))
    status, out, _ = run("c.safetensors", "--blocks", "txt:0", "-o", "o.sft")
    assert status == 0
    assert "MERGED" in out
    assert "  turned off 1 of c: blocks or kinds of layer are turned off\n" in out


def test_the_screen_of_an_exact_merge(run, folder):
    status, out, err = run("a.safetensors:0.8", "b.safetensors:-0.5", "-o", "o.safetensors")
    assert (status, err) == (0, "")
    assert (
        out
        == """\
MERGED       o.safetensors
             2 modules, exact to the rounding of BF16

  source     a x 0.8: 2 modules
  source     b x -0.5: 1 module
  file       99.2 KiB, BF16, in [time]
  ranks      4 (1), 12 (1)
"""
    )
    assert listing(folder) == ["a.safetensors", "b.safetensors", "o.safetensors"]


def test_the_screen_of_a_truncation(run, folder):
    status, out, _ = run("b.safetensors", "-o", folder / "o.safetensors", "--rank", 2)
    assert status == 0
    assert (
        re.sub(r"\d+\.\d\d%", "[n]%", out)
        == """\
MERGED       [dir]/o.safetensors
             1 module; [n]% of the energy lost, at most [n]% (`proj_out`)

  source     b x 1: 1 module
  file       13.1 KiB, BF16, in [time]
  ranks      2
"""
    )


def test_the_screen_of_a_partial_merge(run, folder):
    write_lora(
        folder / "c.safetensors",
        ("proj_out", "img_in"),
        img_in__diff_b=torch.ones(3072),
        img_in__dora_scale=torch.ones(3072, 1),
        text_encoder__x__lora_A__weight=torch.ones(4, 4),
    )
    status, out, err = run("c.safetensors", "-o", "o.safetensors")
    assert (status, err) == (1, "")
    assert (
        out
        == """\
PARTIAL      o.safetensors
             1 module, exact to the rounding of BF16
  left out   1 of c: text encoder
    e.g.     text_encoder.x.lora_A.weight
  left out   1 of c: DoRA needs the base weight: `--base CHECKPOINT`
    e.g.     img_in
  left out   1 of c: a delta of a bias, norm or table, which diffusers refuses
             in a file (`--diffs`)
    e.g.     img_in.diff_b

  source     c x 1: 1 module
  file       25.3 KiB, BF16, in [time]
  ranks      4
"""
    )


def test_sources_of_one_name_are_told_apart(run, folder):
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
        write_lora(folder / name / "w.safetensors", seed=len(name))
    lost = {"lora_te_x.lora_down.weight": torch.ones(4, 4)}
    write_lora(folder / "dogs" / "w.safetensors", **lost)
    status, out, _ = run("cats/w.safetensors", "dogs/w.safetensors:0.5", "-o", "o.safetensors")
    assert status == 1
    assert "  left out   1 of dogs/w: text encoder\n" in out
    assert "  source     cats/w x 1: 1 module\n  source     dogs/w x 0.5: 1 module\n" in out
    tensors = load_file(folder / "dogs" / "w.safetensors")
    tensors["proj_out.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "dogs" / "w.safetensors")
    status, _, err = run("cats/w.safetensors", "dogs/w.safetensors", "-o", "p.safetensors")
    assert (status, err) == (3, "error: `proj_out`: a tensor of `dogs/w` holds NaN or infinity\n")
    only = {"proj_out.diff_b": torch.ones(64)}
    save_file(only, folder / "dogs" / "w.safetensors")
    status, _, err = run("cats/w.safetensors", "dogs/w.safetensors", "-o", "p.safetensors")
    assert (status, err[:33]) == (2, "error: nothing of `dogs/w` can be")


def test_what_is_no_loss_is_ignored(run, folder):
    write_lora(folder / "c.safetensors", _aux__0f1e=torch.ones(1))
    status, out, err = run("c.safetensors", "-o", "o.safetensors")
    assert (status, err) == (0, "")
    assert out.startswith("MERGED ")
    assert out.endswith("  ignored    1 of c: bookkeeping\n    e.g.     _aux.0f1e\n")


def test_the_screen_of_values(run, folder):
    write_lora(folder / "c.safetensors", ("img_in",), img_in__diff_b=torch.ones(3072).bfloat16())
    status, out, _ = run("c.safetensors", "-o", "o.safetensors")
    assert status == 1
    assert (
        """\
  left out   1 of c: a delta of a bias, norm or table, which diffusers refuses
             in a file (`--diffs`)
    e.g.     img_in.diff_b
"""
        in out
    )
    status, out, _ = run("c.safetensors", "-o", "p.safetensors", "--diffs")
    assert status == 0
    assert (
        """\
MERGED       p.safetensors
             1 module and 1 value, exact to the rounding of BF16
"""
        in out
    )
    assert (
        """\
  values     1, of biases, norms and tables: ComfyUI and qwenlora read them,
             diffusers refuses the file
"""
        in out
    )


def test_full_rank_is_said_before_the_work(run, folder):
    tensors = {"img_in.lokr_w1": torch.randn(8, 8), "img_in.lokr_w2": torch.randn(384, 8)}
    save_file(tensors, folder / "c.safetensors")
    status, _, err = run("c.safetensors", "-o", "o.safetensors")
    assert status == 0
    assert err == (
        "note: 1 module has full rank (lokr): written exactly, the file takes up to 784.0 KiB\n"
        "hint: `--energy 0.99` or `--rank 128` makes it smaller, and says what is lost\n"
    )


def test_json_is_one_line(run):
    status, out, _ = run("a.safetensors", "b.safetensors:0.5", "-o", "o.safetensors", "--json")
    (line,) = out.splitlines()
    document = json.loads(line)
    assert status == 0
    assert document["schema"] == 1
    assert document["complete"] is True
    assert [lora["strength"] for lora in document["loras"]] == [1.0, 0.5]
    assert {row["path"]: row["rank"] for row in document["modules"]} == {
        "proj_out": 12,
        "img_in": 4,
    }


# ---- metadata ----


def with_metadata(path: Path, **metadata: str) -> Path:
    """The file, with metadata; `__` stands for a dot in their names."""
    save_file(load_file(path), path, {k.replace("__", "."): v for k, v in metadata.items()})
    return path


def metadata_of(path: Path) -> tuple[dict[str, str], list[dict]]:
    """A merged file's own metadata, and its sources'."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    sources = json.loads(metadata.pop("qwenlora.merge"))["sources"]
    assert metadata.pop("format") == "pt"
    metadata.pop("lora_adapter_metadata", None)
    return metadata, [source.get("metadata", {}) for source in sources]


OWN = {
    "modelspec__trigger_phrase": "ohwx 人",
    "modelspec__title": "Style",
    "ss_training_comment": 'say "ohwx"',
    "ss_tag_frequency": '{"10_ohwx": {"ohwx": 10}}',
    "ss_base_model_version": "qwen_image",
}
STORED = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "1",
    "sshs_model_hash": "0123",
    "modelspec__hash_sha256": "0x4567",
}


def dotted(metadata: dict[str, str]) -> dict[str, str]:
    return {key.replace("__", "."): value for key, value in metadata.items()}


def test_one_sources_metadata_stay(run, folder):
    """All but what says how its tensors were stored."""
    with_metadata(folder / "a.safetensors", **OWN, **STORED, format="pt")
    status, out, _ = run("a.safetensors:0.5", "-o", "o.safetensors")
    assert status == 0
    assert metadata_of(folder / "o.safetensors") == (dotted(OWN), [dotted(STORED)])
    assert "  metadata   5 of the sources' entries kept, 5 listed in `qwenlora.merge`\n" in out
    run("a.safetensors", "-o", "p.safetensors", "--rank", 2)
    assert metadata_of(folder / "p.safetensors")[0] == dotted(OWN)


def test_of_several_sources_stays_what_they_agree_on(run, folder):
    other = {"modelspec__trigger_phrase": "zxcv, ohwx 人", "ss_base_model_version": "qwen_image"}
    with_metadata(folder / "a.safetensors", **OWN, **STORED)
    with_metadata(folder / "b.safetensors", **other, ss_training_comment="zxcv")
    status, out, _ = run("a.safetensors", "b.safetensors:0.5", "-o", "o.safetensors", "--json")
    own, listed = metadata_of(folder / "o.safetensors")
    assert status == 0
    assert own == {
        "ss_base_model_version": "qwen_image",
        "modelspec.trigger_phrase": "ohwx 人, zxcv",
    }
    # Every word of every source is somewhere.
    agreed = {"ss_base_model_version": "qwen_image"}
    assert {**listed[0], **agreed} == dotted({**OWN, **STORED})
    assert {**listed[1], **agreed} == dotted({**other, "ss_training_comment": "zxcv"})
    document = json.loads(out)
    assert set(document["metadata_kept"]) == set(own)
    assert [set(names) for names in document["metadata_listed"]] == [set(own) for own in listed]
    assert document["metadata_dropped"] == [[], []]


def test_what_is_subtracted_lends_no_words(run, folder):
    with_metadata(folder / "a.safetensors", **OWN)
    with_metadata(folder / "b.safetensors", modelspec__trigger_phrase="not this")
    run("a.safetensors", "b.safetensors:-0.5", "-o", "o.safetensors")
    own, listed = metadata_of(folder / "o.safetensors")
    assert own == {"modelspec.trigger_phrase": "ohwx 人"}
    assert listed[1] == {"modelspec.trigger_phrase": "not this"}


def test_the_metadata_of_a_merge_stay_through_another(run, folder):
    with_metadata(folder / "a.safetensors", **OWN, **STORED)
    run("a.safetensors", "-o", "o.safetensors")
    run("o.safetensors", "-o", "p.safetensors")
    own, (listed,) = metadata_of(folder / "p.safetensors")
    assert own == dotted(OWN)
    (first,) = json.loads(listed["qwenlora.merge"])["sources"]
    assert (first["name"], first["metadata"]) == ("a", dotted(STORED))


def test_metadata_without_end_are_named(run, folder, resize):
    resize(merge_metadata_bytes=2000)
    with_metadata(folder / "a.safetensors", **OWN, ss_datasets="x" * 3000)
    with_metadata(folder / "b.safetensors", modelspec__title="B", ss_datasets="y" * 3000)
    for sources in (["a.safetensors"], ["a.safetensors", "b.safetensors"]):
        status, out, _ = run(*sources, "-o", "o.safetensors", "--force")
        assert status == 0
        assert "             1 entry of a too long to keep, e.g. `ss_datasets`\n" in out
        own, (listed, *_) = metadata_of(folder / "o.safetensors")
        assert {**listed, **own}["modelspec.trigger_phrase"] == "ohwx 人"
        assert "ss_datasets" not in {**listed, **own}


# ---- exit statuses ----


@pytest.mark.parametrize(
    ("keys", "status"),
    [
        ((), 0),
        (("text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",), 1),
        (("lora_te_model_layers_0_mlp_up_proj.lora_down.weight",), 1),
        (("text_encoders.qwen25_7b.layers.0.mlp.up_proj.lora_A.weight",), 1),
        (("vae.decoder.conv_in.weight",), 1),
        (("bundle_emb.trigger.qwen_out",), 1),
        (("pipe.perceiver_resampler.latents",), 1),
        (("transformer_blocks.60.attn.to_q.lora_A.weight",), 1),
        (("some.other.lora_A.weight",), 1),
        (("_aux.0f1e2d3c",), 0),
        (("proj_out.base_layer.weight",), 0),
        (("_aux.0f1e2d3c", "lora_te_model_layers_0_mlp_up_proj.lora_down.weight"), 1),
    ],
)
def test_the_exit_status_is_that_of_qwenlora_keys(keys, status, run, folder, capfd):
    """What is left out of a source is left out, of which component it may be."""
    path = write_lora(folder / "c.safetensors", **{key: torch.ones(4, 4) for key in keys})
    assert run("c.safetensors", "-o", "o.safetensors")[0] == status
    assert cli.main(["keys", str(path)]) == status
    capfd.readouterr()
    found = run("a.safetensors", "c.safetensors:0.5", "-o", "p.safetensors", "--json")
    assert (found[0], json.loads(found[1])["complete"]) == (status, status == 0)


def test_a_source_that_is_off_leaves_nothing_out(run, folder):
    (folder / "empty").mkdir()
    assert run("a.safetensors", "empty:0", "-o", "n.safetensors")[0] == 0
    write_lora(folder / "c.safetensors", lora_te_x__lora_down__weight=torch.ones(4, 4))
    assert run("a.safetensors", "c.safetensors:0", "-o", "o.safetensors")[0] == 0


def test_files_for_z_image_are_merged_apart_from_others(run, folder):
    write_lora(folder / "z.safetensors", ("x_embedder",))
    write_lora(folder / "y.safetensors", ("x_embedder", "t_embedder.mlp.0"), seed=3)
    status, out, _ = run("z.safetensors", "y.safetensors:0.5", "-o", "zy.safetensors")
    assert (status, out.splitlines()[0]) == (0, "MERGED       zy.safetensors")
    found = run("z.safetensors", "a.safetensors", "-o", "za.safetensors")
    assert found == (
        2,
        "",
        "error: `a` is a LoRA for `qwen-image`, but `z` is one for `z-image`\n"
        "hint: a merged file is for one model: merge the files of each by themselves\n",
    )
    assert "za.safetensors" not in listing(folder)


def test_sources_that_give_nothing(run, folder):
    save_file({"img_in.oft_blocks": torch.ones(4, 768, 768)}, folder / "oft.safetensors")
    key = "transformer.single_transformer_blocks.0.attn.to_q"
    flux = {
        f"{key}.lora_A.weight": torch.ones(4, 3072),
        f"{key}.lora_B.weight": torch.ones(3072, 4),
    }
    save_file(flux, folder / "flux.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (folder / "pickle.safetensors").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j" + bytes(99))
    before = listing(folder)
    expected = {
        "oft.safetensors": (2, "OFT needs the base weight: `--base CHECKPOINT`"),
        "flux.safetensors": (2, "FLUX"),
        "broken.safetensors": (3, "broken.safetensors"),
        "pickle.safetensors": (3, "pickle"),
        "missing.safetensors:0.5": (3, "missing.safetensors`: cannot read the file: No such file"),
    }
    for name, (wanted, words) in expected.items():
        status, out, err = run("a.safetensors", name, "-o", "o.safetensors")
        assert (status, out) == (wanted, ""), err
        assert words in err
        assert err.startswith("error: ")
        assert len(err.splitlines()) <= 2
    assert listing(folder) == before


def test_folders_that_are_no_sources_say_what_they_hold(run, folder):
    contents = {
        "pickled": ["adapter_model.bin", "adapter_config.json"],
        "pickles": ["a.PT", "b.ckpt", "c.bin", "readme.md"],
        "one": ["pytorch_lora_weights.safetensors", "optimizer.bin"],
        "short": ["style.sft", "b.SFT"],
        "empty": ["readme.md"],
    }
    for name, files in contents.items():
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).touch()
    expected = {
        "pickled": (
            r"`pickled` has its weights in `adapter_model\.bin`: a pickle can run any code.*",
            r"convert it once: `python -c .*'adapter_model\.safetensors'\)\"` in `pickled`",
        ),
        "pickles": (
            r"`pickles` holds 3 pickles, e\.g\. `a\.PT`, and no LoRA file: .*",
            "convert.*",
        ),
        "one": (
            r"`one` is a folder without `adapter_model\.safetensors`: it holds 1 LoRA file, and"
            r" 1 pickle",
            r"name the file itself: `one.pytorch_lora_weights\.safetensors`",
        ),
        "short": (
            r".*: it holds 2 LoRA files",
            r"name the file itself: `short.b\.SFT`",
        ),
        "empty": (r".*, or any other LoRA file", "name the LoRA file itself, .*"),
    }
    for name, (message, hint) in expected.items():
        status, out, err = run("a.safetensors", f"{name}:0.5", "-o", "o.safetensors")
        assert (status, out) == (3, "")
        assert re.fullmatch(f"error: {message}\nhint: {hint}\n", err), err
    assert not (folder / "o.safetensors").exists()


def test_a_folder_that_cannot_be_listed_is_named(run, folder, monkeypatch):
    (folder / "closed").mkdir()
    error = PermissionError(13, "Permission denied")
    fail_at(monkeypatch, "pathlib.Path.iterdir", error, call=0)
    status, _, err = run("closed", "-o", "o.safetensors")
    assert (status, err) == (3, "error: cannot list `closed`: Permission denied\n")


def test_pickled_weights_beside_others_are_said(run, folder):
    (folder / "peft").mkdir()
    write_lora(folder / "peft" / "adapter_model.safetensors")
    (folder / "peft" / "adapter_model.bin").touch()
    status, _, err = run("peft", "-o", "o.safetensors")
    assert status == 0
    assert err == "note: `peft` holds `adapter_model.bin`, too: it is a pickle, and is not read\n"


def test_the_short_ending_is_read_and_written(run, folder):
    (folder / "a.safetensors").rename(folder / "a.sft")
    assert run("a.sft", "-o", "o.SFT")[0] == 0
    assert run("o.SFT:0.5", "b.safetensors", "-o", "p.safetensors")[0] == 0
    assert load_file(folder / "o.SFT").keys() == load_file(folder / "p.safetensors").keys()


def test_a_damaged_source_is_named(run, folder):
    tensors = load_file(folder / "a.safetensors")
    tensors["img_in.lora_B.weight"][5, 1] = float("inf")
    save_file(tensors, folder / "c.safetensors")
    status, _, err = run("c.safetensors", "b.safetensors", "-o", "o.safetensors")
    assert (status, err) == (3, "error: `img_in`: a tensor of `c` holds NaN or infinity\n")


# ---- the output ----


def test_nothing_is_overwritten_unasked(run, folder):
    (folder / "o.safetensors").write_bytes(b"mine")
    status, out, err = run("a.safetensors", "-o", "o.safetensors")
    assert (status, out) == (74, "")
    assert err == "error: `o.safetensors` exists\nhint: `--force` replaces it\n"
    assert (folder / "o.safetensors").read_bytes() == b"mine"
    assert run("a.safetensors", "-o", "o.safetensors", "--force")[0] == 0
    assert load_file(folder / "o.safetensors")


def test_a_source_is_never_the_output(run, folder):
    peft = folder / "peft"
    peft.mkdir()
    write_lora(peft / "adapter_model.safetensors")
    os.link(folder / "b.safetensors", folder / "same.safetensors")
    for source, output in [
        ("a.safetensors", "./a.safetensors"),
        ("b.safetensors", "same.safetensors"),
        ("peft", "peft/adapter_model.safetensors"),
    ]:
        status, _, err = run(source, "-o", output, "--force")
        assert status == 74
        assert "is one of the sources\nhint: write to another name" in err


def test_folders_that_cannot_be_written_to(run, folder):
    (folder / "is.safetensors").mkdir()
    status, _, err = run("a.safetensors", "-o", "is.safetensors")
    assert (status, err.splitlines()[0]) == (74, "error: `is.safetensors` is a folder")
    status, _, err = run("a.safetensors", "-o", "no/o.safetensors")
    assert (status, err.splitlines()[0]) == (74, "error: there is no folder `no`")
    if os.name != "nt" and Path("/proc/self").is_dir():
        status, _, err = run("a.safetensors", "-o", "/proc/o.safetensors")
        assert status == 74
        assert err.startswith("error: cannot write `/proc/o.safetensors`: ")
        assert len(err.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_is_followed(run, folder):
    (folder / "real").mkdir()
    (folder / "real" / "o.safetensors").write_bytes(b"old")
    (folder / "link.safetensors").symlink_to(folder / "real" / "o.safetensors")
    assert run("a.safetensors", "-o", "link.safetensors", "-f")[0] == 0
    assert (folder / "link.safetensors").is_symlink()
    assert load_file(folder / "real" / "o.safetensors")
    assert listing(folder / "real") == ["o.safetensors"]


@pytest.fixture
def old(folder):
    """An output that is there already."""
    path = folder / "o.safetensors"
    path.write_bytes(b"old")
    return path


def fail_at(monkeypatch, name, error, *, call=2):
    """Let a method of the writer, or a step of the output, fail."""
    calls = iter(range(100))
    target, attribute = name.rsplit(".", 1)
    owner = __import__(target.rsplit(".", 1)[0], fromlist=["x"])
    owner = getattr(owner, target.rsplit(".", 1)[1])
    real = getattr(owner, attribute)

    def failing(*args, **options):
        if next(calls) >= call:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(owner, attribute, failing)


@pytest.mark.parametrize(
    ("where", "error", "call", "status"),
    [
        ("qwenlora.merge.writer.SafetensorsWriter.add", KeyboardInterrupt(), 2, 130),
        ("qwenlora.merge.writer.SafetensorsWriter.finish", OSError(5, "Input/output error"), 0, 74),
        ("qwenlora.merge.output.os.fsync", OSError(28, "No space left on device"), 0, 74),
        ("qwenlora.merge.output.Path.replace", PermissionError(13, "Permission denied"), 0, 74),
        ("qwenlora.merge.output.Path.replace", KeyboardInterrupt(), 0, 130),
    ],
)
def test_an_error_leaves_what_was_there(where, error, call, status, run, old, monkeypatch):
    before = listing(old.parent)
    fail_at(monkeypatch, where, error, call=call)
    found, out, err = run("a.safetensors", "-o", "o.safetensors", "--force")
    assert (found, out) == (status, "")
    assert len(err.splitlines()) == 1
    assert old.read_bytes() == b"old"
    assert listing(old.parent) == before


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="limits of a process")
def test_a_file_system_that_refuses_more_leaves_what_was_there(old):
    """A real limit on the size of files, met while the data is written."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from qwenlora import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(cli.main(['merge', 'a.safetensors', '-o', 'o.safetensors', '-f']))\n"
    )
    before = listing(old.parent)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 74
    assert found.stderr == "error: cannot write `o.safetensors`: File too large\n"
    assert old.read_bytes() == b"old"
    assert listing(old.parent) == before


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_program_told_to_end_leaves_nothing(old):
    code = (
        "import os, signal, sys\n"
        "from qwenlora import cli\n"
        "from qwenlora.merge.writer import SafetensorsWriter\n"
        "SafetensorsWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(cli.main(['merge', 'a.safetensors', '-o', 'o.safetensors', '-f']))\n"
    )
    before = listing(old.parent)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 143, found.stderr
    assert old.read_bytes() == b"old"
    assert listing(old.parent) == before


# ---- as a program ----


@pytest.mark.slow
def test_both_ways_to_call_it(folder):
    for number, start in enumerate(([str(PROGRAM)], [sys.executable, "-m", "qwenlora"])):
        output = f"o{number}.safetensors"
        command = [*start, "merge", "a.safetensors:0.5", "-o", output]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.startswith(f"MERGED       {output}\n")
    first, second = (folder / f"o{number}.safetensors" for number in range(2))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="modes of files")
def test_the_file_has_the_usual_mode(run, folder):
    before = os.umask(0o027)
    try:
        run("a.safetensors", "-o", "o.safetensors")
    finally:
        os.umask(before)
    assert (folder / "o.safetensors").stat().st_mode & 0o777 == 0o640


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_drawn_late_seldom_and_taken_away(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    talk = Talk()
    talk.progress(1, 846)
    assert terminal.text == ""
    now[0] += 1.5
    talk.progress(2, 846)
    talk.progress(3, 846)
    assert terminal.text == "merging: 2 of 846 layers"
    talk.say("error", "no\x1b[2J\nhint: way out")
    blank = "\r" + " " * len("merging: 2 of 846 layers") + "\r"
    assert terminal.text == (f"merging: 2 of 846 layers{blank}error: no\ufffd[2J\nhint: way out\n")


def test_no_progress_where_nobody_looks(capsys, monkeypatch):
    talk = Talk()
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    talk.progress(1, 2)
    assert capsys.readouterr().err == ""
