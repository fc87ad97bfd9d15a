"""Runs programs, each in a copy of one process that has imported PyTorch and qwenlora.

A program itself: it reads requests, one a line, and answers each with an exit status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

IMPORTED = ("torch", "safetensors.torch", "qwenlora.emulation")


# Threads that wait for each other would take longer than layers of the tests' sizes.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
CAN_COPY = sys.platform == "linux"
"""Whether a process can be copied safely; elsewhere each program has a new one."""


class Programs:
    """The process that is copied. It runs nothing itself: a copy begins without threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        if CAN_COPY:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **ENVIRONMENT},
            )

    def run(
        self, program: Path, *arguments: object, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python program to its end, as `python PROGRAM ARGUMENTS` does."""
        words = [str(program), *map(str, arguments)]
        if self._process is None:
            environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
            command = [sys.executable, *words]
            return subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment
            )
        with tempfile.TemporaryDirectory() as folder:
            request = {"words": words, "folder": folder, "environment": dict(environment or {})}
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            out, err = (Path(folder, name).read_text("utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(words, status, out, err)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()


def run_copy(request: dict[str, Any]) -> int:
    """Run the program of a request; the exit status."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(request["folder"], name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    os.environ.update(request["environment"])
    sys.argv = request["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
            return 1
        return error.code or 0
    except BaseException:  # noqa: BLE001 - as a process of its own ends
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    # Each collection of cycles would go through all that was imported.
    gc.collect()
    gc.freeze()
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            status = run_copy(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
