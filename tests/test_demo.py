"""The demo passes as it is, and fails where the engine is made wrong."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import subprocess
import sys

import pytest
import torch

import qwenlora
from qwenlora.demo import course, main, measure, model
from qwenlora.group import arena, builder, loads, place
from qwenlora.packing.layout import RowOrder
from qwenlora.pipeline import pipeline_methods

STEPS = (
    *("set-up", "1. compose three", "2. change one strength", "3. remove one", "4. reset"),
    "5. the same by name, in a diffusers pipeline",
)


@pytest.fixture(scope="module")
def dense():
    return model.dense_model()


@pytest.fixture(scope="module")
def emulated(dense):
    return model.emulated_model(dense)


@pytest.fixture(autouse=True)
def _models_made_once(monkeypatch, dense, emulated):
    monkeypatch.setattr(course, "dense_model", lambda: dense)
    monkeypatch.setattr(course, "emulated_model", lambda _: copy.deepcopy(emulated))
    qwenlora.clear_cache()
    yield
    qwenlora.clear_cache()


def errors_shown(screen: str) -> list[float]:
    """The numbers of the tables, without the section on mistakes."""
    steps, _, _ = screen.partition("what mistakes would show")
    return [float(n) for n in re.findall(r"\s(\d+\.\d+|inf|nan)(?=\s{2,}|\n)", _tables(steps))]


def _tables(steps: str) -> str:
    kinds = tuple(kind.value for kind in measure.Kind)
    lines = [line for line in steps.splitlines() if line.strip().startswith(kinds)]
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_all_steps_within_bound(capsys, tmp_path):
    threads = torch.get_num_threads()
    assert main(["--keep", str(tmp_path / "kept")]) == 0
    screen, talk = capsys.readouterr()
    assert talk == ""
    assert all(f"\n{step} " in screen for step in STEPS)
    assert screen.endswith("all within bf16 rounding (1e-2); reset is bit-exact\n")
    assert max(map(len, screen.splitlines())) <= 80
    shown = errors_shown(screen)
    assert len(shown) == 2 * (4 + 4 + 2)  # two numbers per kind that carries a delta
    assert max(shown) <= measure.BOUND
    assert screen.count("bit-exact") == 2 * 2 + 1
    assert screen.count("; complete") == 4
    assert re.search(r"modulation \(awq\) +1\.4\d +1\.4\d\n", screen)
    assert re.search(r"mlp \(svdq\) +7\.00 +7\.00\n", screen)
    assert torch.get_num_threads() == threads
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert {"peft.safetensors", "lightning.safetensors", "kohya.safetensors"} <= kept


LIGHT = """\
qwenlora demo --light: LoRAs composed into a quantized model, and measured

  An emulated Qwen-Image transformer: 2 blocks, 256 wide, int4 (W4A4) and
  bfloat16 in Nunchaku's layouts, base rank 32.
  Its LoRA files, in 3 spellings:
    transformer.transformer_blocks.0.attn.to_v.lora_A.weight
    transformer_blocks.0.attn.to_v.lora_down.weight
    lora_unet_transformer_blocks_0_img_mod_1.lora_down.weight
  Errors are the worst of all layers, against the files in dense float64.

                                                          slot      output
  1. compose three                                      0.00__      0.00__
  2. change one strength                                0.00__      0.00__
  3. remove one                                         0.00__      0.00__
  4. reset                                                       bit-exact
  what mistakes would show
  modulation rows left in the file's order                1.4_        1.4_
  alpha of the Lightning file ignored                     7.00        7.00

  This is the light form. `qwenlora demo` also measures a file that PEFT and
  diffusers wrote, and a diffusers pipeline. It needs more packages:
    pip install "qwenlora[demo]"

all within bf16 rounding (1e-2); reset is bit-exact
"""


@pytest.mark.slow
def test_the_light_form(capsys):
    assert main(["--light"]) == 0
    screen, talk = capsys.readouterr()
    assert talk == ""
    assert re.sub(r"(?<=0\.00)\d\d|(?<=1\.4)\d", lambda m: "_" * len(m[0]), screen) == LIGHT
    assert max(float(n) for n in re.findall(r"0\.00\d\d", screen)) < measure.BOUND / 2


@pytest.mark.slow
def test_the_light_form_keeps_its_files(capsys, tmp_path):
    assert main(["--light", "--keep", str(tmp_path / "kept")]) == 0
    assert f"spellings, kept in\n  {tmp_path}" in capsys.readouterr().out
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert {"diffusers.safetensors", "lightning.safetensors", "kohya.safetensors"} <= kept


@pytest.mark.slow
def test_the_light_form_fails_where_the_engine_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(measure.Meter, "differences", lambda *_: ["a tensor"])
    right = place.factor_runs

    def twice(group, share, spec):
        return right(group, share, dataclasses.replace(spec, strength=2 * spec.strength))

    monkeypatch.setattr(builder, "factor_runs", twice)
    assert main(["--light"]) == 1
    screen = capsys.readouterr().out
    assert "1. compose three                                        1.00        1.00\n" in screen
    assert "  4. reset                                                   NOT bit-exact\n" in screen
    assert "FAILED (bound 1e-2)\n" in screen
    assert "step 3: attention (svdq) is off by 1\n" in screen
    assert "step 4: the reset is not bit-exact\n" in screen


@pytest.mark.parametrize("arguments", [[], ["--light"]])
def test_temporary_files_are_gone(capsys, monkeypatch, arguments):
    seen = []
    name = "run_light" if arguments else "run"
    monkeypatch.setattr(course, name, lambda folder, *, kept: seen.append((folder, kept)) or 0)
    assert main(arguments) == 0
    folder, kept = seen[0]
    assert not kept
    assert not folder.exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_wrong_row_order_fails(capsys, monkeypatch):
    right = arena.write_branch_ups

    def in_file_order(ups, part, *, row_order):
        right(ups, part, row_order=RowOrder.PLANAR)

    monkeypatch.setattr(arena, "write_branch_ups", in_file_order)
    assert main([]) == 1
    screen = capsys.readouterr().out
    assert "FAILED (bound 1e-2)\n" in screen
    assert "step 1: modulation (awq) is off by 1.4" in screen
    assert "step 1: attention" not in screen


@pytest.mark.slow
def test_a_pipeline_that_takes_other_weights_fails(capsys, monkeypatch):
    def doubled(pipeline, names, weights=None):
        return pipeline_methods.set_adapters(pipeline, names, [2 * weight for weight in weights])

    monkeypatch.setitem(pipeline_methods.PIPELINE_METHODS, "set_adapters", doubled)
    assert main([]) == 1
    screen = capsys.readouterr().out
    assert re.search(r"step 5: the picture is off by [01]\.\d", screen)
    assert "step 1" not in screen.partition("FAILED")[2]


@pytest.mark.slow
def test_wrong_scale_fails(capsys, monkeypatch):
    right = place.factor_runs

    def twice(group, share, spec):
        return right(group, share, dataclasses.replace(spec, strength=2 * spec.strength))

    monkeypatch.setattr(builder, "factor_runs", twice)
    assert main([]) == 1
    screen = capsys.readouterr().out
    for kind in measure.Kind:
        assert f"step 1: {kind.value} is off by 1\n" in screen


@pytest.mark.slow
def test_damaged_base_fails(capsys, monkeypatch):
    right = builder.arena_of

    def arena_of(targets, *args, **options):
        made = right(targets, *args, **options)
        finish = made.finish

        def damaged():
            finish()
            downs, _ = made.factors().wait()
            for down, target in zip(downs, targets, strict=True):
                if target.path.endswith("1.img_mlp.net.2"):
                    down.view(-1)[0] += 1

        made.finish = damaged
        return made

    monkeypatch.setattr(builder, "arena_of", arena_of)
    # A base that was kept would take the damaged one's place.
    monkeypatch.setattr(loads, "_usable", lambda kept, group: None)
    assert main([]) == 1
    screen = capsys.readouterr().out
    assert "mlp (svdq) is off by" in screen
    assert "2 DIFFERENCES: transformer_blocks.1.img_mlp.net.2.proj_down" in screen
    assert "step 4: the reset is not bit-exact" in screen
    assert "all within" not in screen


@pytest.mark.slow
def test_blind_measure_fails(capsys, monkeypatch):
    right = measure.Meter.errors

    def blind(meter, *args):
        return [dataclasses.replace(row, slot=0.001) for row in right(meter, *args)]

    monkeypatch.setattr(measure.Meter, "errors", blind)
    assert main([]) == 1
    assert "the measure does not see this in mlp (svdq)" in capsys.readouterr().out


def test_refusal_is_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise qwenlora.QwenLoraError("`x` is refused")

    monkeypatch.setattr(course, "compose_loras", refuse)
    assert main([]) == 1
    assert capsys.readouterr().err == "qwenlora demo: `x` is refused\n"


@pytest.mark.parametrize("package", ["diffusers", "peft"])
def test_missing_extra_is_one_line(capsys, monkeypatch, package):
    right = importlib.import_module

    def without(name, *args):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return right(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr(course, "dense_model", model.dense_model)
    assert main([]) == 1
    assert capsys.readouterr().err == (
        'qwenlora demo: it needs diffusers and peft: run `pip install "qwenlora[demo]"`, or '
        f"`qwenlora demo --light`, which does without them (No module named '{package}')\n"
    )


def test_importing_the_demo_is_cheap():
    code = "import sys, qwenlora.demo; sys.exit(bool({'torch', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "args", [["--keep"], ["--light", "--keep"], ["--what"], ["--keep", "a", "b"]]
)
def test_usage(capsys, args):
    assert main(args) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: qwenlora demo [--light] [--keep DIR]")
