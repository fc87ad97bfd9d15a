"""Random models, files, options and histories against an oracle that shares no code with ours.

`make differential SECONDS=3600` goes on for an hour. A failure prints its seed and what was done;
`make differential SEED=N` runs that seed alone.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter

import pytest

from .case import run_case
from .checks import Fault


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_fixed_seeds(seed):
    assert run_case(seed)["compositions"] > 0


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_random_seeds(request, capsys):
    """Goes through seeds for as long as it is told to."""
    seconds = request.config.getoption("--seconds", default=None)
    only = request.config.getoption("--seed", default=None)
    if seconds is None and only is None:
        pytest.skip("goes on for as long as it is told to: make differential SECONDS=60")
    first = request.config.getoption("--first-seed")
    started, counts, faults = time.monotonic(), Counter(), []
    for seed in itertools.count(first) if only is None else [only]:
        if only is None and time.monotonic() - started >= seconds:
            break
        counts["seeds"] += 1
        try:
            counts += run_case(seed)
        except Fault as fault:
            faults.append(str(fault))
    with capsys.disabled():
        done = ", ".join(f"{count} {what}" for what, count in counts.items())
        sys.stdout.write(f"\n{time.monotonic() - started:.0f} s from seed {first}: {done}\n")
    assert not faults, f"{len(faults)} seeds\n" + "\n\n".join(faults)
