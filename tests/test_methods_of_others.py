"""Attaching where something else has bound LoRA methods, as nunchaku-lite does on its models."""

from __future__ import annotations

import pytest

import qwenlora
from qwenlora import errors

from .pipelines import dense_transformer, emulated, pipeline_of, tiny_vae


@pytest.fixture(scope="module")
def dense():
    return dense_transformer(num_layers=1)


@pytest.fixture
def pipeline(dense):
    return pipeline_of(emulated(dense), tiny_vae())


def test_methods_that_others_bound_come_back(pipeline):
    owners = (pipeline, pipeline.transformer)
    theirs = [{name: lambda *args: args for name in ("set_adapters", "fuse_lora")} for _ in owners]
    for owner, methods in zip(owners, theirs, strict=True):
        vars(owner).update(methods)
    qwenlora.attach(pipeline)
    qwenlora.attach(pipeline)
    qwenlora.detach(pipeline)
    for owner, methods in zip(owners, theirs, strict=True):
        assert methods.items() <= vars(owner).items()


def test_adapters_that_others_hold_are_refused_by_name(pipeline):
    vars(pipeline.transformer)["get_list_adapters"] = lambda: ["theirs"]
    with pytest.raises(errors.ModelStateError, match="theirs"):
        qwenlora.attach(pipeline)
