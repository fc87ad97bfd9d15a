"""A clone named like the package gives way to it wherever `custom_nodes` is on Python's path."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = REPOSITORY / "python"
INSTALLED = str(PACKAGES / "qwenlora" / "__init__.py")


def clone(custom_nodes: Path) -> Path:
    """What Python sees of a clone named `qwenlora`."""
    (custom_nodes / "qwenlora").mkdir(parents=True)
    shutil.copy(REPOSITORY / "__init__.py", custom_nodes / "qwenlora")
    return custom_nodes


def run(text: str, *path: Path | str, cwd: Path | None = None) -> str:
    """Run a program with these folders on its path, and no other but Python's own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", text],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout + done.stderr.strip().rpartition("\n")[2]).strip()


ASK = "import qwenlora; print(qwenlora.__file__); qwenlora.read_keys"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "text",
    [
        ASK,
        "import qwenlora._core, sys; print(sys.modules['qwenlora'].__file__)",
        "from qwenlora.plan.documents import read_keys as r; import qwenlora as q;"
        "print(q.__file__); assert r is q.read_keys",
        "import sys; sys.modules['folder_paths'] = sys; " + ASK,
    ],
)
def test_the_installed_package_is_imported(tmp_path, order, text):
    path = [clone(tmp_path / "custom_nodes"), PACKAGES][::order]
    assert run(text, *path) == INSTALLED


def test_two_clones_and_the_working_folder(tmp_path):
    first, second = clone(tmp_path / "one"), clone(tmp_path / "two")
    assert run(ASK, first, second, first, PACKAGES, cwd=second) == INSTALLED


def test_a_link_to_the_clone(tmp_path):
    linked = tmp_path / "custom_nodes"
    linked.mkdir()
    try:
        (linked / "qwenlora").symlink_to(REPOSITORY, target_is_directory=True)
    except OSError:
        pytest.skip("links need a right that is not there")
    assert run(ASK, linked, PACKAGES) == INSTALLED


def test_without_the_package_the_import_says_so(tmp_path):
    first, second = clone(tmp_path / "one"), clone(tmp_path / "two")
    said = run("import qwenlora", first, second)
    assert said == (
        f"ModuleNotFoundError: the package `qwenlora` is not installed: {first / 'qwenlora'} holds"
        " its ComfyUI nodes only"
    )


def test_another_folder_of_that_name_is_not_taken_for_the_package(tmp_path):
    other = tmp_path / "other"
    (other / "qwenlora").mkdir(parents=True)
    (other / "qwenlora" / "__init__.py").write_text("")
    assert run(ASK, clone(tmp_path / "custom_nodes"), other, PACKAGES) == INSTALLED


@pytest.mark.parametrize(
    "file",
    [
        "__init__.py",
        *(
            f"comfy/qwenlora_nodes/{name}.py"
            for name in (
                "__init__",
                "fitting",
                "install",
                "mend",
                "registry",
                "stubs",
                "version",
                "wheel",
            )
        ),
    ],
)
def test_what_runs_without_the_package_runs_on_an_old_python(file):
    """As far as its grammar tells: ComfyUI itself runs on 3.9."""
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 9))
    assert "from __future__ import annotations" in text or "import" not in text
    assert "import qwenlora" not in text.replace("`import qwenlora`", "")
