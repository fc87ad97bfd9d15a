"""The registry's zip in a real ComfyUI: installed as ComfyUI-Manager does it, used, and removed.

Its folders have blanks and letters of other scripts. Its Python has ComfyUI's packages, pip and no
compiler, and the only index is a folder with our wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from ..browser.comfy_process import ComfyProcess
from ..browser.frontends import INSTALL, Frontend
from ..host.comfy_host import comfy_root
from .installation import COMPILERS, Installation
from .registry_tool import pack_for_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "comfy" / "qwenlora_nodes" / "web"
IDS = sorted(json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")))
NAME = "qwenlora"
"""The id in the registry, which names the folder."""
STYLE = "style.safetensors"
MACHINES_FAULTS = {"gpu-none", "no-loader", "nunchaku-missing"}
"""What the doctor says of any machine without a GPU and without Nunchaku."""
LOAD = """
import asyncio, json, sys

from comfy.cli_args import args

args.cpu = True
args.front_end_root = "."  # no page is asked for
import utils.extra_config  # first, as in main.py: `nodes` puts another `utils` on the path
import nodes, server

loop = asyncio.new_event_loop()
server.PromptServer(loop)
for folder in sys.argv[1:]:
    nodes.NODE_CLASS_MAPPINGS.clear()
    assert loop.run_until_complete(nodes.load_custom_node(folder)), folder
    print(json.dumps([nodes.get_module_name(folder), sorted(nodes.NODE_CLASS_MAPPINGS)]))
"""


class Installed:
    """The installation with our pack in it.

    Attributes:
        before: Packages and files that were there before.
        folder: The pack's folder.
        comfy: The running ComfyUI.
    """

    def __init__(self, own: Installation, pack: Path, frontend: Path) -> None:
        self.own = own
        self.before = own.packages(), own.files()
        self.folder = own.install(pack, NAME)
        down, up = torch.ones(1, 3072), torch.ones(3072, 1)
        key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
        tensors = {key.format("A"): down, key.format("B"): up}
        save_file(tensors, str(own.root / "models" / "loras" / STYLE))
        self.comfy: ComfyProcess = own.start(frontend)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Installed]:
    base = tmp_path_factory.mktemp("user")
    pack = base / "node.zip"
    pack_for_registry(ROOT, pack)
    frontend = Frontend.OLDEST.folder
    if not frontend.is_dir():
        pytest.skip(f"needs ComfyUI's frontend: {INSTALL}")
    root = base / "Bilder und Töne" / "コンフィ ui"
    try:
        own = Installation.make(root, base / "home", wheel.parent)
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    made = Installed(own, pack, frontend)
    yield made
    made.comfy.stop()
    # Links to all of its packages: nobody will look at them.
    shutil.rmtree(base)


def test_our_wheel_is_all_that_comes(installed: Installed, wheel: Path) -> None:
    assert not any(shutil.which(name, path=installed.own.environ["PATH"]) for name in COMPILERS)
    assert installed.own.packages() - installed.before[0] == {
        ("qwenlora", wheel.name.split("-")[1])
    }
    assert installed.before[0] <= installed.own.packages()


def test_every_node_is_there(installed: Installed) -> None:
    classes = installed.comfy.request("/object_info")
    ours = [
        name for name, own in classes.items() if own["python_module"] == "custom_nodes.qwenlora"
    ]
    assert sorted(ours) == IDS
    assert len(IDS) == 14
    assert f"(IMPORT FAILED): {installed.folder}" not in installed.comfy.log


def test_each_script_is_served_once(installed: Installed) -> None:
    comfy = installed.comfy
    listed = comfy.request("/extensions")
    for path in WEB.rglob("*.*"):
        name = path.relative_to(WEB).as_posix()
        if path.suffix == ".js":
            places = [own for own in listed if own.endswith(f"/{name}") and "/core/" not in own]
            assert places == [f"/extensions/{NAME}/{name}"]
        assert read(comfy, f"/extensions/{NAME}/{urllib.parse.quote(name)}") == path.read_bytes()


def test_words_templates_and_blueprint_are_served(installed: Installed) -> None:
    comfy = installed.comfy
    words = comfy.request("/i18n")
    for language in ("en", "zh"):
        path = ROOT / "locales" / language / "nodeDefs.json"
        assert words[language]["nodeDefs"] == json.loads(path.read_text(encoding="utf-8"))
    templates = sorted((ROOT / "example_workflows").glob("*.json"))
    listed = comfy.request("/workflow_templates")
    assert {name: sorted(own) for name, own in listed.items()} == {
        NAME: [path.stem for path in templates]
    }
    for path in templates:
        for file in (path, path.with_suffix(".jpg")):
            assert read(comfy, f"/api/workflow_templates/{NAME}/{file.name}") == file.read_bytes()
    (own,) = comfy.request("/global_subgraphs").values()
    (path,) = (ROOT / "subgraphs").glob("*.json")
    assert (own["name"], own["info"]) == (path.stem, {"node_pack": f"custom_nodes.{NAME}"})


def test_a_prompt_runs(installed: Installed) -> None:
    inspect = {"class_type": "QwenLoraInspect", "inputs": {"lora_name": STYLE}}
    answer = installed.comfy.request("/prompt", {"prompt": {"1": inspect}})
    assert answer["node_errors"] == {}
    result = finished(installed.comfy, answer["prompt_id"])
    assert result["status"]["status_str"] == "success"
    (text,) = result["outputs"]["1"]["text"]
    assert text.startswith(f"{STYLE}: apply\n")


def test_the_doctor_finds_nothing_wrong(installed: Installed) -> None:
    own = installed.own
    # The program that pip made, whose first line has to name a Python with blanks in its path.
    program = own.python.parent / "qwenlora"
    done = subprocess.run(
        [program, "doctor", "--comfyui", own.root, "--json"],
        env=own.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    findings = json.loads(done.stdout)["findings"]
    codes = {finding["code"] for finding in findings if finding["severity"] == "problem"}
    assert codes <= MACHINES_FAULTS
    assert "qwenlora" in {own["code"] for own in findings if own["severity"] == "ok"}


def test_uninstalling_leaves_nothing(installed: Installed) -> None:
    """The last: it stops ComfyUI."""
    own = installed.own
    installed.comfy.stop()
    own.run("-m", "pip", "uninstall", "--yes", "qwenlora")
    shutil.rmtree(installed.folder)
    packages, files = installed.before
    assert own.packages() == packages
    assert files - own.files() == set()
    new = {str(Path(name).relative_to(own.root)) for name in own.files() - files}
    kept = ("log.txt", "input", "temp", "user", f"models/loras/{STYLE}")
    assert {name for name in new if not name.startswith(kept)} == set()
    assert not any("qwenlora" in name and not name.startswith("temp/") for name in new)


def test_a_clone_loads_under_any_name(tmp_path: Path) -> None:
    try:
        root = comfy_root()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    names = ["qwenlora", "ComfyUI-qwenlora", "my nodes", "ComfyUI-qwenlora-0.1.0", "クローン"]
    for name in names:
        (tmp_path / name).symlink_to(ROOT, target_is_directory=True)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *(tmp_path / name for name in names)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))
    assert list(loaded) == names
    assert loaded == dict.fromkeys(names, IDS)


def read(comfy: ComfyProcess, path: str) -> bytes:
    with urllib.request.urlopen(comfy.url + path, timeout=60) as answer:
        content: bytes = answer.read()
    return content


def finished(comfy: ComfyProcess, prompt_id: str) -> dict[str, Any]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found: dict[str, Any] = comfy.request(f"/history/{prompt_id}")
        if prompt_id in found:
            return found[prompt_id]
        time.sleep(0.1)
    raise AssertionError(comfy.log[-2000:])
