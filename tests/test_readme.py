"""Every command and code block of the README is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qwenlora

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    return [line.partition("#")[0].strip() for line in lines]


def write_lora(path: Path, width: int, rank: int) -> None:
    key = "transformer_blocks.0.attn.to_q"
    down = torch.randn(rank, width, generator=torch.Generator().manual_seed(rank))
    save_file(
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": down.mT.contiguous()}, path
    )


def test_only_languages_that_are_run() -> None:
    assert {name for name, _ in BLOCKS} == {"", "sh", "bat", "python"}
    assert sum(name == "" for name, _ in BLOCKS) == 1  # the picture


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(tmp_path / "style.safetensors", 128, 4)
    write_lora(tmp_path / "lightning.safetensors", 128, 8)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    report, plan = names["report"], names["plan"]
    assert "2 LoRAs on 1 slot," in report.summary()  # type: ignore[attr-defined]
    assert plan["verdict"] == "reject"  # type: ignore[index]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("qwenlora-keys")])
def test_keys_commands(command: str, tmp_path: Path) -> None:
    write_lora(tmp_path / "style.safetensors", 3072, 4)
    program = Path(sys.executable).with_name("qwenlora-keys")
    assert program.exists(), "the console script is part of the package"
    run = subprocess.run(
        [program, *command.split()[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "transformer_blocks" in run.stdout or "APPLY" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("qwenlora merge")])
def test_merge_commands(command: str, tmp_path: Path) -> None:
    write_lora(tmp_path / "style.safetensors", 3072, 4)
    write_lora(tmp_path / "lightning.safetensors", 3072, 8)
    program = Path(sys.executable).with_name("qwenlora")
    run = subprocess.run(
        [program, *command.split()[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    output = re.search(r"-o (\S+)", command)
    assert output is not None
    assert (tmp_path / output[1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("qwenlora map")])
def test_map_commands(command: str, tmp_path: Path) -> None:
    write_lora(tmp_path / "style.safetensors", 3072, 4)
    write_lora(tmp_path / "lightning.safetensors", 3072, 8)
    program = [sys.executable, "-m", "qwenlora", *command.split()[1:]]
    run = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    output = re.search(r"-o (\S+)", command)
    if output is None:
        assert "1 module, median " in run.stdout
    else:
        assert (tmp_path / output[1]).exists()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make")])
def test_make_verbs_exist(command: str) -> None:
    # Run whole by CI itself; running them here would recurse.
    run = subprocess.run(["make", "-n", command.split()[1]], cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_command_that_builds(tmp_path: Path) -> None:
    (command,) = (c for c in commands() if c == "pip install .")
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("this environment has no pip")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    options += ["--no-build-isolation", "--target", str(tmp_path)]
    subprocess.run([*pip, *command.split()[1:], *options], cwd=ROOT, check=True)
    code = "import qwenlora; print(qwenlora.__version__, qwenlora.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [qwenlora.__version__, str(tmp_path / "qwenlora" / "__init__.py")]


def test_commands_are_all_run() -> None:
    known = ("qwenlora-keys ", "qwenlora map ", "qwenlora merge ", "make ")
    # Those of the section on installing are run by tests/release/test_readme_install.py.
    _, _, rest = README.partition("\n## Use\n")
    install = set(commands()) - {c for c in commands() if c in rest}
    assert all(command.startswith(known) for command in set(commands()) - install)
    assert len(install) == 7


def test_documents_do_not_shadow_the_host() -> None:
    # A package called `comfy` here would hide ComfyUI's own.
    assert not (ROOT / "comfy" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_links_lead_to_files() -> None:
    """They are whole addresses: the package's page on PyPI shows this text, too."""
    used = set(re.findall(r"\]\[([\w-]+)\]", README))
    defined = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", README, re.MULTILINE))
    assert used == defined.keys()
    home = "https://github.com/qwenlora/ComfyUI-qwenlora/blob/main/"
    for address in defined.values():
        path, _, anchor = address.removeprefix(home).partition("#")
        text = (ROOT / path).read_text(encoding="utf-8")
        heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert not anchor or anchor in {_anchor(head) for head in heads}, address
    assert re.findall(r"\]\((?!https://)[^)]*\)", README) == []


def _anchor(head: str) -> str:
    """A headline's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")


def test_relative_links_lead_somewhere() -> None:
    readmes = [ROOT / "examples" / "serve" / "README.md"]
    for document in [*readmes, *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name}: {link}"
