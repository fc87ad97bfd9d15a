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


SECONDS = 11
SEEDS = ("0", "1")


@pytest.mark.slow
def test_a_storm_of_signals(Draft, tmp_path):
    """Without block offload, and with it. `storm.py` says how a longer one is run."""
    for number, name in enumerate("ab", 1):
        Draft.full(seed=number, rank=4 * number, blocks=2).save(tmp_path / f"{name}.safetensors")
    paths = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(SECONDS), str(tmp_path), *SEEDS],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    told = ran.stdout.splitlines()[-len(SEEDS) :]
    assert len(told) == len(SEEDS)
    for line in told:
        rounds, caught = map(int, line.split())
        # Few where the machine is busy.
        assert caught >= rounds > 0
