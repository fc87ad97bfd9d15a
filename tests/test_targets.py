"""Finding slots: what is looked up past `nn.Module`'s own ways must find what those find."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from qwenlora import _core, errors
from qwenlora.model.modules import modules_of, pattern
from qwenlora.model.target import device_of, factors_of
from qwenlora.packing.layout import LowRankSide
from qwenlora.plan.documents import SlotKind, slot_map
from qwenlora.slots.find import find_targets

LINEAR = "transformer_blocks.0.attn.to_qkv"
MODULATION = "transformer_blocks.0.img_mod.1"
NORM = "transformer_blocks.0.attn.norm_q"


def test_modules_are_those_of_named_modules(model):
    shared = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    model.first, model.second, model.missing = shared, shared, None
    model.inner = nn.ModuleDict({"one": shared[1], "two": nn.ModuleList([nn.Identity()])})
    model.inner["two"].append(model)
    found, expected = modules_of(model), list(model.named_modules())
    assert [path for path, _ in found] == [path for path, _ in expected]
    assert all(one is other for (_, one), (_, other) in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ""),
        ("proj_out", "proj_out"),
        ("7", "*"),
        ("7.8", "*.8"),
        ("a.12.b", "a.*.b"),
        ("a.12.b.0", "a.*.b.0"),
        ("a1.b2.3c.d4e.56", "a1.b2.3c.d4e.*"),
        ("linear_1.net.2", "linear_1.net.*"),
    ],
)
def test_patterns(path, expected):
    assert pattern(path) == expected


def test_the_device_is_that_of_the_first_tensor():
    module = nn.Module()
    assert device_of(module).type == "cpu"
    module.register_buffer("none", None)
    module.register_buffer("buffer", torch.zeros(1, device="meta"))
    assert device_of(module).type == "meta"
    module.register_parameter("none_too", None)
    module.register_parameter("parameter", nn.Parameter(torch.zeros(1)))
    assert device_of(module).type == "cpu"


def test_factors_that_are_no_parameters_are_found(model):
    target = find_targets(model, {})[LINEAR]
    module = target.module
    other = copy.deepcopy(module)
    down = other._parameters.pop("proj_down").data
    other.register_buffer("proj_down", down)
    both = [target, target.twin(other, "other")]
    assert [id(t) for t in factors_of(both, LowRankSide.DOWN)] == [
        id(module.proj_down),
        id(down),
    ]


# ---- layers that keep their tensors elsewhere ----


def _as_buffer(module, name):
    module.register_buffer(name, module._parameters.pop(name).data)


def _as_attribute(module, name):
    module.__dict__[name] = module._parameters.pop(name).data


def _as_property(module, name):
    tensor = module._parameters.pop(name)
    module.__class__ = type("Own", (type(module),), {name: property(lambda _: tensor)})


def _as_class_attribute(module, name):
    module.__class__ = type("Own", (type(module),), {name: module._parameters.pop(name)})


def _by_getattr(module, name):
    tensor, kind = module._parameters.pop(name), type(module)

    def find(self, wanted):
        return tensor if wanted == name else kind.__getattr__(self, wanted)

    module.__class__ = type("Own", (kind,), {"__getattr__": find})


def _by_getattribute(module, name):
    tensor, kind = module._parameters.pop(name), type(module)

    def find(self, wanted):
        return tensor if wanted == name else kind.__getattribute__(self, wanted)

    module.__class__ = type("Own", (kind,), {"__getattribute__": find})


@pytest.mark.parametrize(
    "keep", [_as_buffer, _as_attribute, _as_property, _as_class_attribute, _by_getattr]
)
@pytest.mark.parametrize(
    ("path", "name"),
    [
        (LINEAR, "proj_down"),
        (LINEAR, "qweight"),
        (LINEAR, "bias"),
        (MODULATION, "wscales"),
        (MODULATION, "wzeros"),
        (MODULATION, "bias"),
        (NORM, "weight"),
        ("proj_out", "weight"),
        ("proj_out", "bias"),
    ],
)
def test_a_slot_is_one_wherever_its_tensors_are(keep, path, name, model):
    before = find_targets(model, {})
    keep(model.get_submodule(path), name)
    assert torch.is_tensor(getattr(model.get_submodule(path), name))
    assert find_targets(model, {}) == before


def test_a_class_with_its_own_way_to_all_attributes(model):
    before = find_targets(model, {})
    _by_getattribute(model.get_submodule(MODULATION), "wscales")
    assert find_targets(model, {}) == before


def test_a_parametrized_weight(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    before = find_targets(model, {})
    with torch.no_grad():
        parametrize.register_parametrization(model.get_submodule("proj_out"), "weight", Twice())
    assert [*find_targets(model, {})] == [*before]


@pytest.mark.parametrize("name", ["proj_down", "proj_up", "qweight"])
@pytest.mark.parametrize("value", [None, "text"])
def test_a_layer_without_one_of_its_tensors_is_no_slot(name, value, model):
    before = find_targets(model, {})
    module = model.get_submodule(LINEAR)
    del module._parameters[name]
    module.__dict__[name] = value
    assert find_targets(model, {}) == {p: t for p, t in before.items() if p != LINEAR}


# ---- what is refused ----


def _data(path, name, change):
    def changed(model):
        module = model.get_submodule(path)
        tensor = module._parameters[name]
        module._parameters[name] = nn.Parameter(change(tensor.data), requires_grad=False)

    return changed


def _share(model):
    module = model.get_submodule(LINEAR)
    model.get_submodule("transformer_blocks.0.attn.add_qkv_proj").proj_up = module.proj_up


def _share_across(model):
    # One layer's down is another's up.
    inner = model.get_submodule("transformer_blocks.0.attn.to_out.0")
    model.get_submodule("transformer_blocks.0.attn.to_add_out").proj_up = inner.proj_down


REFUSED = {
    "no matrix": (_data(LINEAR, "proj_up", lambda t: t[0]), r"to_qkv\.proj_up` is \(32,\)"),
    "no whole tile": (_data(LINEAR, "proj_down", lambda t: t[:100]), r"proj_down` is \(100, 32\)"),
    "no whole fragment": (
        _data(LINEAR, "proj_up", lambda t: t[:, :24].contiguous()),
        r"proj_up` is \(384, 24\)",
    ),
    "no rank": (_data(LINEAR, "proj_up", lambda t: t[:, :0]), r"proj_up` is \(384, 0\)"),
    "no such dtype": (_data(LINEAR, "proj_down", torch.Tensor.double), "torch.float64"),
    "not contiguous": (_data(LINEAR, "proj_up", lambda t: t.repeat(1, 2)[:, :32]), "contiguous"),
    "a factor without values": (_data(LINEAR, "proj_up", lambda t: t.to("meta")), "on meta"),
    "two ranks": (
        _data(LINEAR, "proj_up", lambda t: t[:, :16].contiguous()),
        r"proj_down is \(128, 32\).*proj_up \(384, 16\)",
    ),
    "two dtypes": (_data(LINEAR, "proj_up", torch.Tensor.half), "proj_up .*float16"),
    "no values": (_data(NORM, "weight", lambda t: t.to("meta")), "meta device: load its weights"),
    "one parameter for two": (_share, r"add_qkv_proj` and `.*to_qkv` share one proj_up"),
    "one parameter for both": (_share_across, r"share one proj_(up|down)"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(change, words, model):
    change(model)
    with pytest.raises((errors.ModelStateError, errors.UnsupportedModelError), match=words):
        find_targets(model, {})


def test_less_than_its_base(model):
    assert find_targets(model, {LINEAR: 16})[LINEAR].row.base_rank == 16
    for rank in (48, 0):
        with pytest.raises(errors.ModelStateError, match=f"rank 32, less than the {rank}"):
            find_targets(model, {LINEAR: rank})


# ---- rows in Rust ----


def test_rows_reach_rust_by_name(model):
    rows = [target.row for target in find_targets(model, {}).values()]
    assert len(slot_map(find_targets(model, {}).values())) == len(rows)
    turned = [SimpleNamespace(**dict(reversed(row._asdict().items()))) for row in rows]
    assert len(_core.SlotMap(turned)) == len(rows)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("kind", "other", errors.QwenLoraError),
        ("kind", SlotKind.SVDQ, TypeError),
        ("in_features", -1, TypeError),
        ("path", None, TypeError),
    ],
)
def test_rows_that_are_none(field, value, error, model):
    row = find_targets(model, {})[LINEAR].row._replace(**{field: value})
    with pytest.raises(error):
        _core.SlotMap([row])
