"""Asks a Python what it is, in a separate process.

Of what is installed, only torch is imported: a broken torch can end its process, and takes
seconds where it works.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenlora.doctor import fitting
from qwenlora.doctor.facts import Gpu, Torch
from qwenlora.doctor.fitting import Interpreter

__all__ = ["Answer", "ask"]

_TIMEOUT_SECONDS = 180
_MARK = "qwenlora-doctor:"
_NOT_INSTALLED = "not installed"

# The entry for the working folder is reported, but torch is not imported from there.
_SCRIPT = f"""
import json, sys, warnings
def tell(**facts):
    # On a line of its own, and in bytes: what is imported may print, and a variable may set any
    # encoding.
    line = "\\n" + {_MARK!r} + json.dumps(facts) + "\\n"
    sys.stdout.flush()
    sys.stdout.buffer.write(line.encode("ascii"))
    sys.stdout.flush()
paths = list(sys.path)
sys.path[:] = [path for path in paths if path]
tell(version=list(sys.version_info[:2]), paths=paths)
fitting = dict(__name__="__main__")
try:
    exec({{fitting!r}}, fitting)
    tell(interpreter=dict(fitting["running_interpreter"]()._asdict()))
except Exception:
    pass  # a Python before 3.7
try:
    import torch
except ModuleNotFoundError as error:
    missing = error.name == "torch"
    tell(torch=dict(error={_NOT_INSTALLED!r} if missing else str(error)))
except BaseException as error:
    tell(torch=dict(error=type(error).__name__ + ": " + str(error)))
else:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            available = torch.cuda.is_available()
            devices = range(torch.cuda.device_count() if available else 0)
            shown = [torch.cuda.get_device_properties(i) for i in devices]
            error = None
        except BaseException as caught:
            available, shown, error = False, [], caught
    gpus = [[d.name, d.major, d.minor, d.total_memory] for d in shown]
    warning = str(error or (said[-1].message if said else ""))
    tell(torch=dict(version=str(torch.__version__), cuda=torch.version.cuda,
                    is_available=available, gpus=gpus, warning=warning))
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A Python's answer.

    Attributes:
        version: None where it could not be asked.
        paths: Its `sys.path`; an empty entry is the working folder.
        interpreter: What decides which wheels it can load; None of one before 3.7.
        torch: None where it is not installed.
        fault: Why it could not be asked.
    """

    version: tuple[int, int] | None = None
    paths: tuple[str, ...] = ()
    interpreter: Interpreter | None = None
    torch: Torch | None = None
    fault: str | None = None


def ask(python: Path, flags: tuple[str, ...] = ()) -> Answer:
    """Ask a Python, started with these flags, for its version, its path and its torch."""
    try:
        done = subprocess.run(
            [str(python), *flags, "-c", _script()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        told = _told(late.stdout or b"")
        ending = f"gave no answer within {_TIMEOUT_SECONDS} s"
    except OSError as error:
        return Answer(fault=f"cannot be started: {error.strerror or error}")
    else:
        told = _told(done.stdout)
        ending = f"ended its process with status {done.returncode}"
    if "version" not in told:
        return Answer(fault=ending)
    major, minor = told["version"]
    return Answer(
        version=(int(major), int(minor)),
        paths=tuple(told["paths"]),
        interpreter=_interpreter(told.get("interpreter")),
        torch=_torch(told.get("torch"), ending),
    )


def _script() -> str:
    """The program that is asked; it has our module with it, for a Python without this package."""
    return _SCRIPT.format(fitting=Path(fitting.__file__).read_text(encoding="utf-8"))


def _interpreter(told: dict[str, Any] | None) -> Interpreter | None:
    if told is None:
        return None
    # JSON has no tuples.
    fields: Any = {n: tuple(own) if isinstance(own, list) else own for n, own in told.items()}
    return Interpreter(**fields)


def _told(output: bytes) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for line in output.decode("utf-8", "replace").splitlines():
        if line.startswith(_MARK):
            told |= json.loads(line[len(_MARK) :])
    return told


def _torch(told: dict[str, Any] | None, ending: str) -> Torch | None:
    if told is None:
        return Torch(error=f"importing it {ending}")
    error = told.get("error")
    if error is not None:
        return None if error == _NOT_INSTALLED else Torch(error=error)
    gpus = (
        Gpu(name=name, capability=(major, minor), memory_bytes=memory)
        for name, major, minor, memory in told["gpus"]
    )
    return Torch(
        version=told["version"],
        cuda=told["cuda"],
        is_available=told["is_available"],
        gpus=tuple(gpus),
        warning=told["warning"] or None,
    )
