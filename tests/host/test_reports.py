"""Reports of runs: what a node sends to the page, and what the server keeps of it."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

REPOSITORY = Path(__file__).parents[2]
PACK = REPOSITORY / "comfy" / "qwenlora_nodes"
A, B, PART = "a.safetensors", "folder/b.safetensors", "part.safetensors"
WHOLE = "complete: 1 LoRA on "


@pytest.fixture
def files(host, Draft):
    """Two whole LoRAs, and one of which a part cannot be applied."""
    for name, seed in ((A, 1), (B, 2)):
        Draft.full(seed, rank=4, blocks=2).save(host.loras / name)
    Draft.full(3, rank=4, blocks=2).put("transformer_blocks.0.attn.to_q", "diff_b", 5).save(
        host.loras / PART
    )
    yield host.loras
    shutil.rmtree(host.loras)
    host.loras.mkdir()


@pytest.fixture
def pack(graph, files):
    return graph.load_pack(PACK)


@pytest.fixture
def reports(pack):
    """The pack's module of that name, under the name that the host made up."""
    return sys.modules[f"{PACK}.reports"]


@pytest.fixture
def source(graph, emulated_qwen):
    return graph.source(emulated_qwen)


@pytest.fixture
def ask(host, reports):
    """The reports that a page gets for a prompt, over HTTP; or the status of a refusal."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    async def post(body):
        app = web.Application()
        app.add_routes([own for own in host.server.routes if own.path == reports.PATH])
        async with TestClient(TestServer(app)) as client:
            answer = await client.post(reports.PATH, json=body)
            text = await answer.json()
        return text["reports"] if answer.status == 200 else answer.status

    return lambda prompt: host.wait(post({"prompt": prompt}))


def chain(graph, source, *names, strength=1.0, **more):
    """A prompt of chained loaders, with nodes "1", "2", ... and what takes the model."""
    prompt = {"source": source}
    link = ["source", 0]
    for number, name in enumerate(names, 1):
        node = graph.node("QwenLoraLoader", model=link, lora_name=name, strength=strength)
        prompt[str(number)] = node
        link = [str(number), 0]
    return {**prompt, "out": graph.sink("out", link), **more}


def sent(done):
    """What the page was sent for each node that ran: reports by node id."""
    return {
        data["node"]: data["output"]["qwenlora"][0]
        for event, data in done.events
        if event == "executed" and data["output"] and "qwenlora" in data["output"]
    }


# ---- what a node sends ----


def test_each_loader_sends_its_report(graph, source, pack):
    done = graph.run(chain(graph, source, A, B))
    assert done.success
    first, second = sent(done)["1"], sent(done)["2"]
    assert first["line"].startswith(WHOLE)
    assert first["complete"]
    assert second["line"].startswith("complete: 2 LoRAs on ")
    assert "b x 1" in second["text"]
    assert "\n" not in first["line"] + second["line"]


def test_what_is_left_out_stands_first(graph, source, pack):
    report = sent(graph.run(chain(graph, source, PART)))["1"]
    assert not report["complete"]
    assert report["line"].startswith("`part` lacks 1 (")
    assert "not applied: 1 x" in report["text"]


def test_nothing_active_is_said(graph, source, pack):
    report = sent(graph.run(chain(graph, source, A, strength=0.0)))["1"]
    assert report["complete"]
    assert (
        report["line"]
        == report["text"]
        == "no LoRA is active here: the model is passed on as it is"
    )


def test_every_loader_sends_one(graph, source, pack):
    ids = sorted(pack - {"QwenLoraInspect", "QwenLoraMerge"})
    prompt = {"source": source}
    for node_id in ids:
        inputs = {"lora_name": A} if node_id.endswith("Loader") else {"lora_name_1": A}
        prompt[node_id] = graph.node(node_id, model=["source", 0], **inputs)
        prompt[f"out {node_id}"] = graph.sink(node_id, [node_id, 0])
    done = graph.run(prompt)
    assert done.success, done
    assert sorted(sent(done)) == ids
    assert all(set(own) == {"line", "text", "complete"} for own in sent(done).values())


def test_the_inspector_sends_one(graph, pack, files):
    key = "transformer_blocks.0.attn.to_q.lora_{}.weight"
    pair = {key.format("A"): torch.ones(1, 3072), key.format("B"): torch.ones(3072, 1)}
    save_file(pair, files / A)
    save_file(
        {**pair, "transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(1, 3072)}, files / PART
    )
    nodes = {name: graph.node("QwenLoraInspect", lora_name=name) for name in (A, PART)}
    sinks = {f"out {name}": graph.sink(name, [name, 0]) for name in nodes}
    told = sent(graph.run({**nodes, **sinks}))
    assert (told[A]["complete"], told[PART]["complete"]) == (True, False)
    assert told[A]["line"] == f"apply: {A}"
    assert told[PART]["line"].startswith("partial: ")
    assert told[A]["text"].startswith(f"{A}: apply\n")


# ---- what the server keeps ----


def test_a_cached_result_has_its_report(graph, source, ask):
    prompt = chain(graph, source, A, B)
    first = sent(graph.run(prompt))
    again = graph.run(chain(graph, source, A, B))
    assert {"1", "2"} <= set(again.cached)
    assert not sent(again)
    assert ask(prompt) == first


def test_other_inputs_have_none(graph, source, ask):
    prompt = chain(graph, source, A, B)
    graph.run(prompt)
    weaker = chain(graph, source, A, B, strength=0.5)
    assert ask(weaker) == {}
    second = copy.deepcopy(prompt)
    second["2"]["inputs"]["strength"] = 0.5
    assert set(ask(second)) == {"1"}
    before = copy.deepcopy(prompt)
    before["1"]["inputs"]["lora_name"] = B
    assert ask(before) == {}
    elsewhere = copy.deepcopy(prompt)
    elsewhere["source"] = graph.source(object())
    assert ask(elsewhere) == {}


def test_an_edited_file_has_none(graph, source, files, ask, Draft):
    prompt = chain(graph, source, A)
    graph.run(prompt)
    assert set(ask(prompt)) == {"1"}
    Draft.full(9, rank=8, blocks=2).save(files / A)
    assert ask(prompt) == {}
    (files / A).unlink()
    assert ask(prompt) == {}


def test_back_and_forth_each_has_its_own(graph, source, ask):
    strong, weak = (chain(graph, source, A, strength=own) for own in (1.0, 0.25))
    told = [sent(graph.run(own))["1"] for own in (strong, weak)]
    assert "a x 0.25" in told[1]["text"]
    assert [ask(own)["1"] for own in (strong, weak)] == told


def test_what_the_page_writes_otherwise_is_the_same(graph, source, ask):
    """The page's prompt has whole numbers, envelopes, titles, and ids of its own."""
    rows = [{"lora_name": A, "strength": 0.5, "enabled": True}]
    boxed = {"__value__": copy.deepcopy(rows)}
    node = graph.node("QwenLoraStack", model=["source", 0], loras=boxed)
    told = sent(graph.run({"source": source, "1": node, "out": graph.sink("out", ["1", 0])}))
    page = {
        "7:8": {**source, "_meta": {"title": "x"}},
        "4": graph.node("QwenLoraStack", model=["7:8", 0], loras={"__value__": rows}),
    }
    assert ask(page) == {"4": told["1"]}
    told = sent(graph.run(chain(graph, source, A, strength=1.0)))
    assert ask(chain(graph, source, A, strength=1)) == {"1": told["1"]}


def test_the_oldest_go(reports, files):
    kept = reports.Reports(most=3)
    prompts = [
        {"1": {"class_type": "QwenLoraLoader", "inputs": {"strength": own}}} for own in range(4)
    ]
    for number, prompt in enumerate(prompts):
        kept.put(prompt, "1", {"line": str(number)})
    # Kept again, the second is the newest.
    kept.put(prompts[1], "1", {"line": "again"})
    kept.put({"1": {"class_type": "QwenLoraLoader", "inputs": {}}}, "1", {"line": "new"})
    found = [kept.of(prompt, {"QwenLoraLoader"}) for prompt in prompts]
    assert found == [{}, {"1": {"line": "again"}}, {}, {"1": {"line": "3"}}]


# ---- hostile questions ----


@pytest.mark.parametrize(
    "body", [None, [], "x", 3, {"1": {"class_type": ["QwenLoraLoader"], "inputs": {}}}]
)
def test_what_is_no_prompt_is_refused(ask, body):
    assert ask(body) == 400


@pytest.mark.parametrize(
    "inputs",
    [None, [], {"model": ["1", 0]}, {"model": ["2", 0]}, {"model": ["gone", 0]}],
    ids=["none", "list", "itself", "a cycle", "gone"],
)
def test_malformed_graphs_have_no_reports(ask, inputs):
    other = {"class_type": "X", "inputs": {"model": ["1", 0]}}
    assert ask({"1": {"class_type": "QwenLoraLoader", "inputs": inputs}, "2": other}) == {}


def test_a_long_chain_is_read(reports):
    prompt = {"0": {"class_type": "X", "inputs": {}}}
    for number in range(1, 20_000):
        inputs = {"a": [str(number - 1), 0], "b": [str(number - 1), 1]}
        prompt[str(number)] = {"class_type": "QwenLoraLoader", "inputs": inputs}
    assert reports.Signatures(prompt).of("19999") is not None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_signature_tells_values_and_links_apart(reports, data):
    """Equal signatures are of graphs that are equal but for the ids of their nodes."""
    value = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.text("ab", max_size=2))

    def graph():
        prompt = {}
        for number in range(data.draw(st.integers(1, 4))):
            inputs = {}
            for name in data.draw(st.lists(st.sampled_from("xy"), unique=True)):
                link = st.tuples(st.sampled_from(sorted(prompt)), st.integers(0, 1)).map(list)
                inputs[name] = data.draw(st.one_of(value, link) if prompt else value)
            prompt[str(number)] = {"class_type": data.draw(st.sampled_from("AB")), "inputs": inputs}
        return prompt

    def unfolded(prompt, node):
        """The tree of all that leads to a node, without ids."""
        inputs = {
            name: ["link", unfolded(prompt, own[0]), own[1]] if isinstance(own, list) else own
            for name, own in prompt[node]["inputs"].items()
        }
        return json.dumps([prompt[node]["class_type"], inputs], sort_keys=True)

    one, other = graph(), graph()
    last, other_last = max(one), max(other)
    same = reports.Signatures(one).of(last) == reports.Signatures(other).of(other_last)
    assert same == (unfolded(one, last) == unfolded(other, other_last))


# ---- where there is no server ----


def test_a_second_copy_of_the_pack_adds_no_route(host, graph, reports, tmp_path):
    """The host does not start with two routes of one path."""
    copied = shutil.copytree(PACK, tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__"))
    graph.load_pack(copied)
    reports.add_route()
    assert sum(getattr(own, "path", "") == reports.PATH for own in host.server.routes) == 1


def test_without_a_server_nothing_is_kept(reports, monkeypatch):
    monkeypatch.delitem(sys.modules, "server")
    reports.add_route()
    reports.keep({"line": ""})
