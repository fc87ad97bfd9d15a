"""The first composition of a process that has pinned and allocated nothing.

python -m composition.fresh '{"file": …, "blocks": …, "base_rank": …, "device": …, …}'
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import qwenlora
from composition.measure import Action, Meter, Timing
from composition.model import Weights, build_model
from composition.options import UnavailableError, options

SUITE = "fresh"


def measure_fresh(setting: dict[str, Any], *, repeat: int, budget: float) -> dict[str, Any]:
    """Median of the first composition in processes of their own, and memory of the last one.

    Args:
        setting: `file`, `blocks`, `base_rank`, `device`, `weights` and `options`.
        repeat: Number of processes.
        budget: Seconds after which no more are started, once there were three.
    """
    row = {"suite": SUITE, "engine": "qwenlora", "base_rank": setting["base_rank"]}
    row["action"] = "first in a process" + (", bounded memory" if setting["options"] else "")
    try:
        options(**setting["options"])
    except UnavailableError as error:
        return row | {"skipped": str(error)}
    began = time.perf_counter()
    first: list[float] = []
    second: list[float] = []
    while len(first) < repeat:
        found = _child(setting)
        first.append(found["first_s"])
        second.append(found["second_s"])
        if len(first) >= 3 and time.perf_counter() - began > budget:
            break
    after = {"action_after_it": Timing(tuple(second)).document()}
    return row | Timing(tuple(first)).document() | {"memory": found["memory"]} | after


def _child(setting: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "composition.fresh", json.dumps(setting)]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_child(setting: dict[str, Any]) -> dict[str, Any]:
    """Compose twice in this process, the second time with nothing kept but the buffers."""
    model = build_model(
        setting["blocks"], setting["base_rank"], setting["device"], Weights(setting["weights"])
    )
    chosen = options(**setting["options"])
    meter = Meter(setting["device"], repeat=1, budget=0)
    # Names are loaded when first used; the module's import is not what is measured.
    compose = qwenlora.compose_loras
    times: list[float] = []

    def timed() -> None:
        started = time.perf_counter()
        compose(model, (Path(setting["file"]), 0.8), options=chosen)
        meter.wait()
        times.append(time.perf_counter() - started)

    memory = meter.memory(Action(timed))
    qwenlora.reset_loras(model)
    qwenlora.clear_cache()
    timed()
    return {"first_s": times[0], "second_s": times[1], "memory": memory}


if __name__ == "__main__":
    with torch.no_grad():
        print(json.dumps(run_child(json.loads(sys.argv[1]))))
