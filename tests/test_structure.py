"""What is remembered of a model's slots, and every change of the model that must be noticed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

import qwenlora
from qwenlora import _core
from qwenlora.compose.structure import remember_structure, structure_of
from qwenlora.model.state import read_state

BLOCK = "transformer_blocks.1"
LINEAR = f"{BLOCK}.attn.to_qkv"
MODULATION = f"{BLOCK}.img_mod.1"
NORM = f"{BLOCK}.attn.norm_q"


def _replace(path):
    def change(model):
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(path)
        model.get_submodule(parent)._modules[name] = copy.deepcopy(module)

    return change


def _reorder(model):
    children = model.get_submodule(BLOCK)._modules
    name, first = next(iter(children.items()))
    del children[name]
    children[name] = first


def _replace_parameter(path, name):
    def change(model):
        parameters = model.get_submodule(path)._parameters
        parameters[name] = nn.Parameter(parameters[name].detach(), requires_grad=False)

    return change


def _move_parameter(path, name):
    def change(model):
        parameter = model.get_submodule(path)._parameters[name]
        parameter.data = parameter.data.clone()

    return change


def _reuse_the_number(model):
    """Another tensor under the number of one that is gone."""
    parameters = model.get_submodule(LINEAR)._parameters
    data = [parameters["proj_up"].data.clone() for _ in range(9)]
    kept = parameters["proj_up"].data
    number = id(parameters.pop("proj_up"))
    others = [torch.Tensor._make_subclass(nn.Parameter, one) for one in data]
    taken = [other for other in others if id(other) == number]
    if not taken:
        pytest.skip("no tensor took the number")
    parameters["proj_up"] = taken[0]
    assert taken[0].data_ptr() != kept.data_ptr()


def _rename_buffer(model):
    buffers = model.get_submodule(MODULATION)._buffers
    name, tensor = buffers.popitem()
    buffers[f"{name}_again"] = tensor


def _replace_buffer(model):
    buffers = model.get_submodule(MODULATION)._buffers
    name, tensor = buffers.popitem()
    buffers[name] = tensor.detach()


def _move_buffer(model):
    buffer = next(model.get_submodule(MODULATION).buffers())
    buffer.data = buffer.data.clone()


CHANGES = {
    "a replaced slot": _replace(LINEAR),
    "a replaced block": _replace(BLOCK),
    "a replaced layer that is no slot": _replace(f"{BLOCK}.img_mod.0"),
    "a module more": lambda model: model.add_module("more", nn.Linear(2, 2)),
    "a module more in a block": lambda model: model.get_submodule(BLOCK).add_module(
        "more", nn.Identity()
    ),
    "a module less": lambda model: model.get_submodule(BLOCK)._modules.popitem(),
    "no module": lambda model: model.get_submodule(BLOCK)._modules.clear(),
    "a module that is None": lambda model: setattr(model.get_submodule(BLOCK), "attn", None),
    "another order": _reorder,
    **{
        f"{what} {path}.{name}": change(path, name)
        for what, change in (("replaced", _replace_parameter), ("moved", _move_parameter))
        for path, name in (
            (LINEAR, "proj_down"),
            (LINEAR, "proj_up"),
            (MODULATION, "qweight"),
            (NORM, "weight"),
            ("proj_out", "weight"),
        )
    },
    "a parameter less": lambda model: model.get_submodule(LINEAR)._parameters.pop("proj_up"),
    "a parameter that is None": lambda model: model.get_submodule(NORM)._parameters.update(
        weight=None
    ),
    "the number of a dead tensor": _reuse_the_number,
    "a buffer more": lambda model: model.get_submodule(LINEAR).register_buffer(
        "more", torch.zeros(1)
    ),
    "a buffer less": lambda model: model.get_submodule(MODULATION)._buffers.popitem(),
    "a buffer of another name": _rename_buffer,
    "a replaced buffer": _replace_buffer,
    "a moved buffer": _move_buffer,
    # The class's own: a composed model's composes anew.
    "offload": lambda model: type(model).set_offload(model, True),
}


@pytest.fixture
def composed(make_model, Draft):
    """A model with a branch beside one modulation, as the composition left it."""
    model = make_model(num_layers=2)
    qwenlora.compose_loras(model, Draft(1).add(MODULATION, 4).add(LINEAR, 4).tensors)
    return model


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(change, composed):
    known = structure_of(composed, read_state(composed))
    assert known.is_current(composed)
    change(composed)
    assert not known.is_current(composed)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_looking_again_takes_tensors_and_no_modules(change, composed):
    known = structure_of(composed, read_state(composed))
    children = [(m._modules, tuple(m._modules.values())) for m in composed.modules() if m._modules]
    offload = composed.offload
    change(composed)
    remember_structure(composed, known)
    same_modules = all(tuple(found.values()) == kept for found, kept in children)
    assert known.is_current(composed) == (same_modules and offload == composed.offload)


def test_what_does_not_move_a_slot_is_no_change(composed, probe):
    known = structure_of(composed, read_state(composed))
    probe.output(composed)
    composed.get_submodule(LINEAR).register_forward_hook(lambda *_: None)
    composed.get_submodule(LINEAR).proj_up.data.zero_()
    assert known.is_current(composed)
    assert structure_of(composed, read_state(composed)) is known


def test_watched_tensors_are_not_kept_alive(composed):
    known = structure_of(composed, read_state(composed))
    module = composed.get_submodule(LINEAR)
    gone = weakref.ref(module.proj_up)
    module.proj_up = nn.Parameter(module.proj_up.detach().clone(), requires_grad=False)
    gc.collect()
    assert gone() is None
    assert not known.is_current(composed)


def test_watched_modules_are_kept_alive():
    # Otherwise a new module could take the number of one that is gone.
    children = {"one": nn.Identity()}
    watch = _core.Watch([children], [], [])
    kept = weakref.ref(children["one"])
    children["one"] = nn.Identity()
    gc.collect()
    assert kept() is not None
    assert not watch.is_unchanged()
    del watch
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_the_order_of_children_is_theirs(kind):
    children = kind(one=nn.Identity(), two=None, three=nn.Identity())
    watch = _core.Watch([{}, children], [], [])
    assert watch.is_unchanged()
    if kind is OrderedDict:
        children.move_to_end("one")
    else:
        children["one"] = children.pop("one")
    assert not watch.is_unchanged()


def test_a_child_does_not_pass_for_its_neighbour():
    left, right = {"one": nn.Identity(), "two": nn.Identity()}, {"three": nn.Identity()}
    watch = _core.Watch([left, right], [], [])
    right_first = {"two": left.pop("two"), **right}
    right.clear()
    right.update(right_first)
    assert not watch.is_unchanged()


def test_a_watch_in_a_cycle_is_collected():
    module = nn.Linear(2, 2)
    module.inner = nn.Identity()
    gone = weakref.ref(module)
    module.watch = _core.Watch([module._modules, {"self": module}], [], [module._buffers])
    del module
    gc.collect()
    assert gone() is None


def test_what_is_no_tensor_raises():
    with pytest.raises(AttributeError, match="data_ptr"):
        _core.Watch([], [({"weight": 1}, "weight")], [])
