"""Layer kinds are rows of a table, and where a packed branch lies is a description."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qwenlora
from qwenlora.delta.slot_deltas import SlotDeltas
from qwenlora.model.target import LowRankPlace
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.find import find_targets
from qwenlora.slots.kinds import KINDS
from qwenlora.slots.packed import PackedChange, PackedSlot
from qwenlora.work.pending import Pending

LAYER = "transformer_blocks.0.attn.to_out.0"


class Around(nn.Module):
    """A layer that keeps its branch in a module of its own, and says its rank."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Module()
        self.branch.low_down = nn.Parameter(layer.proj_down.data.clone(), requires_grad=False)
        self.branch.low_up = nn.Parameter(layer.proj_up.data.clone(), requires_grad=False)
        self.branch.rank = layer.proj_down.shape[1]


@pytest.fixture
def target(make_model):
    """A slot whose branch lies elsewhere, with other names and a rank."""
    found = find_targets(make_model(), {})[LAYER]
    place = LowRankPlace("low_down", "low_up", owner="branch", rank="rank")
    module = Around(found.module)
    return found._replace(module=module, place=place, owner=place.owner_of(module))


def state(target):
    branch = target.module.branch
    return branch.rank, branch.low_down.clone(), branch.low_up.clone()


def same(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1:], other[1:]))


def test_every_kind_is_in_the_table():
    assert set(KINDS) == set(SlotKind)
    assert all(kind is row.kind for kind, row in KINDS.items())
    assert [kind for kind, row in KINDS.items() if row.place is not None] == [SlotKind.SVDQ]


def test_a_rank_that_the_layer_says_moves_with_its_factors(target):
    before, slot = state(target), PackedSlot(target)
    change = slot.prepare(SlotDeltas(target, rank_added=32))
    assert same(state(target), before)
    change.make()
    branch = target.module.branch
    assert branch.rank == before[0] + 32 == branch.low_down.shape[1] == branch.low_up.shape[1]
    assert slot.rank_added() == 32
    assert not slot.is_base()
    change.unmake()
    assert same(state(target), before)
    assert slot.is_base()


def test_the_base_comes_back_with_its_rank(target):
    before, slot = state(target), PackedSlot(target)
    slot.prepare(SlotDeltas(target, rank_added=16)).make()
    slot.restore()
    assert same(state(target), before)


@pytest.mark.parametrize("wrong", ["rank", "factors"])
def test_half_a_change_is_no_base(wrong, target):
    slot = PackedSlot(target)
    if wrong == "rank":
        target.owner.rank += 16
    else:
        target.owner.low_up.data = torch.zeros(target.row.out_features, slot._base_rank + 16)
    assert not slot.is_base()


def test_a_change_that_fails_between_its_halves_is_unmade(target):
    before = state(target)
    down = torch.zeros(target.row.in_features, before[0] + 16)
    change = PackedChange([target], Pending.ready(([down], [None])))
    with pytest.raises((AttributeError, TypeError)):
        change.make()
    change.unmake()
    assert same(state(target), before)


def test_a_slot_of_another_block_finds_its_own_branch(target):
    other = Around(bare_layer(target))
    twin = target.twin(other, "transformer_blocks.9.attn.to_out.0")
    assert twin.owner is other.branch
    assert twin.device == target.device


def bare_layer(target):
    layer = nn.Module()
    layer.proj_down, layer.proj_up = target.owner.low_down, target.owner.low_up
    return layer


class CastLinear(nn.Linear):
    """A linear that a host keeps in host memory, and brings to each input."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight.to(input.device), self.bias.to(input.device))


CAST = ("img_in", "txt_in", "proj_out", "norm_out.linear")


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", ["lora", "lokr", "full"])
def test_a_branch_is_brought_to_the_input_as_its_layer_is(adapter, make_model, probe):
    """As ComfyUI loads a model that does not fit: in part."""
    generator = torch.Generator().manual_seed(7)
    model, whole = make_model(), make_model()
    tensors = {}
    for path in CAST:
        linear = model.get_submodule(path)
        cast = CastLinear(linear.in_features, linear.out_features)
        cast.load_state_dict(linear.state_dict())
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, cast)
        out, inputs = linear.weight.shape
        shapes = {
            "lora": {"lora_A.weight": (4, inputs), "lora_B.weight": (out, 4)},
            "lokr": {"lokr_w1": (4, 4), "lokr_w2": (out // 4, inputs // 4)},
            "full": {"diff": (out, inputs)},
        }
        for role, shape in shapes[adapter].items():
            key = f"transformer.{path}.{role}"
            tensors[key] = 0.1 * torch.randn(shape, generator=generator)
    model.to("cuda")
    for path in CAST:
        model.get_submodule(path).to("cpu")
    whole.to("cuda")
    expected = []
    for own in (model, whole):
        qwenlora.compose_loras(own, tensors)
        expected.append(probe.output(own, call=_on_the_device(own)).cpu())
    assert torch.allclose(*expected, atol=1e-4)


def _on_the_device(model):
    def call(**inputs):
        moved = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        return model(**moved)

    return call
