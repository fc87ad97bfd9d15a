"""The node pack's modules for the browser that need no page, as they are, in Node.js."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
WEB = REPOSITORY / "comfy" / "qwenlora_nodes" / "web"
TESTS = REPOSITORY / "tests" / "browser" / "rows_logic.mjs"

node = shutil.which("node")


@pytest.mark.skipif(node is None, reason="needs Node.js: apt-get install nodejs")
def test_rows_without_a_page(tmp_path):
    # Outside of a package of modules Node.js takes them for scripts.
    shutil.copytree(WEB, tmp_path / "web")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    done = subprocess.run(
        [node, "--test", str(TESTS)],
        env={**os.environ, "QWENLORA_WEB": str(tmp_path / "web")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_word_is_there_in_both_languages():
    text = (WEB / "words.js").read_text(encoding="utf-8")
    english, chinese = text.split("const EN = {")[1].split("const ZH = {")
    keys = [
        [line.split('"')[1] for line in part.split("\n};")[0].splitlines() if '": ' in line]
        for part in (english, chinese)
    ]
    assert keys[0] == keys[1] == sorted(keys[0])
    sources = "".join(path.read_text(encoding="utf-8") for path in (WEB / "rows").glob("*.js"))
    sources += (WEB / "rows.js").read_text(encoding="utf-8")
    unused = [key for key in keys[0] if key.startswith("rows.") and f'"{key}"' not in sources]
    assert unused == []
