"""The benches of composition and of rank run, measure all they name, and write right files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenlora
from qwenlora import emulation

from .programs import Programs

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCHES = Path(__file__).parents[1] / "benches"
TINY = (BENCHES / "bench_composition.py", "--size", "tiny", "--device", "cpu")
MAY_BE_SKIPPED = {
    "first, bounded memory",
    "first, page cache cold",
    "first, page cache cold, read ahead",
    "three LoRAs, bounded memory",
    "strength, pieces in host memory",
    "strength, pieces on the device",
    "switch, pieces in host memory",
    "switch, pieces on the device",
    "first in a process, bounded memory",
}
ACTIONS = {
    "table": {
        "first",
        "first, irregular file",
        "first, modulations too",
        "three LoRAs",
        "strength",
        "switch to a set used before",
        "reset",
        "same stack again",
        "forward, nothing changed",
    },
    "offload": {"first", "strength", "reset", "block copies, base", "block copies, composed"},
    "fresh": {"first in a process"},
}


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    """Runs the benches, which all import PyTorch."""
    own = Programs()
    yield own
    own.close()


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> dict[str, Any]:
    """What all suites found, each action timed once: `TestMeter` counts the times."""
    path = tmp_path_factory.mktemp("bench") / "found.json"
    programs.run(*TINY, "--repeat", 1, "--json", path).check_returncode()
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("suite", ACTIONS)
def test_every_action_is_measured(document: dict[str, Any], suite: str) -> None:
    rows = [r for r in document["rows"] if r["suite"] == suite and r["engine"] == "qwenlora"]
    skipped = {row["action"] for row in rows if "skipped" in row}
    assert {row["action"] for row in rows} - skipped >= ACTIONS[suite]
    assert skipped <= MAY_BE_SKIPPED
    for row in rows:
        if "skipped" not in row:
            assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
            assert row["n"] == 1


@pytest.mark.slow
def test_every_sweep_has_its_points(document: dict[str, Any]) -> None:
    rows = [row for row in document["rows"] if row["suite"] == "scaling"]
    for engine, sweeps in (("qwenlora", 4), ("repack", 3)):
        points = {(r["sweep"], r["x"], r["bytes"]) for r in rows if r["engine"] == engine}
        assert len({sweep for sweep, _, _ in points}) == sweeps
        assert len(points) == 2 * sweeps


class TestMeter:
    """How often an action is timed, and what is told of the times."""

    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHES))

    @pytest.mark.parametrize(
        ("repeat", "budget", "timed"), [(5, 60, 5), (5, 0, 3), (3, 60, 3), (1, 0, 1)]
    )
    def test_it_times_until_the_budget_is_spent(
        self, repeat: int, budget: float, timed: int
    ) -> None:
        from composition.measure import Action, Meter

        done: list[str] = []
        action = Action(lambda: done.append("run"), lambda: done.append("before"))
        row = Meter("cpu", repeat=repeat, budget=budget).measure(action)
        assert row["n"] == timed
        # One warms up, and one is measured for its memory.
        assert done == ["before", "run"] * (timed + 2)
        assert 0 <= row["min_s"] <= row["median_s"] <= row["max_s"]

    def test_a_tiny_size_repeats_often_enough(self) -> None:
        from bench_composition import SIZES

        assert all(size.repeat >= 3 for size in SIZES.values())


class TestFiles:
    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHES))

    def test_they_are_what_the_safetensors_library_writes(self, tmp_path: Path) -> None:
        from composition.files import LoraFile

        path = LoraFile(blocks=11, rank=1, modulation=True).write(tmp_path)
        again = tmp_path / "again.safetensors"
        save_file(load_file(path), again)
        assert path.read_bytes() == again.read_bytes()

    @pytest.mark.parametrize("kind", ["irregular", "shared"])
    def test_every_kind_applies_wholly(self, tmp_path: Path, kind: str) -> None:
        from composition.files import Down, Layout, LoraFile

        layout = Layout.IRREGULAR if kind == "irregular" else Layout.REGULAR
        down = Down.SHARED if kind == "shared" else Down.OWN
        path = LoraFile(blocks=2, rank=8, layout=layout, down=down, modulation=True).write(tmp_path)
        plan = qwenlora.read_keys(path)
        assert plan["verdict"] == "apply"
        ranks = {module["rank"] for module in plan["modules"]}
        assert len(plan["modules"]) == 2 * 14
        assert ranks == ({5, 6, 7, 8} if kind == "irregular" else {8})

    @pytest.mark.usefixtures("diffusers")
    def test_the_model_of_diffusers_takes_the_same_files(self, tmp_path: Path) -> None:
        pytest.importorskip("diffusers.quantizers.nunchaku")
        from composition.files import LoraFile
        from composition.model import Weights, build_lite_model

        model = build_lite_model(2, 16, "cpu", Weights.LEAN)
        path = LoraFile(blocks=2, rank=8, modulation=True).write(tmp_path)
        report = qwenlora.compose_loras(model, path)
        assert report.complete
        assert len(report.slots) == 2 * 14

    def test_shared_downs_count_once(self, tmp_path: Path) -> None:
        from composition.files import Down, LoraFile
        from composition.model import Weights, build_model

        model = build_model(1, 16, "cpu", Weights.LEAN)
        for down, rank in ((Down.OWN, 48), (Down.SHARED, 16)):
            path = LoraFile(blocks=1, rank=16, down=down).write(tmp_path)
            report = qwenlora.compose_loras(model, path)
            ranks = {slot.path.rpartition(".")[2]: slot.rank_added for slot in report.slots}
            assert ranks["to_qkv"] == ranks["add_qkv_proj"] == rank
            assert ranks["to_add_out"] == 16


class TestZImage:
    """Its model and its file, of the released width."""

    @pytest.mark.slow
    @pytest.mark.usefixtures("diffusers")
    @pytest.mark.parametrize("form", ["fused", "stock"])
    def test_the_file_applies_wholly(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
    ) -> None:
        pytest.importorskip("diffusers.quantizers.nunchaku")
        monkeypatch.syspath_prepend(str(BENCHES))
        from composition.z_image import blocks, build_z_image, write_z_image_lora

        path = write_z_image_lora(tmp_path / "lora.safetensors", 1, 2)
        linears = [name for _, names in blocks(1) for name in names]
        plan = qwenlora.read_keys(path)
        assert plan["verdict"] == "apply"
        assert len(plan["modules"]) == len(linears) == 8 + 8 + 7
        model = build_z_image(emulation.ZImageForm(form), 1, 16, "cpu")
        report = qwenlora.compose_loras(model, path)
        assert report.complete
        assert len(report.slots) == (len(linears) if form == "stock" else 5 + 5 + 4)


@pytest.mark.slow
@pytest.mark.usefixtures("diffusers")
def test_every_kind_opens_the_attention(programs: Programs, tmp_path: Path) -> None:
    pytest.importorskip("diffusers.models.transformers.transformer_z_image")
    path = tmp_path / "found.json"
    bench = (BENCHES / "bench_opened.py", "--tokens", 64, "--repeat", 1, "--json", path)
    programs.run(*bench, environment={"CUDA_VISIBLE_DEVICES": ""}).check_returncode()
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert len({row["name"] for row in rows}) == len(rows) == 7
    assert all(row["ms"] > 0 for row in rows)


class TestKernels:
    """What the bench of the kernels knows without them."""

    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHES))

    def test_slices_join_to_the_layout_of_the_whole(self) -> None:
        from kernels import layouts

        generator = torch.Generator().manual_seed(0)
        values = torch.randint(0, 16, (512, 256), generator=generator)
        scales, act = torch.rand(512, 4, generator=generator), torch.rand(512, 64)
        parts = [layouts.pack_activation(part) for part in values.split(128, dim=1)]
        assert torch.equal(layouts.join_columns(parts), layouts.pack_activation(values))
        parts = [layouts.pack_scales(part) for part in scales.split(2, dim=1)]
        assert torch.equal(layouts.join_scales(parts), layouts.pack_scales(scales))
        parts = [layouts.pack_low_rank(part) for part in act.split(32, dim=1)]
        assert torch.equal(layouts.join_columns(parts), layouts.pack_low_rank(act))
        assert torch.equal(layouts.unpack_low_rank(layouts.pack_low_rank(act)), act)

    def test_rows_of_a_layer_are_a_layer(self) -> None:
        from kernels.layer import Layer

        weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
        layer = Layer.of(weight, torch.zeros(256), rank=16)
        dense = layer.dense()[0]
        parts = [layer.rows(begin, begin + 128).dense()[0] for begin in (0, 128)]
        assert torch.equal(torch.cat(parts), dense)
        assert float((dense - weight).norm() / weight.norm()) < 0.2

    @pytest.mark.parametrize(
        ("factor", "shapes", "most"),
        [
            (4, ((4, 4), (3072, 768)), 1),
            (8, ((8, 8), (1536, 384)), 2),
            (16, ((16, 16), (768, 192)), 4),
            (-1, ((96, 48), (128, 64)), 12),
        ],
    )
    def test_slices_take_the_ranks_that_the_kernels_take(
        self, factor: int, shapes: Any, most: int
    ) -> None:
        from bench_kernels import most_rows, random_kron

        kron = random_kron(12288, 3072, factor, "cpu")
        assert (kron.w1.shape, kron.w2.shape) == shapes
        assert most_rows(kron, 32) == most


@pytest.mark.slow
def test_a_peer_without_its_sources_is_refused(programs: Programs, tmp_path: Path) -> None:
    run = programs.run(*TINY, "--peer", tmp_path)
    assert run.returncode != 0
    assert "nunchaku_code/lora_qwen.py" in run.stderr


class TestRank:
    """The bench of rank, on emulated layers."""

    BLOCKS, RANKS, ADDED = 2, [32, 48, 96], [0, 16, 48]
    COMMAND = (
        *(BENCHES / "bench_rank.py", "--device", "cpu", "--repeat", "3"),
        *("--blocks", str(BLOCKS), "--added", *map(str, ADDED)),
    )

    def run(self, programs: Programs, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
        path = tmp_path / "found.json"
        programs.run(*self.COMMAND, *arguments, "--json", path).check_returncode()
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return rows

    @pytest.mark.slow
    def test_every_layer_of_a_forward_is_measured(self, programs: Programs, tmp_path: Path) -> None:
        ranks = ["--ranks", *map(str, self.RANKS), "--width", "128", "--tokens", "20", "3"]
        rows = self.run(programs, tmp_path, "--only", "resident", "--emulated", *ranks)
        assert all("emulation" in row["engine"] for row in rows)
        steps = ["to_qkv", "to_out.0", "img_mlp", "add_qkv_proj", "to_add_out", "txt_mlp"]
        *alone, forward = rows
        assert [row["step"] for row in alone] == steps
        assert [row["tokens"] for row in alone] == [20] * 3 + [3] * 3
        for row in rows:
            assert row["ranks"] == self.RANKS
            assert min(row["median_s"]) > 0
        sums = zip(*(row["median_s"] for row in alone), strict=True)
        assert forward["median_s"] == pytest.approx([60 * sum(times) for times in sums])
        slopes = sum(row["line"]["seconds_per_rank"] for row in alone)
        assert forward["line"]["seconds_per_rank"] == pytest.approx(60 * slopes)
        assert forward["linears"] == 480
        fused = sum(r["line"]["seconds_per_rank"] for r in alone if "qkv" in r["step"])
        assert forward["seconds_per_trained_rank"] == pytest.approx(60 * (slopes + 2 * fused))

    @pytest.mark.slow
    def test_every_added_rank_is_copied(self, programs: Programs, tmp_path: Path) -> None:
        skipped, row = self.run(programs, tmp_path)
        assert "Nunchaku" in skipped["skipped"]
        # 2 bytes of every input and output channel of the 8 linears; one block is resident.
        width = 3072
        per_rank = 2 * (self.BLOCKS - 1) * 2 * (4 * width + 2 * width + 2 * 5 * width)
        assert row["bytes_per_rank"] == pytest.approx(per_rank)
        points = row["points"]
        assert [point["rank"] for point in points] == self.ADDED
        assert [point["bus_bytes"] for point in points] == [per_rank * r for r in self.ADDED]
        base = points[0]["copied_bytes"]
        assert [point["copied_bytes"] - base for point in points] == [
            point["bus_bytes"] for point in points
        ]

    def test_the_line_is_the_least_squares_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHES))
        from bench_rank import Line

        line = Line.through([32, 64, 128], [5.0, 7.0, 8.0])
        slope, start = np.polyfit([32, 64, 128], [5.0, 7.0, 8.0], 1)
        assert (line.slope, line.start) == pytest.approx((slope, start))
        assert line.largest_deviation == pytest.approx(abs(start + 64 * slope - 7) / 7)

    def test_layers_take_the_shapes_of_any_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHES))
        from bench_rank import Layer, emulated

        layer = Layer(emulated(), 128, 256, highest=96, device="cpu")
        x = torch.randn(2, 5, 128).bfloat16()
        outputs = []
        for rank in (32, 96, 32):
            layer.set_rank(rank)
            assert layer.module.proj_down.shape == (128, rank)
            assert layer.module.proj_up.shape == (256, rank)
            outputs.append(layer.module(x))
        assert torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.slow
def test_serving_is_measured_at_every_number_of_adapters(
    programs: Programs, tmp_path: Path
) -> None:
    options = ("--device", "cpu", "--blocks", "1", "--rank", "1", "--repeat", "3")
    program = (BENCHES / "bench_serving.py", *options, "--folder", tmp_path)
    run = programs.run(*program, "--adapters", 2, 3)
    run.check_returncode()
    rows = [line.split("|")[1:-1] for line in run.stdout.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in rows[0]] == ["call", "2 attached", "3 attached", "ratio"]
    assert [row[0].strip() for row in rows[1:]] == [
        "in place already", "other weights", "kept stack", "files read"
    ]  # fmt: skip
    assert all(float(row[-1]) > 0 for row in rows[1:])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_schedules_are_measured_step_by_step(programs: Programs) -> None:
    options = ("--device", "cpu", "--blocks", "1", "--rank", "1", "--steps", "4", "--runs", "1")
    run = programs.run(BENCHES / "bench_schedule.py", *options)
    run.check_returncode()
    rows = [line.split("|")[1:-1] for line in run.stdout.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows[1:]] == [
        f"{count} of 4" for count in (0, 0, 2, 2, 4, 4, 2, 2)
    ]


@pytest.mark.slow
def test_hooks_are_measured_in_every_case(programs: Programs, tmp_path: Path) -> None:
    options = ("--blocks", "1", "--rank", "1", "--steps", "2", "--base-ranks", "32")
    found = tmp_path / "hooks.json"
    run = programs.run(BENCHES / "bench_hooks.py", *options, "--json", found)
    run.check_returncode()
    rows = json.loads(found.read_text(encoding="utf-8"))["rows"]
    assert [row["case"] for row in rows] == [
        "nothing changes",
        "two hooks, kept on the device",
        "two hooks, host memory",
        "hook and base, kept on the device",
        "hook and base, host memory",
    ]
    assert all(row["case"] in run.stdout for row in rows)
    assert rows[0]["more_s"] == 0
    assert all(row["more_s"] > 0 for row in rows[1:])
