"""Run the application on this machine until it is interrupted: `python -m qwenlora_serve FOLDER`.

It starts a Ray of its own, whatever cluster the environment names, and ends it. On a cluster the
application is deployed by a configuration file instead, such as `config.yaml`.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from pathlib import Path

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from .app import build
from .settings import PipelineKind, Routing, Settings

_OBJECT_STORE_BYTES = 128 << 20
"""Shared memory for what replicas tell each other: PNG files."""


def run(settings: Settings, *, host: str, port: int) -> None:
    """Start Ray and the application; returns when it is interrupted, all its processes ended."""
    ray.init(
        # A cluster that RAY_ADDRESS names is not touched.
        address="local",
        num_cpus=max(1, math.ceil(settings.replicas * settings.cpus)),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        # Ray gives its processes the lowest priority but a few; here they are what is run.
        _system_config={"worker_niceness": 0},
    )
    # Not before: Ray has a handler of its own, which leaves processes behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(build(settings), logging_config=LoggingConfig(enable_access_log=False))
        print(f"ready at http://{host}:{port}", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


def _parsed() -> argparse.Namespace:
    """The arguments; what is not given keeps its default."""
    parser = argparse.ArgumentParser(
        description="Pictures with stacks of LoRAs, over HTTP.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("folder", type=Path, help="the LoRA files")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--pipeline", choices=[kind.value for kind in PipelineKind])
    parser.add_argument("--routing", choices=[routing.value for routing in Routing])
    for name, kind in Settings.model_fields.items():
        if name not in ("folder", "pipeline", "routing"):
            number = float if kind.annotation is float else int
            parser.add_argument(f"--{name.replace('_', '-')}", type=number, metavar="N")
    return parser.parse_args()


def main() -> int:
    """Run; the exit status is 0 when it was interrupted."""
    given = vars(_parsed())
    host, port = given.pop("host"), given.pop("port")
    given["folder"] = given["folder"].resolve()
    run(Settings(**given), host=host, port=port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
