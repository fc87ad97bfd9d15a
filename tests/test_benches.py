"""The bench of composition runs, measures every action, and writes files as their library does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import qwenlora

BENCHES = Path(__file__).parents[1] / "benches"
TINY = (sys.executable, BENCHES / "bench_composition.py", "--size", "tiny", "--device", "cpu")
MAY_BE_SKIPPED = {
    "first, bounded memory",
    "first, page cache cold",
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
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "found.json"
    # Threads that wait for each other would take longer than layers of this size.
    subprocess.run(
        [*TINY, "--json", path],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
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
            assert row["n"] >= 3


@pytest.mark.slow
def test_every_sweep_has_its_points(document: dict[str, Any]) -> None:
    rows = [row for row in document["rows"] if row["suite"] == "scaling"]
    for engine, sweeps in (("qwenlora", 4), ("repack", 3)):
        points = {(r["sweep"], r["x"], r["bytes"]) for r in rows if r["engine"] == engine}
        assert len({sweep for sweep, _, _ in points}) == sweeps
        assert len(points) == 2 * sweeps


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


def test_a_peer_without_its_sources_is_refused(tmp_path: Path) -> None:
    run = subprocess.run([*TINY, "--peer", tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "nunchaku_code/lora_qwen.py" in run.stderr
