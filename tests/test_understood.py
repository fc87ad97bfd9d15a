"""Models and layers that are not understood are refused by name, whole."""

from __future__ import annotations

import functools
import operator
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import qwenlora
from qwenlora import ComposeOptions, emulation, errors
from qwenlora.compose import planning
from qwenlora.model.forwards import ranks_read
from qwenlora.model.modules import inner_of, is_wrapper, modules_of, submodule_of
from qwenlora.slots import find as targets

BLOCK = "transformer_blocks.0"


# ---- wrappers ----


class Own(nn.Module):
    """Somebody's wrapper, named as most name it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def compiled(module):
    return torch.compile(module, backend="eager")


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


class Sharded(Own):
    """Keeps what it wraps as fully sharded data parallel does."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)


WRAPPERS = [compiled, checkpointed, DataParallel, Sharded, Own, lambda m: Own(compiled(m))]


def _replace(parent, name, wrap):
    parent._modules[name] = wrap(parent._modules[name])


PLACES = {
    "a block": lambda model, wrap: _replace(model.transformer_blocks, "1", wrap),
    "the first block": lambda model, wrap: _replace(model.transformer_blocks, "0", wrap),
    "an attention": lambda model, wrap: _replace(model.transformer_blocks[1], "attn", wrap),
    "a layer": lambda model, wrap: _replace(model.transformer_blocks[1].attn, "to_qkv", wrap),
    "a modulation": lambda model, wrap: _replace(model.transformer_blocks[1].img_mod, "1", wrap),
    "a top-level layer": lambda model, wrap: _replace(model, "img_in", wrap),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("place", PLACES)
def test_wrappers_are_looked_through(wrap, place, make_model, Draft, probe):
    """Paths are those of the model as it was, and the wrapped layer gets the same delta."""
    plain, wrapped = make_model(num_layers=2), make_model(num_layers=2)
    PLACES[place](wrapped, wrap)
    draft = Draft.full(seed=1, rank=4, blocks=2)
    expected = qwenlora.compose_loras(plain, draft.tensors)
    report = qwenlora.compose_loras(wrapped, draft.tensors)
    assert report.complete
    assert [slot.path for slot in report.slots] == [slot.path for slot in expected.slots]
    for path, module in modules_of(plain):
        found = submodule_of(wrapped, path)._parameters if path else {}
        assert all(
            torch.equal(found[name], own)
            for name, own in module._parameters.items()
            if own is not None
        )
    qwenlora.reset_loras(wrapped)
    assert qwenlora.applied(wrapped).slots == ()


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_state_is_that_of_the_model_inside(wrap, make_model, lora):
    model = make_model()
    qwenlora.compose_loras(wrap(model), lora[0])
    assert len(qwenlora.applied(model).slots) > 10


@pytest.mark.parametrize("place", ["a block", "the first block"])
def test_wrapped_blocks_under_offload(place, make_model, Draft, probe):
    plain, wrapped = make_model(num_layers=3), make_model(num_layers=3)
    draft = Draft.full(seed=1, rank=4, blocks=3)
    qwenlora.compose_loras(plain, draft.tensors)
    wrapped.set_offload(True)
    PLACES[place](wrapped, Own)
    qwenlora.compose_loras(wrapped, draft.tensors)
    for index in range(3):
        path = f"transformer_blocks.{index}.attn.to_qkv"
        found, expected = (submodule_of(model, path).proj_up for model in (wrapped, plain))
        assert torch.equal(found, expected)


def test_what_only_looks_like_a_wrapper():
    layered = nn.Sequential(nn.Linear(2, 2))
    owner = Own(nn.Linear(2, 2))
    owner.scale = nn.Parameter(torch.ones(1))
    for module in (layered, owner, nn.Linear(2, 2), nn.ModuleDict()):
        assert not is_wrapper(module)
        assert inner_of(module) is module
    with pytest.raises(errors.ModelStateError, match="`b` is missing"):
        submodule_of(layered, "0.b")


# ---- what a forward reads ----


class ByAttribute(emulation.SVDQW4A4Linear):
    """Sizes its activations by `rank`, as diffusers' own layer does."""

    def forward(self, x):
        self.room = x.new_empty(x.shape[0], self.rank)
        return super().forward(x)


class ByMethod(emulation.SVDQW4A4Linear):
    def forward(self, x):
        return super().forward(x) if self._room() else x

    def _room(self):
        return [1.0 for _ in range(self.rank)]


class ByProperty(emulation.SVDQW4A4Linear):
    @property
    def room(self):
        return self.rank

    def forward(self, x):
        return x[: self.room]


def _wrapped(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class ByWrapped(emulation.SVDQW4A4Linear):
    forward = _wrapped(ByAttribute.forward)


class BySuper(ByAttribute):
    """Reads nothing itself."""

    def forward(self, x):
        return super().forward(x)


class ByName(emulation.SVDQW4A4Linear):
    def forward(self, x):
        return x.new_empty(ByAttribute.forward(self, x).shape)


def _room_of(layer, x):
    return x.new_empty(x.shape[0], layer.lora_rank)


class ByFunction(emulation.SVDQW4A4Linear):
    lora_rank = 32

    def forward(self, x):
        return _room_of(self, x)


class Rooms:
    @staticmethod
    def of(layer):
        return layer.config.rank


class ByOthersMethod(emulation.SVDQW4A4Linear):
    def forward(self, x):
        return x[: Rooms.of(self)]


class ByText(emulation.SVDQW4A4Linear):
    def forward(self, x):
        return x[: getattr(self, "rank")]  # noqa: B009


class ByDict(emulation.SVDQW4A4Linear):
    def forward(self, x):
        return x[: self.__dict__["rank"]]


class ByCall(emulation.SVDQW4A4Linear):
    def __call__(self, x):
        return super().__call__(x[: self.rank])


class ByScales(emulation.SVDQW4A4Linear):
    """Hands the kernels as many scales as it was made with."""

    def forward(self, x):
        return x[: len(self.lora_scales)]


class Hidden(emulation.SVDQW4A4Linear):
    """Code that cannot be looked at."""

    forward = operator.methodcaller("anything")


BY_OWN_RANK = [ByAttribute, ByMethod, ByProperty, ByWrapped, BySuper, ByCall]
KINDS = [ByName, ByFunction, ByOthersMethod, ByText, ByDict, ByScales, Hidden]


@pytest.mark.parametrize("kind", BY_OWN_RANK)
def test_a_rank_that_the_forward_takes_from_the_layer_moves_with_its_tensors(
    kind, model, probe, lora
):
    layer = model.transformer_blocks[0].attn.to_out[0]
    layer.__class__ = kind
    before, base = probe.snapshot(model), layer.rank
    assert qwenlora.compose_loras(model, lora[0]).complete
    assert layer.rank == layer.proj_down.shape[1] > base
    qwenlora.reset_loras(model)
    assert layer.rank == base
    assert probe.snapshot(model).tensors == before.tensors


@pytest.mark.parametrize("said", [16, 48, "32", None])
def test_a_rank_that_is_not_that_of_the_tensors_is_refused(said, model, lora):
    layer = model.transformer_blocks[0].attn.to_out[0]
    layer.__class__ = ByAttribute
    layer.rank = said
    with pytest.raises(errors.UnsupportedModelError, match="takes the rank from an attribute"):
        qwenlora.compose_loras(model, lora[0])


@pytest.mark.parametrize("kind", KINDS)
def test_layers_whose_forward_takes_the_rank_from_an_attribute(kind, model, probe, lora):
    before = probe.snapshot(model)
    model.transformer_blocks[0].attn.to_out[0].__class__ = kind
    with pytest.raises(
        errors.UnsupportedModelError, match=rf"`{BLOCK}\.attn\.to_out\.0` is a .*{kind.__name__}"
    ):
        qwenlora.compose_loras(model, lora[0])
    assert probe.snapshot(model).tensors == before.tensors


def test_an_attribute_that_no_forward_reads_is_let_be(model, lora):
    layer = model.transformer_blocks[0].attn.to_out[0]
    assert layer.rank == layer.proj_down.shape[1]
    assert ranks_read(layer) == (frozenset(), frozenset())
    assert qwenlora.compose_loras(model, lora[0]).complete


def test_a_forward_of_the_instance_that_reads_it(model, lora):
    layer = model.transformer_blocks[0].attn.to_out[0]
    layer.forward = MethodType(ByAttribute.forward, layer)
    assert qwenlora.compose_loras(model, lora[0]).complete
    assert layer.rank == layer.proj_down.shape[1]


def test_a_forward_of_the_instance_that_reads_another(model, lora):
    layer = model.transformer_blocks[0].attn.to_out[0]
    layer.forward = MethodType(_room_of, layer)
    with pytest.raises(errors.UnsupportedModelError, match="takes the rank from an attribute"):
        qwenlora.compose_loras(model, lora[0])


# ---- the order of a modulation's rows ----


def _stock(block):
    """Attention as in diffusers' own block."""
    fused = block.attn.to_qkv
    del block.attn.to_qkv
    for name in ("to_q", "to_k", "to_v"):
        block.attn.add_module(name, nn.Linear(fused.in_features, fused.in_features))


def _both(block):
    block.attn.add_module("to_q", nn.Linear(128, 128))


def _neither(block):
    del block.attn.to_qkv


def _dense(block):
    block.img_mod[1] = nn.Linear(128, 768)


@pytest.mark.parametrize("change", [_stock, _both, _neither, _dense])
def test_blocks_whose_order_of_rows_is_not_known(change, make_model, lora):
    model = make_model(num_layers=2)
    change(model.transformer_blocks[0])
    with pytest.raises(
        errors.UnsupportedModelError, match=rf"`{BLOCK}\.(img|txt)_mod\.1`.*not known"
    ):
        qwenlora.compose_loras(model, lora[0])


# ---- models that are in no table ----


class Foreign(nn.Module):
    """Paths of another model, with a few of Qwen-Image's among them."""

    def __init__(self, make_model, *, fused):
        super().__init__()
        self.transformer_blocks = make_model().transformer_blocks
        self.layers = nn.ModuleList([nn.Module()])
        attention = self.layers[0].attention = nn.Module()
        if fused:
            attention.qkv_qweight = nn.Parameter(torch.zeros(8, 8), requires_grad=False)
            attention.qkv_proj_down = nn.Parameter(torch.zeros(128, 16))
            attention.qkv_proj_up = nn.Parameter(torch.zeros(384, 16))
        else:
            attention.to_qkv = make_model().transformer_blocks[0].attn.to_qkv


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_that_nobody_knows_is_refused_whole(fused, make_model, lora, probe):
    model = Foreign(make_model, fused=fused)
    before = probe.snapshot(model)
    with pytest.raises(
        errors.UnsupportedModelError, match=r"`layers\.0\.attention.*not known.*Foreign"
    ) as caught:
        qwenlora.compose_loras(model, lora[0])
    assert 'unknown_model="partial"' in str(caught.value)
    with pytest.raises(errors.UnsupportedModelError, match="not known"):
        planning.plan_report(model, qwenlora.LoraSet.of(lora[0]))
    assert probe.snapshot(model).differences(before) == []
    # Nothing is wrong with the base of any model.
    assert qwenlora.reset_loras(model).complete


@pytest.mark.parametrize("fused", [False, True])
def test_a_part_of_such_a_model_can_be_asked_for(fused, make_model, lora):
    model = Foreign(make_model, fused=fused)
    options = ComposeOptions(unknown_model="partial")
    report = qwenlora.compose_loras(model, lora[0], options=options)
    assert not report.complete
    missing = {skip.name for skip in report.loras[0].skipped}
    assert missing == set(targets_of_the_top_level())
    qwenlora.reset_loras(model)
    with pytest.raises(errors.UnsupportedModelError, match="not known"):
        qwenlora.compose_loras(model, lora[0])


@pytest.mark.parametrize("single", [False, True])
def test_known_names_in_blocks_of_another_model(single, make_model, lora):
    """As in FLUX: fused attention of the same name, without the modulations beside it."""
    model = make_model()
    block = model.transformer_blocks[0]
    del block.img_mod, block.txt_mod
    if single:
        model.single_transformer_blocks = nn.ModuleList([make_model().transformer_blocks[0]])
    with pytest.raises(
        errors.UnsupportedModelError, match=r"`(single_)?transformer_blocks\.0\..*not known"
    ):
        qwenlora.compose_loras(model, lora[0])


def targets_of_the_top_level():
    return [
        "img_in",
        "txt_in",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
    ]


def test_an_option_of_another_name():
    with pytest.raises(ValueError, match="unknown_model is 'all'"):
        ComposeOptions(unknown_model="all")


def test_every_size_and_number_of_blocks_is_known(make_model, lora):
    for layers in (1, 3):
        found = targets.find_targets(make_model(num_layers=layers), {})
        assert len(found) > 10
