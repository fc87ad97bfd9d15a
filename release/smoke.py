"""Checks an installed wheel: `python release/smoke.py [--torch]`, with the Python that has it.

Needs nothing but that Python. Without `--torch` it checks what works without PyTorch: the version,
reading keys, the programs and the doctor. With it, LoRAs are composed and measured, too, by the
light form of the demo.

Exit status: 0, or 1 after one sentence that says what does not work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

_WIDTH, _RANK = 3072, 4
_KEY = "transformer_blocks.0.attn.to_q"
_TIMEOUT_SECONDS = 600


class Failure(Exception):
    """Something does not work."""


def main() -> int:
    """Run the checks that the arguments ask for."""
    parser = argparse.ArgumentParser(description="Checks an installed wheel of qwenlora.")
    parser.add_argument("--torch", action="store_true", help="also compose LoRAs and measure them")
    has_torch = parser.parse_args().torch
    try:
        version = _check_version()
        with tempfile.TemporaryDirectory() as name:
            lora = Path(name) / "smoke.safetensors"
            _write_lora(lora)
            _check_read_keys(lora)
            _check_keys_programs(lora)
        _check_command(version)
        _check_doctor(version)
        if has_torch:
            _check_demo()
        elif importlib.util.find_spec("torch") is None:
            _check_sentence()
    except Failure as failure:
        sys.stderr.write(f"smoke: {failure}\n")
        return 1
    what = "with torch" if has_torch else "without torch"
    sys.stdout.write(f"smoke: qwenlora {version} works {what} in {sys.executable}\n")
    return 0


def _check_version() -> str:
    """The version that the package and its metadata agree on."""
    told = _python("import qwenlora; print(qwenlora.__version__)", "importing qwenlora")
    try:
        installed = importlib.metadata.version("qwenlora")
    except importlib.metadata.PackageNotFoundError as error:
        raise Failure(f"qwenlora is not installed in {sys.executable}") from error
    if told != installed:
        raise Failure(f"qwenlora.__version__ is {told}, but the wheel is {installed}")
    return told


def _write_lora(path: Path) -> None:
    """Write a LoRA of one layer, all zeros."""
    header, end = {}, 0
    for half, shape in (("lora_down", (_RANK, _WIDTH)), ("lora_up", (_WIDTH, _RANK))):
        begin, end = end, end + 2 * _RANK * _WIDTH
        row = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        header[f"{_KEY}.{half}.weight"] = row
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def _check_read_keys(lora: Path) -> None:
    told = _python(
        "import json, sys, qwenlora\n"
        "plan = qwenlora.read_keys(sys.argv[1])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "print(json.dumps(plan))",
        "read_keys",
        str(lora),
    )
    _expect_plan(told, "read_keys")


def _check_keys_programs(lora: Path) -> None:
    module = [sys.executable, "-I", "-m", "qwenlora", "keys"]
    for command in ([str(_program("qwenlora-keys"))], module):
        words = " ".join(command)
        _expect_plan(_output([*command, "--json", str(lora)], words), words)


def _check_command(version: str) -> None:
    program = str(_program("qwenlora"))
    told = _output([program, "--version"], program)
    if told != f"qwenlora {version}":
        raise Failure(f"`{program} --version` says `{told}`, not `qwenlora {version}`")


def _check_doctor(version: str) -> None:
    command = [sys.executable, "-I", "-m", "qwenlora", "doctor", "--json"]
    # Problems that it finds, as a missing torch, are not the wheel's.
    told = _output(command, "qwenlora doctor", statuses=(0, 1))
    try:
        findings = json.loads(told)["findings"]
    except (ValueError, KeyError) as error:
        raise Failure(f"qwenlora doctor --json gives no report, but {told[:200]!r}") from error
    found = [finding["text"] for finding in findings if finding["code"] == "qwenlora"]
    if not any(text.startswith(f"qwenlora {version} ") for text in found):
        raise Failure(f"qwenlora doctor does not see qwenlora {version}, but {found}")


def _check_demo() -> None:
    command = [sys.executable, "-I", "-m", "qwenlora", "demo", "--light"]
    sys.stdout.write(_output(command, "qwenlora demo --light") + "\n")


def _check_sentence() -> None:
    """Where torch is missing, one sentence says so."""
    told = _python(
        "import qwenlora\n"
        "try:\n"
        "    qwenlora.compose_loras\n"
        "except ImportError as error:\n"
        "    print(error)",
        "asking for compose_loras",
    )
    if not told.startswith("torch") or "missing" not in told or "qwenlora[torch]" not in told:
        raise Failure(f"compose_loras without torch does not say what is missing, but `{told}`")


def _expect_plan(text: str, source: str) -> None:
    try:
        plan = json.loads(text)
        seen = plan["verdict"], [module["target"] for module in plan["modules"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{source} gives no plan, but {text[:200]!r}") from error
    if seen != ("apply", [_KEY]):
        raise Failure(f"{source} plans {seen} where {_KEY} is to be applied")


def _program(name: str) -> Path:
    """A program that the wheel installs."""
    path = Path(sysconfig.get_path("scripts")) / (f"{name}.exe" if os.name == "nt" else name)
    if not path.is_file():
        raise Failure(f"the program {path} is missing")
    return path


def _python(code: str, what: str, *arguments: str) -> str:
    """The output of a program text, run by this Python on what is installed alone."""
    return _output([sys.executable, "-I", "-c", code, *arguments], what)


def _output(command: list[str], what: str, *, statuses: tuple[int, ...] = (0,)) -> str:
    # The programs are started without `-I`: no variable may lead them to another package.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT_SECONDS, env=environ, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"{what} cannot be run: {error}") from error
    talk = done.stderr.decode("utf-8", "replace").strip().splitlines()
    output = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode not in statuses:
        said = (talk or output.splitlines() or ["nothing"])[-1]
        raise Failure(f"{what} ends with status {done.returncode} and says: {said}")
    return output


if __name__ == "__main__":
    sys.exit(main())
