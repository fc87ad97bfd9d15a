"""The installed `qwenlora-keys` and `python -m qwenlora keys`, as users run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qwenlora

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
KEYS = ROOT / "tests" / "data" / "keys"
PAGE = ROOT / "docs" / "keys.md"
SCRIPT = shutil.which("qwenlora-keys", path=sysconfig.get_path("scripts"))
PROGRAMS = {
    "console script": [str(SCRIPT)],
    "module": [sys.executable, "-m", "qwenlora", "keys"],
}
BYTES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1}
COLUMNS = 80
posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals are POSIX's here")


def layout(name: str, path: Path) -> Path:
    """Write a layout of the corpus: its names, shapes and scalars over a hole of zeros."""
    document = json.loads((KEYS / f"{name}.json").read_text(encoding="utf-8"))
    header: dict[str, object] = {}
    if document.get("metadata"):
        header["__metadata__"] = document["metadata"]
    values, end = [], 0
    for row in document["tensors"]:
        length = BYTES[row["dtype"]]
        for side in row["shape"]:
            length *= side
        header[row["key"]] = {
            "dtype": row["dtype"],
            "shape": row["shape"],
            "data_offsets": [end, end + length],
        }
        if isinstance(row.get("value"), float | int):
            values.append((end, scalar(row["dtype"], row["value"])))
        end += length
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for offset, packed in values:
            file.seek(8 + len(text) + offset)
            file.write(packed)
    return path


def scalar(dtype: str, value: float) -> bytes:
    if dtype == "I64":
        return struct.pack("<q", int(value))
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack({"F64": "<d", "F32": "<f", "F16": "<e"}[dtype], value)


def run(program: str, *args: object, cwd: Path, env: dict[str, str] | None = None):
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    return subprocess.run(
        [*PROGRAMS[program], *map(str, args)],
        cwd=cwd,
        env=environment | (env or {}),
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=60,
    )


each_program = pytest.mark.parametrize("program", PROGRAMS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four files, one of them in a folder whose name is not ASCII, one broken."""
    layout("dot_a_b", tmp_path / "loras" / "style.safetensors")
    layout("reject_flux_like", tmp_path / "loras" / "flux.safetensors")
    layout("foreign_keys_mixed_in", tmp_path / "loras" / "ünï 名前" / "a b.safetensors")
    (tmp_path / "loras" / "cut.safetensors").write_bytes(struct.pack("<Q", 100) + b"{}")
    return tmp_path


def test_the_wheel_has_the_command() -> None:
    assert SCRIPT is not None


@each_program
@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["loras/style.safetensors"], 0),
        (["loras/ünï 名前/a b.safetensors"], 1),
        (["loras/flux.safetensors", "loras/style.safetensors"], 2),
        (["loras"], 3),
        (["--explain", "img_in.alpha"], 0),
        (["--explain", "nothing"], 1),
        (["--nonsense"], 64),
        ([], 64),
        (["--version"], 0),
    ],
)
def test_exit_status(program: str, args: list[str], status: int, folder: Path) -> None:
    result = run(program, *args, cwd=folder)
    assert result.returncode == status, result
    # stdout is data, stderr is talk; and no traceback anywhere.
    assert ("error: " in result.stderr) == (status in (3, 64))
    assert bool(result.stdout) == (status != 64)
    assert "Traceback" not in result.stdout + result.stderr


def test_both_ways_are_one_program(folder: Path) -> None:
    for args in (["loras"], ["--json", "loras"], ["--all", "loras/style.safetensors"], ["--help"]):
        first, second = (run(program, *args, cwd=folder) for program in PROGRAMS)
        assert (first.stdout, first.stderr) == (second.stdout, second.stderr)


@each_program
def test_a_folder_is_a_table(program: str, folder: Path) -> None:
    result = run(program, "loras", cwd=folder)
    head, *lines = result.stdout.splitlines()
    assert head.split()[:2] == ["VERDICT", "FILE"]
    assert [line.split()[0] for line in lines] == ["ERROR", "REJECT", "APPLY", "PARTIAL"]
    assert all(len(line) <= COLUMNS for line in [head, *lines])
    assert "\x1b" not in result.stdout + result.stderr
    summary = result.stderr.splitlines()[-1]
    assert summary == "4 files in `loras`: 1 apply, 1 partial, 1 reject, 1 unreadable"


@each_program
def test_json_is_what_read_keys_returns(program: str, folder: Path) -> None:
    path = folder / "loras" / "style.safetensors"
    (line,) = run(program, "--json", path, cwd=folder).stdout.splitlines()
    assert json.loads(line) == qwenlora.read_keys(path)
    lines = run(program, "--json", "loras", cwd=folder).stdout.splitlines()
    documents = [json.loads(line) for line in lines]
    assert [("error" in document) for document in documents] == [True, False, False, False]


@each_program
def test_any_path_is_taken(program: str, folder: Path) -> None:
    odd = [
        "-dash",
        "new\u2028line",
        "'quotes' & $HOME;",
        "[glob]*" if os.name == "posix" else "[x]",
    ]
    for name in odd:
        layout("dot_a_b", folder / f"{name}.safetensors")
        result = run(program, f"./{name}.safetensors", cwd=folder)
        assert result.returncode == 0, name
        # What a terminal would obey, or a reader take for another line, is escaped.
        assert "\u2028" not in result.stdout
    if os.name == "nt":
        assert run(program, "loras\\style.safetensors", cwd=folder).returncode == 0


@contextmanager
def begun(program: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The program while it writes: more is to come than a pipe holds."""
    path = layout("musubi_lora_full60", folder / "a.safetensors")
    with subprocess.Popen(
        [*PROGRAMS[program], "--json", path, path, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"{"
        yield process
        assert process.stderr.read() == b""


@posix
@each_program
def test_a_closed_pipe_ends_quietly(program: str, tmp_path: Path) -> None:
    with begun(program, tmp_path) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=30) == 0


@posix
@each_program
def test_ctrl_c_ends_it(program: str, tmp_path: Path) -> None:
    with begun(program, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT


@posix
@each_program
def test_colour_is_for_a_terminal(program: str, folder: Path) -> None:
    for environment, coloured in (
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ):
        shown = on_a_terminal(program, "loras/style.safetensors", folder, environment)
        assert ("\x1b[" in shown) == coloured, environment
        assert re.sub(r"\x1b\[[0-9;]*m", "", shown).startswith("APPLY")


def on_a_terminal(program: str, path: str, cwd: Path, environment: dict[str, str]) -> str:
    import pty

    primary, secondary = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    with subprocess.Popen(
        [*PROGRAMS[program], path],
        cwd=cwd,
        env=inherited | {"TERM": "xterm"} | environment,
        stdout=secondary,
    ) as process:
        os.close(secondary)
        shown = b""
        while True:
            try:
                part = os.read(primary, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.wait(timeout=30) == 0
    os.close(primary)
    return shown.decode()


def test_help_fits_a_terminal(folder: Path) -> None:
    text = run("console script", "--help", cwd=folder).stdout
    assert all(len(line) <= COLUMNS for line in text.splitlines())
    named = re.findall(r"docs/\S+\.md", text)
    assert named
    assert all((ROOT / page).is_file() for page in named)


@pytest.mark.parametrize(("word", "offer"), [("--col", "--color"), ("loras/st", ""), ("", "")])
def test_bash_completes(word: str, offer: str, folder: Path) -> None:
    bash = shutil.which("bash")
    if bash is None or os.name != "posix":
        pytest.skip("there is no bash")
    script = (
        'source <("$1" --completions bash) || exit 1; complete -p qwenlora-keys || exit 1\n'
        'COMP_WORDS=(qwenlora-keys "$2"); COMP_CWORD=1\n'
        '_qwenlora__keys qwenlora-keys "$2" qwenlora-keys; echo "${COMPREPLY[@]}"\n'
    )
    command = [bash, "--norc", "-c", script, "bash", str(SCRIPT), word]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result
    registered, offered = result.stdout.splitlines()
    # Where nothing is offered bash completes file names.
    assert "-o default" in registered
    assert "_qwenlora__keys" in registered
    assert offered == offer


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_take_the_script(shell: str, folder: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell}")
    path = folder / "script"
    path.write_text(run("console script", "--completions", shell, cwd=folder).stdout)
    result = subprocess.run([program, "-n", path], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# ---- docs/keys.md ----

SCREENS = re.findall(
    r"^```\n\$ (qwenlora-keys .*?)\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S
)
TABLE = ["dot_a_b", "ai_toolkit_dora", "lightning_f32_full60", "simpletuner_lycoris_lokr"]
TABLE += ["foreign_keys_mixed_in", "reject_flux_like", "z_image_musubi", "diffusers_peft_patterns"]


def shown_by(command: str, folder: Path) -> str:
    """What a terminal of 80 columns would show of both streams, without colour."""
    _, *args = command.split()
    for name in TABLE:
        layout(name, folder / "loras" / f"{name}.safetensors")
    for name in (arg for arg in args if arg.endswith(".safetensors")):
        layout(name.removesuffix(".safetensors"), folder / name)
    result = run("console script", *args, cwd=folder)
    return result.stdout + result.stderr


def test_the_page_has_screens() -> None:
    assert len(SCREENS) >= 4


@pytest.mark.parametrize(("command", "screen"), SCREENS)
def test_screens_of_the_page_are_the_program_s(command: str, screen: str, tmp_path: Path) -> None:
    assert screen == shown_by(command, tmp_path)


def test_fields_of_the_page_are_the_program_s(folder: Path) -> None:
    section = PAGE.read_text("utf-8").partition("## `--json`")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {field for row in rows for field in re.findall(r"`(\w+)`", row)}
    assert named == set(qwenlora.read_keys(folder / "loras" / "style.safetensors"))
