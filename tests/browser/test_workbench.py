"""The foundation of the other tests here: the page is ComfyUI's, and does what we rely on."""

from __future__ import annotations

import pytest

from .conftest import WAYS


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_workflow_runs_and_shows_its_hash(workbench):
    loader = workbench.add("QwenLoraLoader", (400, 100), lora_name="style.safetensors")
    nodes = workbench.chain(loader)
    first = workbench.hash_of(workbench.queue())
    assert len(first) == 8
    workbench.page.evaluate("(id) => { app.graph.getNodeById(id).mode = 4; }", loader)
    base = workbench.hash_of(workbench.queue())
    assert base not in ("", first)
    assert nodes["shown"] is not None
    assert workbench.problems == []
