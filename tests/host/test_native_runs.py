"""What ComfyUI's LoRA nodes behind `QwenLoraEnable` leave as it was, run after run."""

from __future__ import annotations

import gc

import pytest
import torch

import qwenlora
import qwenlora.runtime

from . import test_compiled, test_native_proof, test_nodes
from .comfy_host import tensors_of
from .test_nodes import A, B, C
from .twins import CLOSE, ENABLE, error, native, ours

files, pack, twins = test_nodes.files, test_nodes.pack, test_native_proof.twins
no_graphs_of_other_tests = test_compiled.no_graphs_of_other_tests

HOOKED = {"positive": ["hooked", 0], "negative": ["avoided", 0]}


def two_hooks(twins):
    """A hook on each of both prompts: every step alternates between them."""
    return {
        "hook": twins.hook(A, 0.8),
        "hooked": twins.hooked("positive", ["hook", 0]),
        "other hook": twins.hook(B, 0.6),
        "avoided": twins.hooked("negative", ["other hook", 0]),
    }


def state_of(patcher):
    """Every tensor of a model, copied."""
    return {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ---- the base ----


def test_the_base_is_the_same_before_between_and_after(twins):
    base, before = twins.sample("packed"), state_of(twins.packed)
    nodes = two_hooks(twins)
    for chain in ([ENABLE, native(A, 0.8)], [ENABLE], [ours(B), native(C)], [native(A)]):
        twins.sample("packed", chain, nodes, **HOOKED)
        assert torch.equal(twins.sample("packed"), base)
        assert torch.equal(twins.sample("packed", [ENABLE]), base)
    assert_same(state_of(twins.packed), before)


def test_a_prompt_without_hooks_beside_one_with_hooks_is_the_base(twins):
    """Without guidance only the positive prompt is run, and that has no hook."""
    nodes = {
        "hook": twins.hook(A, 0.8),
        "avoided": twins.hooked("negative", ["hook", 0]),
    }
    found = twins.sample("packed", [ENABLE], nodes, negative=["avoided", 0], cfg=1.0)
    assert torch.equal(found, twins.sample("packed", cfg=1.0))


def test_the_base_and_two_ways_in_one_graph(twins):
    """One model, loaded once: nothing of one way reaches another."""
    ways = {
        "base": [],
        "loaded": [ENABLE, native(A, 0.8)],
        "enabled": [ENABLE],
        "mine": [ours(B, 0.5), native(C, -0.5)],
    }
    alone = {name: twins.sample("packed", chain) for name, chain in ways.items()}
    prompt = {}
    for name, chain in ways.items():
        made, model = twins.way(name, ["packed", 0], chain)
        prompt |= made | {f"{name} sampler": twins.ksampler(model)}
        prompt[f"{name} out"] = twins.graph.sink(name, [f"{name} sampler", 0])
    twins.graph.executor.reset()
    values = twins.run(prompt).values
    for name, expected in alone.items():
        assert torch.equal(values[name]["samples"], expected), name


def test_prompts_in_turns(twins):
    """The host keeps what a prompt does not change; each gives what it gave alone."""

    def prompt(chain, nodes, **links):
        made, model = twins.way("packed", ["packed", 0], chain)
        sampler = {"sampler": twins.ksampler(model, **links)}
        return {**nodes, **made, **sampler, "out": twins.graph.sink("out", ["sampler", 0])}

    prompts = {
        "hooks": prompt([ENABLE], two_hooks(twins), **HOOKED),
        "loader": prompt([ENABLE, native(A, 0.8)], {}),
        "weaker": prompt([ENABLE, native(A, 0.4)], {}),
        "bypassed": prompt([ENABLE], {}),
        "without": prompt([], {}),
        "ours": prompt([ours(B, 0.5), native(A, 0.8)], {}),
    }
    alone = {}
    for name, own in prompts.items():
        twins.graph.executor.reset()
        alone[name] = twins.run(own).values["out"]["samples"]
    assert torch.equal(alone["bypassed"], alone["without"])
    order = ("hooks", "loader", "without", "weaker", "loader", "bypassed", "hooks", "ours")
    for name in (*order, "loader", "without", "hooks"):
        found = twins.run(prompts[name]).values["out"]["samples"]
        assert torch.equal(found, alone[name]), name


def test_what_is_given_stays_as_it_is(twins):
    packed = twins.packed
    names, attributes = set(packed.model.state_dict()), dict(packed.__dict__)
    modules = set(packed.model.__dict__)
    twins.sample("packed", [ENABLE, native(A, 0.8)], two_hooks(twins), **HOOKED)
    assert set(packed.model.state_dict()) == names
    assert type(packed).__name__ == "EmulatedPatcher"
    assert packed.patches == {} == packed.hook_patches
    assert packed.wrappers == attributes["wrappers"]
    assert packed.model_options == attributes["model_options"]
    assert set(packed.model.__dict__) == modules


# ---- memory ----


def model_of(twins, chain, nodes=None, **sampler):
    """A MODEL that was sampled."""
    made, model = twins.way("packed", ["packed", 0], chain)
    prompt = {**(nodes or {}), **made, "sampler": twins.ksampler(model, **sampler)}
    prompt |= {"out": twins.graph.sink("out", ["sampler", 0])}
    prompt |= {"model": twins.graph.sink("model", model)}
    twins.graph.executor.reset()
    return twins.run(prompt).values["model"]


def announced(twins, chain, nodes=None, **sampler):
    """Bytes that a MODEL says it takes when it is loaded, beyond those of the bare one."""
    return model_of(twins, chain, nodes, **sampler).model_size() - twins.packed.model_size()


@pytest.mark.parametrize(
    ("chain", "same"),
    [
        ([ENABLE], []),
        ([ENABLE, native(A, 0.8)], [ours(A)]),
        ([ENABLE, native(A, 0.8), native(B), ENABLE], [ours(A), ours(B)]),
        ([ours(A, 0.8), native(B)], [ours(A), ours(B)]),
        ([native(A)], []),
    ],
)
def test_a_model_announces_what_our_own_loaders_would(twins, chain, same):
    found = announced(twins, chain)
    taken = qwenlora.applied(twins.packed.model.diffusion_model).added_bytes
    clone = model_of(twins, chain).clone().clone()
    assert clone.model_size() - twins.packed.model_size() == found
    assert found >= taken
    assert found == announced(twins, same)
    assert (taken > 0) == bool(same)


def test_hooks_are_announced_before_they_are_loaded(twins, monkeypatch):
    import comfy.model_management

    bare, seen = twins.packed.model_size(), []
    load = comfy.model_management.load_models_gpu

    def spy(models, *args, **kwargs):
        seen.extend(model.model_size() - bare for model in models)
        return load(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", spy)
    twins.sample("packed", [ENABLE, native(C)], two_hooks(twins), **HOOKED)
    monkeypatch.undo()
    assert seen == [announced(twins, [ours(A), ours(B), ours(C)])]


def test_200_alternations_of_two_hooks_grow_nothing(twins, graph):
    model = twins.packed.model

    def sizes():
        gc.collect()
        # Those that tests of compiled models left behind have no values.
        kinds = (torch.Tensor, torch.nn.Parameter)
        found = [own for own in gc.get_objects() if type(own) in kinds]
        storages = {}
        for storage in (tensor.untyped_storage() for tensor in found):
            storages[storage.data_ptr()] = max(
                storage.nbytes(), storages.get(storage.data_ptr(), 0)
            )
        modules = list(model.modules())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        buffers = sum(1 for _ in model.buffers())
        return len(found), sum(storages.values()), hooks, buffers

    nodes = two_hooks(twins)
    made, link = twins.way("packed", ["packed", 0], [ENABLE])
    seen = []
    for seed in range(5):
        twins.seed = seed
        sampler = twins.ksampler(link, steps=20, **HOOKED)
        prompt = {**nodes, **made, "sampler": sampler}
        prompt["out"] = graph.sink("out", ["sampler", 0])
        twins.run(prompt)
        seen.append(sizes())
    assert seen[1:] == seen[:1] * 4


@pytest.fixture
def keys(monkeypatch):
    """Keys of the stacks that the runtime composed, which keep no stack alive."""
    seen = []
    bring = qwenlora.runtime.bring

    def noting(module, wanted, **options):
        seen.append(hash(wanted.key))
        return bring(module, wanted, **options)

    monkeypatch.setattr("qwenlora.runtime.bring", noting)
    return seen


def in_turns(twins, chain, nodes=None, **links):
    """Three runs of which the host keeps all but the sampler."""
    made, link = twins.way("packed", ["packed", 0], chain)
    for seed in range(3):
        twins.seed = seed
        prompt = {**(nodes or {}), **made, "sampler": twins.ksampler(link, **links)}
        twins.run(prompt | {"out": twins.graph.sink("out", ["sampler", 0])})


def test_a_hook_of_the_run_before_is_the_same_lora(twins, keys):
    in_turns(twins, [ENABLE], two_hooks(twins), **HOOKED)
    assert len(set(keys)) == 2
    # Twice at each of four steps; the first of a run may be in place from the one before.
    assert 3 * 2 * 4 - 2 <= len(keys) <= 3 * 2 * 4


def test_one_hook_on_both_prompts_is_composed_once(twins, keys):
    nodes = two_hooks(twins)
    nodes["avoided"] = twins.hooked("negative", ["hook", 0])
    in_turns(twins, [ENABLE], nodes, **HOOKED)
    assert len(keys) == 1


def test_the_same_loader_again_composes_nothing(twins, keys):
    in_turns(twins, [ENABLE, native(A, 0.8), native(B)])
    assert len(keys) == 1


# ---- block offload ----


@pytest.mark.parametrize("resident", [1, 2])
def test_under_block_offload(graph, pack, files, qwen, nunchaku, resident):
    dense = qwen.small_qwen(num_layers=4)
    twins = test_native_proof.Twins(graph, qwen, dense, nunchaku.emulated_qwen(dense))
    base = twins.sample("packed")
    twins.packed.model.diffusion_model.set_offload(True, num_blocks_on_gpu=resident)
    for chain in ([], [native(C, 0.5)], [ours(C, 0.5)]):
        twins.agree(chain, two_hooks(twins), **HOOKED)
        assert error(twins.sample("packed"), base) < 1e-6
    twins.agree([native(A, 0.8), native(B, 0.3)])
    twins.packed.model.diffusion_model.set_offload(False)
    assert torch.equal(twins.sample("packed"), base)


# ---- compiled ----


def compiled(model):
    """As ComfyUI's node compiles, with a backend that needs no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="eager", keys=["diffusion_model"])
    return clone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_graphs_of_other_tests")
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_compiled_before_and_behind_the_enabling_node(graph, pack, files, qwen, nunchaku, before):
    dense = qwen.small_qwen(num_layers=1)
    twins = test_native_proof.Twins(graph, qwen, dense, nunchaku.emulated_qwen(dense))
    nodes, base = two_hooks(twins), twins.sample("packed")
    (chain, dense) = ([ENABLE, native(C, 0.5)], [native(C, 0.5)])
    expected = {
        "hooks": twins.sample("dense", dense, nodes, **HOOKED),
        "loader": twins.sample("dense", dense),
    }
    if before:
        model = compiled(twins.packed)
    else:
        made, link = twins.way("packed", ["packed", 0], [ENABLE])
        prompt = {**made, "model": twins.graph.sink("model", link)}
        model, chain = compiled(twins.run(prompt).values["model"]), chain[1:]
    twins.sources["packed"] = twins.graph.source(model)
    for _ in range(2):
        found = twins.sample("packed", chain, nodes, **HOOKED)
        assert error(found, expected["hooks"]) <= CLOSE
        assert error(twins.sample("packed", chain), expected["loader"]) <= CLOSE
        assert error(twins.sample("packed"), base) <= CLOSE


# ---- errors and interruptions ----


class Fault:
    """Does something at the nth run of a module, once."""

    def __init__(self, at, deed):
        self.left, self.deed = at, deed

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            self.deed()


def stop():
    import nodes

    nodes.interrupt_processing()


def fail():
    raise RuntimeError("injected")


@pytest.mark.parametrize("deed", [stop, fail])
@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_a_run_with_hooks_that_ends_early(twins, deed, at):
    nodes = two_hooks(twins)
    hooked, base = twins.sample("packed", [ENABLE], nodes, **HOOKED), twins.sample("packed")
    block = twins.packed.model.diffusion_model.transformer_blocks[1]
    handle = block.register_forward_pre_hook(Fault(at, deed))
    made, link = twins.way("packed", ["packed", 0], [ENABLE])
    prompt = {**nodes, **made, "sampler": twins.ksampler(link, **HOOKED)}
    prompt["out"] = twins.graph.sink("out", ["sampler", 0])
    twins.graph.executor.reset()
    done = twins.graph.run(twins.sources | prompt)
    handle.remove()
    assert not done.success
    again = twins.graph.run(twins.sources | prompt)
    assert again.success, again.error
    assert torch.equal(again.values["out"]["samples"], hooked)
    assert torch.equal(twins.sample("packed"), base)


def test_a_stop_while_a_hook_is_composed(twins, monkeypatch):
    nodes, host = two_hooks(twins), test_nodes.modules().host
    hooked, base = twins.sample("packed", [ENABLE], nodes, **HOOKED), twins.sample("packed")
    calls = []
    progress = host.progress

    def press_stop(phase, done, total):
        calls.append(phase)
        if len(calls) == 5:
            stop()
        progress(phase, done, total)

    monkeypatch.setattr(host, "progress", press_stop)
    made, link = twins.way("packed", ["packed", 0], [ENABLE])
    prompt = {**nodes, **made, "sampler": twins.ksampler(link, **HOOKED)}
    prompt["out"] = twins.graph.sink("out", ["sampler", 0])
    twins.graph.executor.reset()
    stopped = twins.graph.run(twins.sources | prompt)
    assert "execution_interrupted" in dict(stopped.events)
    again = twins.graph.run(twins.sources | prompt)
    assert torch.equal(again.values["out"]["samples"], hooked)
    assert torch.equal(twins.sample("packed"), base)


# ---- saving ----


def saved(twins, host, chain, name):
    """What `ModelSave` writes of a way's MODEL."""
    made, link = twins.way("packed", ["packed", 0], chain)
    prompt = {**made, "save": twins.graph.node("ModelSave", model=link, filename_prefix=name)}
    twins.run(prompt)
    (path,) = (host.base / "output").rglob(f"{name}_*.safetensors")
    return tensors_of(path)


NOT_ENABLED = pytest.mark.xfail(
    strict=True, reason="the host asks the shared model for what is in place at that moment"
)


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param([], marks=NOT_ENABLED),
        [ENABLE],
        [ENABLE, native(A, 0.8)],
        [ours(B), native(A)],
    ],
)
def test_saving_writes_the_base_whatever_was_composed(twins, host, chain):
    before = saved(twins, host, [], "before")
    twins.sample("packed", chain or [ours(A)])
    found = saved(twins, host, chain, "after")
    for path in (host.base / "output").rglob("*.safetensors"):
        path.unlink()
    assert_same(found, before)
