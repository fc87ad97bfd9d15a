"""Models that compile nodes compile: each run gets exactly the LoRAs of its branch."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

import qwenlora

from . import test_nodes
from .test_nodes import A, B, load

# The fixtures of the nodes' own tests.
bench, files, pack = test_nodes.bench, test_nodes.files, test_nodes.pack

# What torch warns of while it compiles differs from version to version.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("no_graphs_of_other_tests"),
]

CLOSE = 1e-5
MODEL, BLOCKS, PATCHES = "the model", "its blocks", "its blocks as object patches"
WAYS = [MODEL, BLOCKS, PATCHES]


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


class Compiler:
    """Compiles a MODEL as nodes do, and samples it in one step without guidance."""

    def __init__(self, bench, backend):
        self.bench, self.backend, self.expected = bench, backend, {}

    def compile(self, model, way):
        """As ComfyUI's node does, KJNodes' with its blocks one by one, or KJNodes' of before."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        clone = model.clone()
        count = len(model.model.diffusion_model.transformer_blocks)
        blocks = [f"diffusion_model.transformer_blocks.{index}" for index in range(count)]
        if way == PATCHES:
            for key in blocks:
                block = clone.get_model_object(key)
                clone.add_object_patch(key, torch.compile(block, backend=self.backend))
        else:
            keys = ["diffusion_model"] if way == MODEL else blocks
            set_torch_compile_wrapper(clone, backend=self.backend, keys=keys)
        return clone

    def lora(self, model, *chain):
        """What our nodes make of a MODEL."""
        self.bench.sources["model"] = self.bench.graph.source(model)
        (made,) = self.bench.models(one=list(chain))
        return made

    def sample(self, model):
        return self.bench.qwen.ksample(model, seed=5, steps=1, cfg=1.0)

    def check(self, model, *loras):
        """Assert that a MODEL gives what a fresh one gives that is not compiled."""
        if loras not in self.expected:
            twin = self.bench.fresh()
            qwenlora.compose_loras(twin.model.diffusion_model, list(loras))
            self.expected[loras] = self.sample(twin)
        wanted = self.expected[loras]
        error = float((self.sample(model) - wanted).norm() / wanted.norm())
        assert error < CLOSE, f"{loras}: {error:.3g}"


@pytest.fixture
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()  # compiled modules and the patchers that hold them are cycles
    gc.freeze()  # the compiler stays imported


@pytest.fixture
def small(bench, qwen, nunchaku):
    """The bench with a model of one block."""

    def fresh():
        return nunchaku.emulated_qwen(qwen.small_qwen(num_layers=1))

    bench.model, bench.fresh = fresh(), fresh
    bench.sources["model"] = bench.graph.source(bench.model)
    return bench


@pytest.fixture
def graphs():
    return Graphs()


@pytest.fixture
def nodes(small, graphs):
    return Compiler(small, graphs)


@pytest.fixture
def lora(files):
    return SimpleNamespace(a=files[A], b=files[B])


def test_reconciling_comes_before_whatever_puts_compiled_modules_in_place(nodes):
    from comfy.patcher_extension import WrappersMP

    def keys(model):
        return list(model.wrappers[WrappersMP.APPLY_MODEL])

    base = nodes.bench.model
    before = nodes.lora(nodes.compile(base, MODEL), load(A))
    after = nodes.compile(nodes.lora(base, load(A)), MODEL)
    assert keys(before) == keys(after) == ["qwenlora", "torch.compile"]
    longer = nodes.lora(after, load(B))
    assert keys(longer) == ["qwenlora", "torch.compile"]
    assert len(longer.get_all_wrappers(WrappersMP.APPLY_MODEL)) == 2


@pytest.mark.parametrize("way", [MODEL, BLOCKS, pytest.param(PATCHES)])
def test_compiled_after_the_lora(nodes, lora, way):
    model = nodes.compile(nodes.lora(nodes.bench.model, load(A)), way)
    nodes.check(model, (lora.a, 1.0))


@pytest.mark.parametrize("way", [BLOCKS, pytest.param(PATCHES)])
def test_compiled_before_the_lora(nodes, lora, way):
    model = nodes.compile(nodes.bench.model, way)
    nodes.check(nodes.lora(model, load(A)), (lora.a, 1.0))


@pytest.mark.parametrize("way", WAYS)
def test_run_before_the_first_lora(nodes, graphs, lora, way):
    model = nodes.compile(nodes.bench.model, way)
    nodes.check(model)
    assert graphs.count
    one = nodes.lora(model, load(A))
    two = nodes.lora(model, load(A, -0.5), load(B))
    for _ in range(2):
        nodes.check(one, (lora.a, 1.0))
        nodes.check(two, (lora.a, -0.5), (lora.b, 1.0))
        nodes.check(model)
    count = graphs.count
    for strength in (0.5, -0.25, 1.5):
        nodes.check(nodes.lora(model, load(A, strength)), (lora.a, strength))
        nodes.check(model)
    nodes.check(two, (lora.a, -0.5), (lora.b, 1.0))
    assert graphs.count == count


@pytest.mark.parametrize("way", [MODEL, BLOCKS])
def test_attention_that_breaks_the_graph(nodes, graphs, lora, nunchaku, monkeypatch, way):
    """Some kernels do: what lies behind them is traced apart."""
    whole = nunchaku.optimized_attention_masked

    def breaking(*args, **kwargs):
        torch._dynamo.graph_break()
        return whole(*args, **kwargs)

    monkeypatch.setattr(nunchaku, "optimized_attention_masked", breaking)
    model = nodes.compile(nodes.bench.model, way)
    nodes.check(model)
    assert graphs.count > 1
    one = nodes.lora(model, load(A))
    for _ in range(2):
        nodes.check(one, (lora.a, 1.0))
        nodes.check(model)
    count = graphs.count
    nodes.check(nodes.lora(model, load(A, 0.5)), (lora.a, 0.5))
    assert graphs.count == count


@pytest.mark.slow
def test_blocks_with_inductor(small, lora):
    nodes = Compiler(small, "inductor")
    model = nodes.compile(small.model, BLOCKS)
    nodes.check(model)
    for strength in (1.0, -0.5):
        nodes.check(nodes.lora(model, load(A, strength)), (lora.a, strength))
    nodes.check(model)


@pytest.mark.slow
def test_comfyuis_own_node(small, graph, lora):
    nodes = Compiler(small, "inductor")
    prompt = small.prompt(sample=False, bare=[], one=[load(A)])
    prompt["compile"] = graph.node("TorchCompileModel", model=["model", 0], backend="inductor")
    prompt["one 0"]["inputs"]["model"] = prompt["bare model"]["inputs"]["value"] = ["compile", 0]
    done = graph.run(prompt)
    assert done.success, done.error
    nodes.check(done.values["bare model"])
    nodes.check(done.values["one model"], (lora.a, 1.0))
