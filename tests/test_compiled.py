"""Compiled models: what was traced before a LoRA came, or left, is never run in its place."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections import OrderedDict

import pytest
import torch
from torch._C._dynamo.guards import dict_version
from torch._dynamo.testing import CompileCounter

import qwenlora
from qwenlora import ComfyQwenImageWrapper, _core
from qwenlora.emulation import EmulatedConfig, Precision, random_transformer
from qwenlora.errors import UnsupportedModelError
from qwenlora.model.subclass import is_marked, mark_hooked, plain_class, unmark_hooked
from qwenlora.slots.branch import add_side_branch

from .conftest import OLD_TORCH

BLOCK = "transformer_blocks.0."
CLOSE = 1e-5
"""Relative error of float32 sums in another order."""


def make(num_layers=1):
    config = EmulatedConfig(
        num_layers=num_layers,
        heads=2,
        head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=96,
        in_channels=64,
        precision=Precision.EXACT,
        dtype=torch.float32,
    )
    return random_transformer(config, seed=0)


@pytest.fixture(autouse=True)
def _no_graphs():
    """No test meets the graphs of another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SIZES = {
    BLOCK + "img_mod.1": (384, 64),
    BLOCK + "txt_mod.1": (384, 64),
    BLOCK + "attn.to_q": (64, 64),
    BLOCK + "attn.to_out.0": (64, 64),
    "img_in": (64, 64),
    "txt_in": (64, 96),
    "proj_out": (64, 64),
    "time_text_embed.timestep_embedder.linear_1": (64, 256),
}
TOP = [name for name in SIZES if not name.startswith("transformer_blocks")]


def normal(seed, *shape):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(*targets, rank=4):
    """A plain LoRA; the same for the same targets and rank."""
    tensors = {}
    for seed, target in enumerate(targets):
        out, inp = SIZES[target]
        tensors[f"transformer.{target}.lora_A.weight"] = normal(seed, rank, inp)
        tensors[f"transformer.{target}.lora_B.weight"] = normal(seed + 100, out, rank)
    return tensors


def lokr(*targets):
    """Whole factors: they run beside the layer."""
    tensors = {}
    for seed, target in enumerate(targets):
        out, inp = SIZES[target]
        tensors[f"lycoris_{target.replace('.', '_')}.lokr_w1"] = normal(seed, 4, 4)
        tensors[f"lycoris_{target.replace('.', '_')}.lokr_w2"] = normal(seed, out // 4, inp // 4)
    return tensors


def full(target):
    """A dense delta and one of the bias."""
    out, inp = SIZES[target]
    return {
        f"diffusion_model.{target}.diff": normal(3, out, inp),
        f"diffusion_model.{target}.diff_b": normal(4, out),
    }


STACKS = {
    "base": [],
    "image modulation": [plain(BLOCK + "img_mod.1")],
    "both modulations": [plain(BLOCK + "img_mod.1", BLOCK + "txt_mod.1")],
    "more ranks": [plain(BLOCK + "img_mod.1", rank=7)],
    "two of them": [plain(BLOCK + "img_mod.1"), (plain(BLOCK + "img_mod.1", rank=7), -0.5)],
    "attention": [plain(BLOCK + "attn.to_q", BLOCK + "attn.to_out.0")],
    "top level": [plain(*TOP)],
    "everything": [plain(*SIZES)],
    "products beside attention": [lokr(BLOCK + "attn.to_q")],
    "products beside modulation": [lokr(BLOCK + "img_mod.1")],
    "products and ranks": [lokr(BLOCK + "img_mod.1"), plain(BLOCK + "img_mod.1")],
    "dense and bias": [full("txt_in")],
}


def answer(model):
    inputs = {"hidden_states": normal(1, 1, 12, 64), "encoder_hidden_states": normal(2, 1, 5, 96)}
    with torch.no_grad():
        return model(**inputs, timestep=torch.tensor([0.7]), img_shapes=[[(1, 3, 4)]]).sample


def brought(model, name):
    qwenlora.compose_loras(model, STACKS[name])
    return answer(model)


@pytest.fixture(scope="module")
def wanted():
    """The answer of a model that is not compiled, by stack."""
    model = make()
    return {name: brought(model, name) for name in STACKS}


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


# ---- ways to compile ----


def whole(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def blocks_in_place(model, backend):
    for block in model.transformer_blocks:
        block.compile(backend=backend)
    return model


def blocks_replaced(model, backend):
    for index, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[index] = torch.compile(block, backend=backend)
    return model


def repeated_blocks(model, backend):
    """By diffusers' own method, which finds blocks by the names of their classes."""
    from diffusers import ModelMixin

    model._repeated_blocks = [type(model.transformer_blocks[0]).__name__]
    ModelMixin.compile_repeated_blocks(model, backend=backend)
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    return model


def leaves_replaced(model, backend):
    for parent, name in ((model, "img_in"), (model.transformer_blocks[0].img_mod, "1")):
        setattr(parent, name, torch.compile(getattr(parent, name), backend=backend))
    return model


WAYS = [whole, in_place, blocks_in_place, blocks_replaced, repeated_blocks, leaves_replaced]


@pytest.mark.slow
def test_blocks_that_share_their_code():
    """One of two has a branch: both are of one class, and compiled by one function."""
    eager, subject = make(2), blocks_in_place(make(2), "eager")
    for name in ("base", "both modulations", "base"):
        assert error(brought(subject, name), brought(eager, name)) < CLOSE, name


CHAIN = ["base", "both modulations", "top level", "base", "products and ranks", "everything"]
SHORT = ["base", "products and ranks", "base", "everything"]
"""For ways that differ from another one in where the compiled code is kept alone."""
CHAINS = {in_place: SHORT, blocks_replaced: SHORT, repeated_blocks: SHORT}
RESCALED = ("products and ranks", "everything")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_what_was_traced_for_another_stack_is_not_run(way, wanted):
    """And a stack that comes again, or at other strengths, is not traced again."""
    counter, chain = CompileCounter(), CHAINS.get(way, CHAIN)
    subject, eager = way(make(), counter), make()
    for name in chain:
        assert error(brought(subject, name), wanted[name]) < CLOSE, name
        frames = counter.frame_count
        for strength in (0.5, -2.0) if name in RESCALED else ():
            scaled = [(lora, strength) for lora in STACKS[name]]
            qwenlora.compose_loras(subject, scaled)
            qwenlora.compose_loras(eager, scaled)
            assert error(answer(subject), answer(eager)) < CLOSE, (name, strength)
        assert counter.frame_count == frames > 0, name
    frames = counter.frame_count
    for name in ("base", chain[1], "everything", "base"):
        assert error(brought(subject, name), wanted[name]) < CLOSE, name
    assert counter.frame_count == frames


@pytest.mark.slow
def test_every_stack_after_the_base(wanted):
    """The others follow each other on one model, which is traced for each of them once."""
    counter = CompileCounter()
    subject = whole(make(), counter)
    brought(subject, "base")
    # Beyond the limit a graph would be left for plain Python, which is right by itself.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        for stack in (name for name in STACKS if name not in CHAIN):
            frames = counter.frame_count
            for name in (stack, "base", stack, "base"):
                assert error(brought(subject, name), wanted[name]) < CLOSE, (stack, name)
            assert counter.frame_count > frames, stack


@pytest.mark.slow
@pytest.mark.parametrize("way", [whole, blocks_replaced])
def test_a_model_that_was_composed_before_it_was_compiled(way, wanted):
    model = make()
    qwenlora.compose_loras(model, STACKS["everything"])
    subject = way(model, "eager")
    for name in ("everything", "base", "both modulations"):
        assert error(brought(subject, name), wanted[name]) < CLOSE, name


@pytest.mark.slow
@pytest.mark.parametrize("way", [whole, in_place, blocks_in_place, blocks_replaced])
def test_a_default_stack_reaches_what_was_compiled_before(way, wanted):
    """The wrapper's hooks come after the graph, too."""
    model = make()
    subject = way(model, "eager")
    assert error(answer(subject), wanted["base"]) < CLOSE
    wrapper = ComfyQwenImageWrapper.of(subject)
    wrapper.loras += STACKS["both modulations"]
    assert error(answer(subject), wanted["both modulations"]) < CLOSE
    wrapper.loras.clear()
    assert error(answer(subject), wanted["base"]) < CLOSE


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++: apt-get install g++")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_code_of_inductor(wanted):
    """Of the whole model; tests/test_lite.py has that of its blocks."""
    # More would be processes that import PyTorch.
    with torch._inductor.config.patch(compile_threads=1):
        subject = whole(make(), "inductor")
        for name in ("base", "both modulations", "base"):
            assert error(brought(subject, name), wanted[name]) < 1e-4, name


# ---- the size that tells ----

OF_SIZES = [
    pytest.param(way, marks=() if OLD_TORCH else pytest.mark.slow)
    for way in (whole, blocks_in_place)
]
"""Quick where it once failed, so that `make test-oldest` runs it."""


@pytest.mark.parametrize("way", OF_SIZES)
def test_another_rank_inside_a_layer_is_traced(way, wanted):
    """The oldest PyTorch looks at no size of a parameter whose dictionary is as it was."""
    subject = way(make(), "eager")
    for name in ("base", "attention", "base", "attention"):
        assert error(brought(subject, name), wanted[name]) < CLOSE, name


def test_another_rank_is_another_version_of_the_parameters():
    """And the same rank is not, whatever the strength and the file."""
    model = make()
    layers = {path: own for path, own in model.named_modules() if hasattr(own, "proj_down")}
    entries = {path: [*own._parameters.items()] for path, own in layers.items()}

    def versions():
        return {path: dict_version(own._parameters) for path, own in layers.items()}

    def changed_by(stack):
        before = versions()
        qwenlora.compose_loras(model, stack)
        assert {path: [*own._parameters.items()] for path, own in layers.items()} == entries
        return {path for path, version in versions().items() if version != before[path]}

    trained = {BLOCK + "attn.to_qkv", BLOCK + "attn.to_out.0"}
    attention = STACKS["attention"][0]
    other = {key: -tensor for key, tensor in attention.items()}
    assert changed_by([]) == set()
    assert changed_by([attention]) == trained
    for stack in ([(attention, 0.5)], [other], [(attention, -2.0)]):
        assert changed_by(stack) == set()
    assert changed_by([attention, other] * 3) == trained
    assert changed_by([]) == trained


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_touched_dictionary_is_as_it_was(kind):
    held = kind(weight=1, bias=None)
    before, again = dict_version(held), dict_version(held)
    _core.touch(held)
    assert again == before != dict_version(held)
    assert [*held.items()] == [("weight", 1), ("bias", None)]
    assert [*reversed(held)] == ["bias", "weight"]


# ---- the type that tells ----


def test_a_branch_changes_a_layers_type_while_it_is_there():
    model = make()
    layer, kind = model.img_in, type(model.img_in)
    qwenlora.compose_loras(model, STACKS["top level"])
    assert is_marked(layer)
    assert isinstance(layer, kind)
    assert type(layer).__name__ == kind.__name__
    assert plain_class(type(layer)) is kind
    qwenlora.reset_loras(model)
    assert type(layer) is kind


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_of_the_same_type(duplicate):
    model = make()
    qwenlora.compose_loras(model, STACKS["top level"])
    copied = duplicate(model.img_in)
    assert type(copied) is type(model.img_in)
    assert add_side_branch in copied._forward_hooks.values()
    x = normal(9, 2, 64)
    assert torch.equal(copied(x), model.img_in(x))


class Final(torch.nn.Linear):
    """A class of which there can be no subclass."""

    def __init_subclass__(cls):
        raise TypeError("this class is final")


def test_layers_of_a_final_class_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"a Final cannot carry.*this class is final"):
        mark_hooked(Final(4, 4))


def test_a_subclass_on_top_is_left_alone():
    layer = torch.nn.Linear(4, 4)
    mark_hooked(layer)
    torch.nn.utils.parametrizations.weight_norm(layer)
    outer = type(layer)
    unmark_hooked(layer)
    assert type(layer) is outer
