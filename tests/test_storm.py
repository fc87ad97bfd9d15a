"""Thousands of real signals at random moments: no hang, and the base comes back bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("storm.py")

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="interval timers that send signals are Unix's"
)


def _storm(Draft, folder: Path, *, seconds: int, seed: int) -> None:
    for number, name in enumerate("ab", 1):
        Draft.full(seed=number, rank=4 * number, blocks=2).save(folder / f"{name}.safetensors")
    paths = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(seconds), str(seed), str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=seconds + 400,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    rounds, caught = map(int, ran.stdout.splitlines()[-1].split())
    # Few where the machine is busy.
    assert caught >= rounds > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_storm_of_signals(seed, Draft, tmp_path):
    """Without block offload, and with it. `storm.py` says how a longer one is run."""
    _storm(Draft, tmp_path, seconds=10, seed=seed)
