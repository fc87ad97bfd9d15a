"""Which wheel fits a Python, and the command that installs it, over systems that are not here."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import ClassVar

import pytest

from qwenlora.doctor import fitting
from qwenlora.doctor.fitting import Interpreter, fault_of, fit_of

REPOSITORY = Path(__file__).parent.parent
NODES = REPOSITORY / "comfy" / "qwenlora_nodes"
LINUX = Interpreter("cpython", (3, 12), False, 64, "linux", "x86_64", "glibc", (2, 36), (".so",))
WINDOWS = Interpreter("cpython", (3, 13), False, 64, "win32", "amd64", suffixes=(".pyd",))
MACOS = Interpreter("cpython", (3, 12), False, 64, "darwin", "arm64", suffixes=(".abi3.so",))


@pytest.mark.parametrize("name", ["fitting.py", "mend.py"])
def test_the_nodes_have_the_doctors_own_file(name):
    doctor = Path(fitting.__file__).parent
    assert (NODES / name).read_bytes() == (doctor / name).read_bytes()


def test_the_tags_are_those_that_wheels_are_made_for():
    targets = runpy.run_path(str(REPOSITORY / "release" / "targets.py"))["TARGETS"]
    assert sorted(fitting._TAGS.values()) == sorted(target.tag for target in targets)
    for target in targets:
        (python,) = (
            own for own in pythons() if fitting._TAGS[own[4], own[6], own[5]] == target.tag
        )
        assert fit_of(python, "1.2.3").file == target.wheel("1.2.3")


def pythons():
    """One Python for each system that has a wheel."""
    for system, libc, machine in fitting._TAGS:
        version = (2, 28) if libc == "glibc" else ()
        yield Interpreter("cpython", (3, 10), False, 64, system, machine, libc, version)


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12), (3, 13), (3, 14), (3, 15)])
@pytest.mark.parametrize("python", list(pythons()), ids=lambda own: " ".join(own[4:7]))
def test_one_wheel_fits_every_python(python, version):
    fit = fit_of(python._replace(version=version), "0.1.0")
    assert fit.file == fit_of(python, "0.1.0").file
    assert fit.text == f"The file for this system and Python is {fit.file}"


BUILD = "build it from its sources, which needs Rust (rustup.rs)"


@pytest.mark.parametrize(
    ("python", "why", "instead"),
    [
        (LINUX._replace(version=(3, 9)), "Python 3.9 is too old", "Python 3.10 or newer"),
        (LINUX._replace(version=(2, 7)), "Python 2.7 is too old", "Python 3.10 or newer"),
        (
            WINDOWS._replace(is_free_threaded=True),
            "Python 3.13t is free-threaded and lacks the stable ABI that they are built for",
            "run ComfyUI with the usual Python",
        ),
        (
            MACOS._replace(version=(3, 15), is_free_threaded=True),
            "Python 3.15t is free-threaded",
            "run ComfyUI with the usual Python",
        ),
        (WINDOWS._replace(bits=32, machine="win32"), "this is a 32-bit Python", "a 64-bit one"),
        (LINUX._replace(bits=32), "this is a 32-bit Python", "a 64-bit one"),
        (LINUX._replace(implementation="pypy"), "this is pypy 3.12", "CPython"),
        (LINUX._replace(libc_version=(2, 27)), "this system has glibc 2.27, and 2.28", BUILD),
        (LINUX._replace(machine="riscv64"), "none is made for this system (linux glibc", BUILD),
        (LINUX._replace(libc="", libc_version=()), "for this system (linux x86_64)", BUILD),
        (LINUX._replace(libc="musl", machine="armv7l"), "(linux musl armv7l)", BUILD),
        (MACOS._replace(system="freebsd14", machine="amd64"), "(freebsd14 amd64)", BUILD),
    ],
)
def test_no_wheel_fits_and_it_says_why(python, why, instead):
    fit = fit_of(python, "0.1.0")
    assert fit.file == ""
    assert why in fit.why
    assert instead in fit.instead
    assert fit.text == f"No wheel fits, because {fit.why}: {fit.instead}"
    # What needs another Python is not built either.
    assert fit.is_built == (instead == BUILD)


def test_the_running_python_fits():
    python = fitting.running_interpreter()
    assert python.version == sys.version_info[:2]
    assert python.suffixes
    assert python.name == f"Python {sys.version_info[0]}.{sys.version_info[1]}"


@pytest.mark.parametrize(
    ("python", "core", "tag", "fault"),
    [
        (LINUX, "_core.abi3.so", "cp310-abi3-manylinux_2_28_x86_64", ""),
        (LINUX, "_core.abi3.so", "cp310-abi3-linux_x86_64", ""),
        (LINUX, "_core.abi3.so", "", ""),
        (LINUX, "_core.abi3.so", "cp310-abi3-win_amd64", "(cp310-abi3-win_amd64)"),
        (LINUX, "_core.abi3.so", "cp310-abi3-manylinux_2_28_aarch64", "manylinux_2_28_aarch64)"),
        (LINUX, "_core.pyd", "", "is that of another system or Python (_core.pyd), in FOLDER"),
        (LINUX._replace(bits=32), "_core.abi3.so", "cp310-abi3-linux_i686", ""),
        (WINDOWS, "_core.pyd", "cp310-abi3-win_amd64", ""),
        (WINDOWS, "_core.pyd", "cp310-abi3-win_arm64", "(cp310-abi3-win_arm64)"),
        (
            WINDOWS,
            "_core.abi3.so",
            "cp310-abi3-macosx_11_0_arm64",
            "(cp310-abi3-macosx_11_0_arm64)",
        ),
        (MACOS, "_core.abi3.so", "cp310-abi3-macosx_11_0_arm64", ""),
        (MACOS, "_core.abi3.so", "cp310-abi3-macosx_11_0_universal2", ""),
        (MACOS, "_core.abi3.so", "cp310-abi3-macosx_10_12_x86_64", "macosx_10_12_x86_64)"),
        (LINUX, "_core.pyi", "", "lacks its Rust part"),
    ],
)
def test_files_tell_whether_what_is_installed_can_be_loaded(tmp_path, python, core, tag, fault):
    python = python._replace(suffixes=(".abi3.so",) if python.system != "win32" else (".pyd",))
    folder = tmp_path / "qwenlora"
    folder.mkdir()
    (folder / core).write_bytes(b"")
    if tag:
        (tmp_path / "qwenlora-0.1.0.dist-info").mkdir()
        (tmp_path / "qwenlora-0.1.0.dist-info" / "WHEEL").write_text(f"Tag: {tag}\n")
    found = fault_of(folder, python)
    assert fault in found.replace(str(folder), "FOLDER")
    assert bool(found) == bool(fault)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a library of Linux")
def test_a_library_that_is_cut_off_anywhere_is_found(tmp_path):
    from qwenlora import _core

    whole = Path(_core.__file__).read_bytes()
    folder = tmp_path / "qwenlora"
    folder.mkdir()
    library = folder / "_core.abi3.so"
    library.write_bytes(whole)
    assert fault_of(folder, LINUX._replace(suffixes=(".abi3.so",))) == ""
    for length in (4, 63, 64, 5000, len(whole) // 2, len(whole) - 1):
        library.write_bytes(whole[:length])
        said = fault_of(folder, LINUX._replace(suffixes=(".abi3.so",)))
        assert said == f"qwenlora is cut off, in {library}", length


# ---- what the nodes say ----


@pytest.fixture(scope="module")
def nodes():
    """The nodes' modules that need neither ComfyUI nor the package."""
    package = ModuleType("nodes_alone")
    package.__path__ = [str(NODES)]
    sys.modules["nodes_alone"] = package
    names = ("install", "wheel")
    found = {name: importlib.import_module(f"nodes_alone.{name}") for name in names}
    yield type("Nodes", (), found)
    for name in [own for own in sys.modules if own.partition(".")[0] == "nodes_alone"]:
        del sys.modules[name]


PORTABLE = PureWindowsPath("D:\\it's a disk\\ComfyUI_windows_portable")
PACK = PORTABLE / "ComfyUI" / "custom_nodes" / "ComfyUI-qwenlora"


@pytest.fixture
def portable(nodes):
    return nodes.install.Place(
        python=PORTABLE / "python_embeded" / "python.exe",
        has_pip=True,
        shell=nodes.install.Shell.CMD,
        requirements=PACK / "requirements.txt",
        sources=None,
        interpreter=WINDOWS,
    )


WHEEL = "The file for this system and Python is qwenlora-0.1.0-cp310-abi3-win_amd64.whl"
RELATIVE = "ComfyUI\\custom_nodes\\ComfyUI-qwenlora\\requirements.txt"


@pytest.mark.parametrize("shell", ["CMD", "POWERSHELL"])
def test_the_portable_builds_command_is_run_in_its_folder(nodes, portable, shell):
    assert nodes.install.advice(portable._replace(shell=nodes.install.Shell[shell])) == (
        f"{WHEEL}. Run this in D:\\it's a disk\\ComfyUI_windows_portable, then restart ComfyUI:"
        f" .\\python_embeded\\python.exe -s -m pip install -r {RELATIVE}"
    )


def test_words_with_blanks_are_quoted_for_the_shell(nodes, portable):
    spaced = portable._replace(requirements=PACK.parent / "my nodes" / "requirements.txt")
    told = nodes.install.advice(spaced, "--upgrade")
    assert told.endswith(
        '.\\python_embeded\\python.exe -s -m pip install --upgrade -r "ComfyUI\\custom_nodes\\my'
        ' nodes\\requirements.txt"'
    )
    # A pack that lies on another disk.
    other = PureWindowsPath("E:\\nodes\\requirements.txt")
    told = nodes.install.advice(portable._replace(requirements=other))
    assert told.endswith("-m pip install -r E:\\nodes\\requirements.txt")


@pytest.mark.parametrize(
    ("shell", "command"),
    [
        ("CMD", '"C:\\My Comfy\\.venv\\Scripts\\python.exe" -m pip install qwenlora'),
        ("POWERSHELL", "& 'C:\\My Comfy\\.venv\\Scripts\\python.exe' -m pip install qwenlora"),
    ],
)
def test_the_nodes_folder_alone_has_no_requirements(nodes, portable, shell, command):
    python = PureWindowsPath("C:\\My Comfy\\.venv\\Scripts\\python.exe")
    shell = nodes.install.Shell[shell]
    place = portable._replace(python=python, shell=shell, requirements=None)
    assert nodes.install.advice(place) == f"{WHEEL}. Run this, then restart ComfyUI: {command}"


def test_an_environment_without_pip_has_uv(nodes, portable):
    python = Path("/comfy/.venv/bin/python")
    place = portable._replace(
        python=python, shell=nodes.install.Shell.POSIX, has_pip=False, requirements=None
    )
    command = "uv pip install --python /comfy/.venv/bin/python qwenlora"
    assert nodes.install.advice(place).endswith(f": {command}")


def test_a_clone_is_built_where_no_wheel_fits(nodes, portable):
    place = portable._replace(
        python=Path("/usr/bin/python3"),
        shell=nodes.install.Shell.POSIX,
        sources=Path("/comfy/custom_nodes/ComfyUI-qwenlora"),
        interpreter=LINUX._replace(machine="riscv64"),
    )
    assert nodes.install.advice(place) == (
        "No wheel fits, because none is made for this system (linux glibc riscv64): build it from"
        " its sources, which needs Rust (rustup.rs). Run this, then restart ComfyUI:"
        " /usr/bin/python3 -m pip install /comfy/custom_nodes/ComfyUI-qwenlora"
    )


def test_where_another_python_is_needed_no_command_is_named(nodes, portable):
    place = portable._replace(interpreter=WINDOWS._replace(version=(3, 9)))
    assert nodes.wheel.find_fault(place) == (
        "qwenlora cannot run in ComfyUI's Python 3.9. No wheel fits, because Python 3.9 is too old:"
        " run ComfyUI with Python 3.10 or newer."
    )


def test_the_words_of_a_missing_library_of_windows(nodes, portable, tmp_path):
    said = "DLL load failed while importing _core: The specified module could not be found."

    class Package(ModuleType):
        __file__ = str(tmp_path / "qwenlora" / "__init__.py")

        @property
        def __version__(self):
            raise ImportError(said, name="_core")

    told = nodes.wheel._fault_of_core(Package("qwenlora"), portable)
    assert told == (
        f"qwenlora's Rust part cannot be loaded, in {tmp_path / 'qwenlora'} ({said[:-1]})."
        f" {WHEEL}. Run this in {PORTABLE}, then restart ComfyUI: .\\python_embeded\\python.exe -s"
        f" -m pip install --force-reinstall --no-deps -r {RELATIVE}"
    )


def test_what_the_package_says_of_torch_is_passed_on(nodes, portable):
    error = ImportError("qwenlora needs torch 2.5 or newer, but\n2.4.1 is installed", name="torch")
    told = nodes.wheel.fault_of_import(error, portable)
    assert told == "qwenlora needs torch 2.5 or newer, but 2.4.1 is installed"


def test_looking_for_pip_asks_no_finder_of_others(nodes, monkeypatch):
    """That of setuptools takes it for pip's start, and takes `distutils` out of the process."""

    class Finder:
        asked: ClassVar[list[str]] = []

        def find_spec(self, name, path=None, target=None):
            self.asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    nodes.install.here()
    assert Finder.asked == []
