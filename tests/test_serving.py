"""Many LoRAs by name on one transformer: memory stays within its budgets, and stacks never mix."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qwenlora
from qwenlora import cache
from qwenlora.emulation.delay import SleepyWorkers
from qwenlora.work.workers import employ

from .pipelines import (
    dense_transformer,
    emulated,
    forward,
    picture,
    pipeline_of,
    tensors,
    tiny_vae,
)

COUNT = 100
MOST = 4
SCRIPTING = Path(__file__).parents[1] / "docs" / "scripting.md"


@pytest.fixture(scope="module")
def dense():
    return dense_transformer()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A hundred LoRAs of different ranks and layers."""
    folder = tmp_path_factory.mktemp("loras")
    found = {}
    for number in range(COUNT):
        paths = [("attn.to_q", "attn.to_v"), ("attn.to_q", "img_mlp.net.2")][number % 2]
        given = tensors(number, rank=4 + 4 * (number % 3), paths=paths)
        save_file(given, folder / f"{number}.safetensors")
        found[f"lora-{number}"] = folder / f"{number}.safetensors"
    return found


@pytest.fixture
def pipeline(dense, files):
    pipeline = qwenlora.attach(pipeline_of(emulated(dense), tiny_vae()))
    for name, file in files.items():
        pipeline.load_lora_weights(file, adapter_name=name)
    return pipeline


def stacks(files, count, *, seed):
    """Stacks of up to four, in any order, with weights."""
    draw = random.Random(seed)
    for _ in range(count):
        names = draw.sample(list(files), draw.randint(1, MOST))
        yield {name: draw.choice([0.25, 0.5, 1.0, -0.75]) for name in names}


def held(*, on_host):
    own = cache.pieces if on_host else cache.on_device
    return own.nbytes + cache.shelved_bytes(on_host=on_host)


def alone(dense, files, stack):
    """What a fresh model with this stack makes."""
    model = emulated(dense)
    specs = [qwenlora.LoraSpec(files[name], weight) for name, weight in stack.items()]
    qwenlora.compose_loras(model, specs)
    return forward(model)


@pytest.mark.slow
def test_any_stack_of_a_hundred(pipeline, dense, files):
    """Every one of them is asked for, most several times, and none is what another left."""
    limit = sum(file.stat().st_size for file in files.values()) // 5
    pipeline.qwenlora.wrapper.options = qwenlora.ComposeOptions(cache_bytes=limit)
    asked, most = set(), 0
    for turn, stack in enumerate(stacks(files, 150, seed=0)):
        pipeline.set_adapters(list(stack), list(stack.values()))
        found = forward(pipeline.transformer)
        asked |= set(stack)
        most = max(most, held(on_host=True))
        assert held(on_host=True) <= limit
        if turn % 10 == 0:
            assert torch.equal(found, alone(dense, files, stack))
            qwenlora.clear_cache()
            assert [lora.name for lora in pipeline.qwenlora.report.loras] == list(stack)
    assert len(asked) > 0.95 * COUNT
    assert most > limit // 2
    pipeline.set_adapters([])
    assert torch.equal(forward(pipeline.transformer), forward(emulated(dense)))


@pytest.mark.gpu
@pytest.mark.parametrize("kept_bytes", [0, 2 << 20])
def test_any_stack_of_a_hundred_on_a_gpu(pipeline, files, kept_bytes):
    pipeline.to("cuda")
    pipeline.qwenlora.wrapper.options = qwenlora.ComposeOptions(device_cache_bytes=kept_bytes)
    for stack in stacks(files, 60, seed=1):
        pipeline.set_adapters(list(stack), list(stack.values()))
        pipeline.qwenlora.compose()
        assert held(on_host=False) <= kept_bytes


def test_a_stack_that_is_kept_is_read_no_more(pipeline, files, reads):
    """Neither how many are attached nor how long ago it was matters, while it is kept."""
    stack = {"lora-3": 0.5, "lora-42": 1.0}
    pipeline.set_adapters(list(stack), list(stack.values()))
    pipeline.qwenlora.compose()
    for other in stacks(files, 5, seed=2):
        pipeline.set_adapters(list(other), list(other.values()))
        pipeline.qwenlora.compose()
    before = reads.tensors, reads.plans
    assert before[0] > 0
    pipeline.set_adapters(list(stack), list(stack.values()))
    pipeline.qwenlora.compose()
    assert (reads.tensors, reads.plans) == before


# ---- the worker of docs/scripting.md ----


def worker_of(pipeline, files):
    """The class as the page shows it."""
    (text,) = re.findall(
        r"^```python\n(import asyncio\n.*?class Worker.*?)^```$",
        SCRIPTING.read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
    names: dict[str, object] = {}
    exec(compile(text, "docs/scripting.md", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("slow_threads", [False, True])
def test_the_worker_never_mixes_stacks(dense, files, slow_threads):
    few = {name: files[name] for name in list(files)[:6]}
    chosen = list(stacks(few, 5, seed=3))
    plain = qwenlora.attach(pipeline_of(emulated(dense), tiny_vae()))
    for name, file in few.items():
        plain.load_lora_weights(file, adapter_name=name)
    expected = []
    for stack in chosen:
        plain.set_adapters(list(stack), list(stack.values()))
        expected.append(picture(plain))
    pipeline = pipeline_of(emulated(dense), tiny_vae())
    names = worker_of(pipeline, few)
    names["run"] = lambda pipeline, request: picture(pipeline)
    with employ(SleepyWorkers(seed=0)) if slow_threads else contextlib.nullcontext():
        worker = names["Worker"](pipeline, few)
        with ThreadPoolExecutor(8) as clients:
            asked = [
                clients.submit(lambda s=stack: worker.ask(s, {"prompt": "x"}).result(timeout=120))
                for stack in chosen * 4
            ]
            found = [one.result() for one in asked]
        with pytest.raises(ValueError, match="not in the list of present adapters"):
            worker.ask({"nobody": 1.0}, {}).result(timeout=120)
        asked = names["endpoint"](worker, chosen[0], {"prompt": "x"})
        assert torch.equal(asyncio.run(asked), expected[0])
        worker.close()
    assert all(map(torch.equal, found, expected * 4))
