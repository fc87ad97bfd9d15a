"""PyTorch stays the host's: what installing the wheel changes, and what is said where it lacks.

The host is an environment as ComfyUI's: a torch built for this machine, whose version has a local
tag, and an index that has a newer one of another build. Its packages hold nothing; to pip and uv,
which read names, versions and requirements, they are as real as those of gigabytes.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import sysconfig
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qwenlora
from qwenlora.requirements import OLDEST

from .conftest import ROOT
from .wheels import write_wheel

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

    from .environment import Environment

pytestmark = pytest.mark.slow

HOST = {"torch": "2.9.1+cpu", "numpy": "1.26.4", "safetensors": "0.6.2"}
NEWER = {"torch": "2.10.0", "numpy": "2.3.0", "safetensors": "0.7.0"}
VERSION = qwenlora.__version__
SMOKE = ROOT / "release" / "smoke.py"
THE_EXTRA = (
    'run `pip install "qwenlora[torch]"` (never into ComfyUI\'s Python: what is there is'
    " ComfyUI's, and comes with its updates)"
)
ASK = "import qwenlora\ntry:\n    qwenlora.{}\nexcept ImportError as error:\n    print(error)"


@pytest.fixture
def index(tmp_path: Path, wheel: Path) -> Path:
    """A folder of wheels in the place of an index: ours, and what is newer than the host's."""
    folder = tmp_path / "index"
    for name, version in NEWER.items():
        write_wheel(folder, name, version)
    shutil.copy(wheel, folder)
    return folder


@pytest.fixture
def torch_host(tmp_path: Path, new_environment: Callable[[str], Environment]) -> Environment:
    """An environment that holds what ComfyUI's holds."""
    environment = new_environment("host")
    has = [write_wheel(tmp_path / "has", name, version) for name, version in HOST.items()]
    environment.uv("install", *has)
    assert environment.packages() == set(HOST.items())
    return environment


# How people install, and how they mend an installation: all that is old, or all anew.
PIP = [
    pytest.param(["qwenlora"], id="pip"),
    pytest.param(["-r", str(ROOT / "requirements.txt")], id="pip-r"),
    pytest.param(["-U", "--upgrade-strategy", "eager", "qwenlora"], id="pip-upgrade"),
    pytest.param(["--force-reinstall", "qwenlora"], id="pip-force"),
    pytest.param(["qwenlora[torch]"], id="pip-extra"),
]
UV = [
    pytest.param(["qwenlora"], id="uv"),
    pytest.param(["-r", str(ROOT / "requirements.txt")], id="uv-r"),
    pytest.param(["-U", "qwenlora"], id="uv-upgrade"),
    pytest.param(["--reinstall", "qwenlora"], id="uv-reinstall"),
    pytest.param(["qwenlora[torch]"], id="uv-extra"),
]


@pytest.mark.parametrize("what", PIP)
def test_pip_changes_nothing_else(torch_host: Environment, index: Path, what: list[str]) -> None:
    torch_host.pip("install", "--find-links", index, *what)
    assert torch_host.packages() == {*HOST.items(), ("qwenlora", VERSION)}


@pytest.mark.parametrize("what", UV)
def test_uv_changes_nothing_else(torch_host: Environment, index: Path, what: list[str]) -> None:
    torch_host.uv("install", "--find-links", index, *what)
    assert torch_host.packages() == {*HOST.items(), ("qwenlora", VERSION)}


@pytest.mark.parametrize("extra", ["", "[torch]"])
@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_the_file_itself_changes_nothing_else(
    torch_host: Environment, wheel: Path, tool: str, extra: str
) -> None:
    getattr(torch_host, tool)("install", f"qwenlora{extra} @ {wheel.as_uri()}")
    assert torch_host.packages() == {*HOST.items(), ("qwenlora", VERSION)}


def test_a_hard_requirement_would_replace_torch(torch_host: Environment, index: Path) -> None:
    """What the tests above would show if the wheel required torch."""
    write_wheel(index, "hard", "1", requires=["torch>=2.5"])
    torch_host.uv("install", "--find-links", index, "-U", "hard")
    assert ("torch", NEWER["torch"]) in torch_host.packages()


def test_a_torch_before_its_release_stays(
    torch_host: Environment, index: Path, tmp_path: Path, wheel: Path
) -> None:
    """To a resolver 2.5.0a0 is older than 2.5; vendors ship such builds."""
    torch_host.uv("install", write_wheel(tmp_path / "vendor", "torch", "2.5.0a0+nv24.8"))
    before = torch_host.packages()
    torch_host.uv("install", "--find-links", index, "qwenlora")
    assert torch_host.packages() == {*before, ("qwenlora", VERSION)}


def test_versions_are_said_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Requires-Python"] == ">=3.10"
    extras = metadata.get_all("Provides-Extra")
    assert sorted(extras) == ["demo", "map", "serve", "torch"]
    found: dict[str, set[str]] = {extra: set() for extra in extras}
    for requirement in metadata.get_all("Requires-Dist"):
        what, _, extra = requirement.partition(" ; extra == ")
        # Without an extra there is no requirement.
        found[extra.strip("'\"")].add(what)
    torch = {f"{name}>={oldest}" for name, oldest in OLDEST.items()}
    assert found["torch"] == torch
    assert all(torch <= others for others in found.values())


@pytest.fixture
def bare(new_environment: Callable[[str], Environment], wheel: Path) -> Environment:
    """An environment that has the wheel and nothing else."""
    environment = new_environment("bare")
    environment.uv("install", wheel)
    return environment


def test_smoke_without_torch(bare: Environment) -> None:
    done = bare.run(SMOKE)
    assert (done.stdout, done.stderr) == (
        f"smoke: qwenlora {VERSION} works without torch in {bare.python}\n",
        "",
    )


def test_what_needs_torch_says_so(bare: Environment) -> None:
    names = ["compose_loras", "attach", "LoraSet", "emulation", "compat", "clear_cache"]
    said = {bare.run("-c", ASK.format(name)).stdout for name in names}
    assert said == {
        f"torch, safetensors and numpy are missing in {bare.python}, and this needs torch 2.5,"
        " safetensors 0.4.3 and numpy 1.24 or newer: install PyTorch for your GPU as"
        f" https://pytorch.org/get-started says, then {THE_EXTRA}\n"
    }


def test_what_needs_no_torch_works_without(bare: Environment) -> None:
    needing = {
        *("ComfyQwenImageWrapper", "LoraSet", "applied", "attach", "clear_cache", "compat"),
        *("compose_loras", "detach", "emulation", "reset_loras"),
    }
    code = (
        "import qwenlora\nfor name in qwenlora.__all__:\n    try: getattr(qwenlora, name)\n"
        "    except qwenlora.requirements.RequirementError: print(name)"
    )
    assert set(bare.run("-c", code).stdout.split()) == needing


COMMANDS = [
    (["merge", "a.safetensors", "-o", "b.safetensors"], "error: ", 69),
    (["map", "a.safetensors"], "error: ", 69),
    (["norms", "a.safetensors"], "error: ", 69),
    (["demo"], "qwenlora demo: ", 1),
    (["demo", "--light"], "qwenlora demo: ", 1),
]


def test_commands_that_need_torch_say_so(bare: Environment) -> None:
    for arguments, begin, status in COMMANDS:
        done = bare.run("-m", "qwenlora", *arguments, check=False)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr.startswith(f"{begin}torch, safetensors and numpy are missing in")
        assert done.stderr.count("\n") == 1
        assert bare.run("-m", "qwenlora", arguments[0], "--help").stderr == ""


def test_a_map_below_the_keys_needs_torch(bare: Environment) -> None:
    lora = _empty_lora(bare.folder / "a.safetensors")
    keys = bare.run("-m", "qwenlora", "keys", lora, check=False)
    done = bare.run("-m", "qwenlora", "keys", "--map", lora, check=False)
    assert done.returncode == 69
    assert done.stdout == keys.stdout != ""
    assert done.stderr.startswith("error: torch, safetensors and numpy are missing in")


def _empty_lora(path: Path) -> Path:
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    return path


def _asked(environment: Environment, name: str = "compose_loras") -> str:
    return environment.run("-c", ASK.format(name)).stdout


def _has(environment: Environment, **packages: str) -> None:
    """Give an environment packages of these names; each value is what its module runs."""
    for name, module in packages.items():
        version = {**NEWER, "torch": "2.9.1+cpu"}[name]
        environment.uv("install", write_wheel(environment.folder, name, version, module=module))


def test_each_package_is_named(bare: Environment, tmp_path: Path) -> None:
    _has(bare, numpy="", safetensors="")
    assert _asked(bare) == (
        f"torch is missing in {bare.python}, and this needs torch 2.5 or newer: install PyTorch for"
        f" your GPU as https://pytorch.org/get-started says, then {THE_EXTRA}\n"
    )
    _has(bare, torch="")
    shutil.rmtree(bare.site / "numpy")
    assert _asked(bare) == (
        f"numpy is missing in {bare.python}, and this needs numpy 1.24 or newer: {THE_EXTRA}\n"
    )
    old = [("torch", "2.4.1+cu121"), ("safetensors", "0.4.2")]
    bare.uv("install", *[write_wheel(tmp_path, name, version) for name, version in old])
    assert _asked(bare) == (
        f"numpy is missing, torch is 2.4.1+cu121 and safetensors is 0.4.2 in {bare.python}, and"
        " this needs torch 2.5, safetensors 0.4.3 and numpy 1.24 or newer: install PyTorch for your"
        f" GPU as https://pytorch.org/get-started says, then {THE_EXTRA}\n"
    )
    _has(bare, numpy="", safetensors="")
    assert _asked(bare) == (
        f"torch is 2.4.1+cu121 in {bare.python}, and this needs torch 2.5 or newer: install PyTorch"
        f" for your GPU as https://pytorch.org/get-started says, then {THE_EXTRA}\n"
    )


@pytest.mark.parametrize("version", ["2.4.1+cu121", "nightly"])
def test_one_that_is_too_old_among_all_that_are_there(bare: Environment, version: str) -> None:
    _has(bare, numpy="", safetensors="", torch="")
    (bare.site / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    assert _asked(bare) == (
        f"torch is {version} in {bare.python}, and this needs torch 2.5 or newer: install PyTorch"
        f" for your GPU as https://pytorch.org/get-started says, then {THE_EXTRA}\n"
    )


def test_what_an_uninstallation_leaves_behind_is_nothing(bare: Environment) -> None:
    _has(bare, numpy="", safetensors="")
    (bare.site / "torch" / "lib").mkdir(parents=True)
    assert _asked(bare).startswith("torch is missing in ")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("import no_such_part", "No module named 'no_such_part'"),
        ("raise OSError('libcudart.so.13: cannot open')", "libcudart.so.13: cannot open"),
        ("raise SystemError('half')", "SystemError('half')"),
        ("None.lib", "AttributeError(\"'NoneType' object has no attribute 'lib'\")"),
    ],
)
def test_a_broken_torch_keeps_its_words(bare: Environment, module: str, words: str) -> None:
    _has(bare, torch=module)
    assert _asked(bare) == (
        f"torch is installed in {bare.python}, but cannot be imported: {words}\n"
    )
    traceback = bare.run("-c", "import qwenlora.emulation", check=False).stderr
    assert "in <module>\n    " + module in traceback
    assert "The above exception was the direct cause" in traceback


def test_what_is_no_error_of_torch_is_left_alone(bare: Environment) -> None:
    _has(bare, torch="raise KeyboardInterrupt('a person says so')")
    done = bare.run("-c", "import qwenlora; qwenlora.compose_loras", check=False)
    assert done.stderr.endswith("KeyboardInterrupt: a person says so\n")


def test_importing_the_package_imports_nothing(bare: Environment) -> None:
    _has(bare, torch="raise SystemExit('imported')", numpy="raise SystemExit('imported')")
    bare.run("-c", "import qwenlora; qwenlora.read_keys; qwenlora.LoraSpec; qwenlora.errors")
    assert bare.run("-m", "qwenlora", "--version").stdout == f"qwenlora {VERSION}\n"


@pytest.mark.skipif(os.name == "nt", reason="links need a right that few have on Windows")
def test_smoke_with_torch_alone(bare: Environment) -> None:
    """The light demo on the real torch, without the packages of the full one."""
    _see_packages_of_this_python(bare, without=("qwenlora", "diffusers", "peft"))
    done = bare.run(SMOKE, "--torch")
    assert done.stdout.endswith(
        "all within bf16 rounding (1e-2); reset is bit-exact\n"
        f"smoke: qwenlora {VERSION} works with torch in {bare.python}\n"
    )
    done = bare.run("-m", "qwenlora", "demo", check=False)
    assert done.returncode == 1
    assert done.stderr == (
        'qwenlora demo: it needs diffusers and peft: run `pip install "qwenlora[demo]"`, or'
        " `qwenlora demo --light`, which does without them (No module named 'diffusers')\n"
    )


def _see_packages_of_this_python(environment: Environment, *, without: Sequence[str]) -> None:
    """Let an environment see what this Python has installed, but for some, behind its own."""
    links = environment.folder / "links"
    links.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.suffix != ".pth" and not path.name.startswith(tuple(without)):
            (links / path.name).symlink_to(path)
    (environment.site / "links.pth").write_text(f"{links}\n")


def _smoke_fails(environment: Environment) -> subprocess.CompletedProcess[str]:
    done = environment.run(SMOKE, check=False)
    assert done.returncode == 1
    return done


def test_smoke_says_what_is_wrong(bare: Environment) -> None:
    package = bare.site / "qwenlora"
    extension = next(path for path in package.glob("_core.*") if path.suffix != ".pyi")
    extension.rename(package / "gone")
    assert _smoke_fails(bare).stderr == (
        "smoke: importing qwenlora ends with status 1 and says: ImportError: the Rust part of"
        " qwenlora is not installed: run `pip install qwenlora`\n"
    )
    (package / "gone").rename(extension)
    program = next(bare.scripts.glob("qwenlora-keys*"))
    program.unlink()
    assert _smoke_fails(bare).stderr == f"smoke: the program {program} is missing\n"


def test_smoke_sees_another_version(bare: Environment) -> None:
    (metadata,) = bare.site.glob("qwenlora-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(re.sub(r"(?m)^Version: .*$", "Version: 9.9", text), encoding="utf-8")
    assert _smoke_fails(bare).stderr == (
        f"smoke: qwenlora.__version__ is {VERSION}, but the wheel is 9.9\n"
    )


def test_smoke_without_the_wheel(new_environment: Callable[[str], Environment]) -> None:
    assert _smoke_fails(new_environment("empty")).stderr == (
        "smoke: importing qwenlora ends with status 1 and says: ModuleNotFoundError: No module"
        " named 'qwenlora'\n"
    )
