"""Nodes without a wheel, or with one that is of no use: what the person reads, what is not lost.

Each case runs in a process of its own, in which only the real ComfyUI is imported before.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from qwenlora.doctor.fitting import fit_of, running_interpreter

from .comfy_host import comfy_root
from .test_nodes import OURS, PACK, REPOSITORY, SAVED
from .write_shapes import SHAPES, put_marks, shape_of, text_of

DRIVER = Path(__file__).with_name("forked.py")
PACKAGE = REPOSITORY / "python" / "qwenlora"
ALL = sorted(OURS | SAVED)
RIVAL = """
class Rival:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "rivals"
NODE_CLASS_MAPPINGS = {"NunchakuQwenImageLoraStackV3": Rival}
"""
pytestmark = pytest.mark.slow
needs_fork = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the sentences are Linux's"
)


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


CHAIN = {
    "model": node("HostSource", key="none"),
    "one": node("QwenLoraLoader", model=["model", 0], lora_name="gone.safetensors", strength=500),
    "rows": node("QwenLoraStack", model=["one", 0], loras={"__value__": [{"lora_name": "x"}]}),
    # As a file of another version has them: a name where a number belongs.
    "old": node("NunchakuQwenImageLoraStackV3", model=["rows", 0], lora_strength_1="a.safetensors"),
    "sink": node("HostSink", value=["old", 0], name="sink"),
}
LOOK = {"look": node("QwenLoraInspect", lora_name="a.safetensors")}
MERGE = {
    "model": node("HostSource", key="none"),
    "merge": node("QwenLoraMerge", model=["model", 0], filename_prefix="loras/x"),
}


# ---- packages that are not what they should be ----


def package(folder: Path, *, version: str | None = None, without: str = "") -> Path:
    """A copy of the package, by links; of another version, without a module or folder of it."""
    copy = folder / "qwenlora"
    copy.mkdir(parents=True)
    for own in PACKAGE.iterdir():
        if own.name not in (without, "__init__.py", "__pycache__"):
            (copy / own.name).symlink_to(own)
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    text += f"\n__version__ = {version!r}\n" if version else ""
    (copy / "__init__.py").write_text(text, encoding="utf-8")
    return folder


def with_core(folder: Path, name: str, content: bytes, tag: str) -> Path:
    """A copy with another Rust part, and the metadata of the wheel that it came in."""
    package(folder, without="_core.abi3.so")
    (folder / "qwenlora" / name).write_bytes(content)
    metadata = folder / "qwenlora-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: cp310-abi3-{tag}\n")
    return folder


def another(folder: Path) -> Path:
    """A folder of that name that is something else."""
    (folder / "qwenlora").mkdir(parents=True)
    (folder / "qwenlora" / "__init__.py").write_text('"""Somebody\'s."""\n')
    return folder


def another_file(folder: Path) -> Path:
    """A module of that name."""
    folder.mkdir(parents=True)
    (folder / "qwenlora.py").write_text("")
    return folder


def cut_off(folder: Path, below: str, name: str) -> Path:
    """A copy with a file of Python's that ends in the middle."""
    package(folder)
    inner = folder / "qwenlora" / below
    if inner.is_symlink():
        whole = inner.resolve()
        inner.unlink()
        shutil.copytree(whole, inner)
    lines = "\n" * (below != ".") + "from x import ("
    (inner / name).write_text(lines, encoding="utf-8")
    return folder


def nodes_with(folder: Path, name: str, text: str | None) -> Path:
    """The pack, where a file of the nodes is missing or holds this."""
    pack = folder / "custom_nodes" / "ComfyUI-qwenlora"
    nodes = pack / "comfy" / "qwenlora_nodes"
    shutil.copytree(REPOSITORY / "comfy" / "qwenlora_nodes", nodes)
    shutil.copy(REPOSITORY / "__init__.py", pack)
    (nodes / name).unlink()
    if text is not None:
        (nodes / name).write_text(text, encoding="utf-8")
    return pack


def for_arm(core: bytes) -> bytes:
    """A library that says that it is built for another machine."""
    return core[:18] + (183).to_bytes(2, "little") + core[20:]


@pytest.fixture(scope="module")
def results(tmp_path_factory, Draft):
    """What became of each case; processes of one run of the tests share it."""
    try:
        comfy_root()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    base = shared / "stubs"
    with FileLock(shared / "stubs.lock"):
        if not base.exists():
            base.mkdir()
            (base / "loras").mkdir()
            Draft.full(1, rank=4, blocks=2).save(base / "loras" / "a.safetensors")
            run_cases(base, cases(base))
    return Results(base)


NODES = {
    "a node's file is cut off": ("course.py", "("),
    "a node's file is missing": ("course.py", None),
    "comfy lacks a module": ("course.py", "import comfy.no_such_part\n"),
    "comfy lacks a name": ("course.py", "from comfy.utils import no_such_name\n"),
    "a module is missing": ("course.py", "import no_such_module\n"),
    "the unforeseen": ("course.py", "{}[1]\n"),
}
"""Packs with a good wheel whose nodes cannot be imported: the file and what it holds."""


def cases(base: Path) -> dict[str, dict]:
    """By name: the folders that come first on Python's path, and the packs that are loaded."""
    places = base / "places"
    core = (PACKAGE / "_core.abi3.so").read_bytes()
    nothing = places / "nothing"
    paths = {
        "real": REPOSITORY / "python",
        "missing": nothing,
        "cut off": with_core(places / "1", "_core.abi3.so", core[: len(core) // 2], "linux_x86_64"),
        "broken": with_core(places / "2", "_core.abi3.so", b"no library", "linux_x86_64"),
        "no rust part": package(places / "3", without="_core.abi3.so"),
        "of windows": with_core(places / "4", "_core.pyd", b"MZ", "win_amd64"),
        "of arm": with_core(places / "5", "_core.abi3.so", for_arm(core), "manylinux_2_28_aarch64"),
        "older": package(places / "6", version="0.0.9"),
        "older without a module": package(places / "7", version="0.0.9", without="merge"),
        "older without all": package(places / "8", version="0.0.9", without="lora_set.py"),
        "newer": package(places / "9", version="9.0.0"),
        "newer without all": package(places / "10", version="9.0.0", without="lora_set.py"),
        "another": another(places / "11"),
        "another's file": another_file(places / "12"),
        "a file is cut off": cut_off(places / "13", "plan", "documents.py"),
        "its first file is cut off": cut_off(places / "14", ".", "__init__.py"),
        "a file is missing": package(places / "15", without="lora_set.py"),
    }
    pack = linked(base / "it's a disk" / "custom_nodes" / "ComfyUI-qwenlora")
    clone = linked(base / "clones" / "qwenlora")
    rival = base / "rival.py"
    rival.write_text(RIVAL)
    real, clones = paths["real"], clone.parent
    return {
        **{name: {"path": [path], "packs": [pack]} for name, path in paths.items()},
        **{
            name: {"path": [real], "packs": [nodes_with(base / str(number), *change)]}
            for number, (name, change) in enumerate(NODES.items())
        },
        "rival": {"path": [nothing], "packs": [rival, pack]},
        "clone": {"path": [clones, real], "packs": [clone]},
        "clone alone": {"path": [clones, nothing], "packs": [clone]},
        "two clones": {"path": [nothing], "packs": [pack, clone]},
        "old torch": {"path": [real], "packs": [pack], "torch": "2.4.1"},
    }


def linked(clone: Path) -> Path:
    """A clone of this repository."""
    clone.parent.mkdir(parents=True)
    clone.symlink_to(REPOSITORY, target_is_directory=True)
    return clone


def run_cases(base: Path, cases: dict[str, dict]) -> None:
    """Run all cases in one program."""
    (base / "results").mkdir()
    for case in cases.values():
        case.update(ids=ALL, prompts=[CHAIN, LOOK, MERGE])
    folders = {"base": base / "comfy", "result": base / "results", "loras": base / "loras"}
    request = base / "request.json"
    request.write_text(json.dumps({**folders, "cases": cases}, default=str), encoding="utf-8")
    # Without `-S` an editable installation would be found.
    packages = [own for own in sys.path if own.endswith(("site-packages", "dist-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", str(DRIVER), str(request)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    (base / "ended").write_text(f"{done.returncode} {done.stderr[-3000:]}")


class Results:
    """What came of the cases."""

    def __init__(self, base: Path) -> None:
        status, _, said = (base / "ended").read_text().partition(" ")
        if status == "3":
            pytest.skip(f"needs an editable installation: {said}")
        assert status == "0", said
        self._cases = json.loads((base / "request.json").read_text(encoding="utf-8"))["cases"]
        self._base = base

    def of(self, name: str) -> dict:
        result = json.loads((self._base / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert "failed" not in result, result["failed"]
        return result

    def told(self, name: str) -> list[str]:
        """The lines of the log, with short names of places."""
        return [f"{level}: {self._short(text, name)}" for level, text in self.of(name)["lines"]]

    def _short(self, text: str, name: str) -> str:
        case = self._cases[name]
        for long, short in [
            (case["packs"][-1].replace("'", "'\"'\"'"), "PACK"),
            (case["packs"][-1], "PACK"),
            (case["path"][-1], "PLACE"),
            (str(comfy_root()), "COMFY"),
            (sys.executable, "PYTHON"),
            (fit_of(running_interpreter(), "0.1.0").file, "WHEEL"),
            (f"Python {sys.version_info[0]}.{sys.version_info[1]}", "Python 3.x"),
        ]:
            text = text.replace(long, short)
        return text


FILE = "The file for this system and Python is WHEEL. Run this, then restart ComfyUI: "
FIRST = f"{FILE}PYTHON -m pip install -r 'PACK/requirements.txt'"
AGAIN = f"{FILE}PYTHON -m pip install --force-reinstall --no-deps -r 'PACK/requirements.txt'"
NEWER = f"{FILE}PYTHON -m pip install --upgrade --no-deps -r 'PACK/requirements.txt'"

STUBS = {
    "missing": f"qwenlora is not installed in ComfyUI's Python 3.x. {FIRST}",
    "cut off": f"qwenlora is cut off, in PLACE/qwenlora/_core.abi3.so. {AGAIN}",
    "broken": "qwenlora's Rust part cannot be loaded, in PLACE/qwenlora"
    f" (PLACE/qwenlora/_core.abi3.so: file too short). {AGAIN}",
    "no rust part": f"qwenlora lacks its Rust part, in PLACE/qwenlora. {AGAIN}",
    "of windows": "qwenlora is that of another system or Python (cp310-abi3-win_amd64), in"
    f" PLACE/qwenlora. {AGAIN}",
    "of arm": "qwenlora is that of another system or Python"
    f" (cp310-abi3-manylinux_2_28_aarch64), in PLACE/qwenlora. {AGAIN}",
    "older without all": "The nodes are 0.1.0, qwenlora is 0.0.9, which is too old for them."
    f" {NEWER}",
    "newer without all": "The nodes are 0.1.0, qwenlora is 9.0.0, which is too new for them:"
    " update the nodes, then restart ComfyUI",
    "another": "`import qwenlora` finds another, PLACE/qwenlora: give that another name if the"
    f" package is installed, too. {FIRST}",
    "another's file": "`import qwenlora` finds another, PLACE/qwenlora.py: give that another name"
    f" if the package is installed, too. {FIRST}",
    "a file is cut off": "qwenlora is broken (SyntaxError: '(' was never closed (documents.py,"
    f" line 2)). {AGAIN}",
    "its first file is cut off": "qwenlora is broken (SyntaxError: '(' was never closed"
    f" (__init__.py, line 1)). {AGAIN}",
    "a node's file is cut off": "the nodes' own files are broken, in PACK/comfy/qwenlora_nodes"
    " (SyntaxError: '(' was never closed (course.py, line 1)): install or update the nodes anew,"
    " then restart ComfyUI",
    "a node's file is missing": "the nodes' own files are broken, in PACK/comfy/qwenlora_nodes"
    " (ModuleNotFoundError: No module named 'PACK.comfy.qwenlora_nodes.course'): install or update"
    " the nodes anew, then restart ComfyUI",
    "comfy lacks a module": "this ComfyUI is too old or too new for the nodes (ModuleNotFoundError:"
    " No module named 'comfy.no_such_part'): update both",
    "comfy lacks a name": "this ComfyUI is too old or too new for the nodes (ImportError: cannot"
    " import name 'no_such_name' from 'comfy.utils' (COMFY/comfy/utils.py)): update both",
    "a module is missing": "No module named 'no_such_module'",
    "a file is missing": "qwenlora is broken (ModuleNotFoundError: No module named"
    f" 'qwenlora.lora_set'). {AGAIN}",
}
"""The sentence of each case in which no node can run."""

RUNNING = {
    "real": ["INFO: qwenlora 0.1.0: all nodes are there"],
    "older": [
        "WARNING: The nodes are 0.1.0, qwenlora is 0.0.9: they run, but it is older than they are."
        f" {NEWER}"
    ],
    "newer": [
        "INFO: the nodes are 0.1.0, qwenlora is 9.0.0: they run; update them, too, for what is new"
    ],
}
"""The log of each case in which all nodes run."""


def refusals(done: dict) -> dict[str, list[str]]:
    """What stands on each node that was refused."""
    return {
        name: [error["details"] for error in own["errors"]]
        for name, own in done["node_errors"].items()
    }


@needs_fork
@pytest.mark.parametrize("name", STUBS)
def test_the_log_and_each_node_say_what_is_wrong_and_what_to_do(results, name):
    assert results.told(name) == [f"ERROR: the nodes of qwenlora cannot run: {STUBS[name]}"]
    chain, look, merge = results.of(name)["done"]
    said = ["input_types - " + results.of(name)["lines"][0][1].partition(" cannot run: ")[2]]
    assert [own["status"] for own in (chain, look, merge)] == [400, 400, 400]
    # Once a node, whatever else is wrong with its values.
    assert refusals(chain) == {"one": said, "rows": said, "old": said}
    assert refusals(look) == {"look": said}
    assert refusals(merge) == {"merge": said}


@needs_fork
@pytest.mark.parametrize("name", STUBS)
def test_stubs_look_like_the_nodes(results, name):
    real, stubs = results.of("real"), results.of(name)
    assert stubs["loaded"] == real["loaded"] == [ALL]
    (line,) = stubs["lines"]
    for node_id in ALL:
        info = copy.deepcopy(stubs["info"][node_id])
        _, options = info["input"]["required"][info["input_order"]["required"][0]]
        assert line[1].endswith(f" cannot run: {options.pop('qwenlora_fault')}")
        assert info == real["info"][node_id], node_id
    assert stubs["aliases"] == real["aliases"]
    assert stubs["kept_path"]


@needs_fork
def test_what_the_package_says_of_torch_stands_on_the_nodes(results):
    (line,) = results.told("old torch")
    said = "torch is 2.4.1 in PYTHON, and this needs torch 2.5 or newer: "
    assert line.startswith(f"ERROR: the nodes of qwenlora cannot run: {said}")
    assert refusals(results.of("old torch")["done"][0]).keys() == {"one", "rows", "old"}


@needs_fork
def test_a_fault_that_nobody_foresaw_has_stubs_and_its_place_in_the_log(results):
    *places, line = results.told("the unforeseen")
    assert "ERROR: loader_nodes cannot be imported" in places
    assert line == "ERROR: the nodes of qwenlora cannot run: KeyError: 1"
    assert results.of("the unforeseen")["loaded"] == [ALL]


@needs_fork
def test_stubs_answer_no_page(results):
    assert "/qwenlora/reports" in results.of("real")["routes"]
    assert "/qwenlora/reports" not in results.of("missing")["routes"]


@needs_fork
@pytest.mark.parametrize("name", RUNNING)
def test_all_nodes_run_beside_another_version_that_has_what_they_need(results, name):
    assert results.told(name) == RUNNING[name]
    chain, look, merge = results.of(name)["done"]
    assert refusals(chain).keys() == {"one"}
    assert look["success"], look["error"]
    # Without a model it runs into the ground, but it runs.
    assert (merge["status"], merge["error"]["node_id"]) == (200, "merge")


@needs_fork
def test_nodes_run_whose_part_an_older_version_has(results):
    name = "older without a module"
    sentence = f"The nodes are 0.1.0, qwenlora is 0.0.9, which is too old for them. {NEWER}"
    ids = "QwenLoraInspect, QwenLoraMerge"
    assert results.told(name) == [f"ERROR: {ids} cannot run: {sentence}"]
    chain, look, merge = results.of(name)["done"]
    assert refusals(chain).keys() == {"one"}
    for refused in (refusals(look)["look"], refusals(merge)["merge"]):
        (said,) = refused
        assert said.startswith("input_types - The nodes are 0.1.0, qwenlora is 0.0.9")
    faulty = [
        own for own, info in results.of(name)["info"].items() if "qwenlora_fault" in str(info)
    ]
    assert sorted(faulty) == ["QwenLoraInspect", "QwenLoraMerge"]
    assert "/qwenlora/reports" in results.of(name)["routes"]


@needs_fork
def test_a_pack_whose_node_works_keeps_its_id(results):
    rival, ours = results.of("rival")["loaded"]
    assert rival == ["NunchakuQwenImageLoraStackV3"]
    assert sorted(rival + ours) == ALL


@needs_fork
def test_a_clone_named_like_the_package_on_pythons_path(results):
    assert results.told("clone") == ["INFO: qwenlora 0.1.0: all nodes are there"]
    assert results.of("clone")["loaded"] == [ALL]
    chain, look, _ = results.of("clone")["done"]
    assert refusals(chain).keys() == {"one"}
    assert look["success"], look["error"]
    (line,) = results.of("clone alone")["lines"]
    assert "cannot run: qwenlora is not installed in ComfyUI's Python" in line[1]


@needs_fork
def test_a_second_clone_registers_nothing_more(results):
    assert results.of("two clones")["loaded"] == [ALL, []]
    chain, *_ = results.of("two clones")["done"]
    assert refusals(chain).keys() == {"one", "rows", "old"}


def test_the_shapes_are_those_of_the_nodes(host, graph):
    """`make shapes` writes them anew."""
    import nodes

    ids = graph.load_pack(PACK)
    marks = put_marks(host.base / "models")
    shapes = {name: shape_of(nodes.NODE_CLASS_MAPPINGS[name]) for name in sorted(ids)}
    for mark in marks:
        mark.unlink()
    assert SHAPES.read_text(encoding="utf-8") == text_of(shapes)
