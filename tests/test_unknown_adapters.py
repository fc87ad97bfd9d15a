"""A piece of an adapter that nothing here knows raises, and names it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import qwenlora
from qwenlora import errors
from qwenlora.delta.adapters.table import ADAPTERS, adapter_named
from qwenlora.delta.adapters.vector import value_of
from qwenlora.plan.documents import PieceKind

TARGET = "transformer_blocks.0.attn.to_out.0"


def test_every_adapter_of_weights_is_found_by_its_name():
    assert sorted(ADAPTERS) == ["full", "loha", "lokr", "lora"]
    assert all(adapter_named(name).name == name for name in ADAPTERS)


@pytest.mark.parametrize("name", ["dora", "norm", "", "LoRA"])
def test_an_unknown_adapter_is_named(name):
    with pytest.raises(errors.UnsupportedAdapterError, match=f"of a weight from adapter `{name}`"):
        adapter_named(name)


def test_a_table_takes_no_other_adapter():
    piece = SimpleNamespace(kind=PieceKind.LOW_RANK, adapter="loha", scale=1.0)
    with pytest.raises(errors.UnsupportedAdapterError, match="table from adapter `loha`"):
        value_of(piece, {"up": torch.ones(2, 1), "down": torch.ones(1, 3)}, 0)


def test_composing_one_leaves_the_model_alone(make_model, probe, Draft, monkeypatch):
    model = make_model()
    before = probe.snapshot(model)
    draft = Draft(1)
    for index in "12":
        draft.put(TARGET, f"hada_w{index}_a", 128, 3).put(TARGET, f"hada_w{index}_b", 3, 128)
    monkeypatch.delitem(ADAPTERS, "loha")
    with pytest.raises(errors.UnsupportedAdapterError, match="`loha`"):
        qwenlora.compose_loras(model, draft.tensors)
    assert probe.snapshot(model).differences(before) == []
