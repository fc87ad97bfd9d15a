"""`qwenlora.attach`: diffusers' methods do on a 4-bit transformer what PEFT does on a dense one.

The same calls are made on two real `QwenImagePipeline`s. One runs diffusers' dense transformer with
PEFT, the other the emulated transformer with the same weights. After every call both must name the
same adapters, raise alike, and make the same picture.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import (
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
)
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin
from diffusers.loaders.peft import PeftAdapterMixin
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

import qwenlora
from qwenlora import ComfyQwenImageWrapper, errors
from qwenlora.pipeline.by_name import parts_of
from qwenlora.pipeline.pipeline_methods import PIPELINE_METHODS
from qwenlora.pipeline.transformer_methods import TRANSFORMER_METHODS

from .pipelines import (
    ALL_PATHS,
    QUANTIZED,
    TOP_PATHS,
    dense_transformer,
    forward,
    picture,
    pipeline_of,
    relative_error,
    tensors,
    tiny_vae,
)

if TYPE_CHECKING:
    from collections.abc import Callable

OUTPUT_BOUND = 1e-5
"""Relative error of a denoised latent in float32; measured: 1e-7."""


@pytest.fixture(scope="module")
def dense():
    return dense_transformer()


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def quantized(dense):
    """`dense` in 4 bits, by kind: makes copies of models that are made once."""
    make = functools.cache(lambda kind: QUANTIZED[kind](dense))
    return lambda kind: copy.deepcopy(make(kind))


@pytest.fixture(params=["nunchaku", pytest.param("diffusers", marks=pytest.mark.slow)])
def make_quantized(request, quantized):
    """Makes a transformer of one kind."""
    return functools.partial(quantized, request.param)


@pytest.fixture
def make_pipeline(vae, make_quantized):
    return lambda: pipeline_of(make_quantized(), vae)


@pytest.fixture
def pipeline(make_pipeline):
    return qwenlora.attach(make_pipeline())


# ---- the same calls on both ----


class Outcome:
    """What a call came to: a value, or an error."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.value, self.error = None, None
        try:
            self.value = call()
        except Exception as error:  # noqa: BLE001
            self.error = error


class Both:
    """PEFT on the dense pipeline, ours on emulated ones: lazy, eager, or one of each."""

    def __init__(self, dense, vae, make_quantized, *, eager: tuple[bool, ...]) -> None:
        self.theirs = pipeline_of(copy.deepcopy(dense), vae)
        self.ours = {
            "eager" if own else "lazy": qwenlora.attach(
                pipeline_of(make_quantized(), vae), eager=own
            )
            for own in eager
        }

    def call(self, name: str, *args, on="pipeline", **kwargs) -> None:
        """Call a method of all; all return alike, or all raise, ours what catches theirs."""
        theirs, *rest = (
            self._outcome(pipeline, name, args, kwargs, on)
            for pipeline in (self.theirs, *self.ours.values())
        )
        for how, ours in zip(self.ours, rest, strict=True):
            if theirs.error is not None:
                assert isinstance(ours.error, type(theirs.error)), (
                    how, name, theirs.error, ours.error
                )  # fmt: skip
                assert isinstance(ours.error, errors.QwenLoraError | TypeError)
            else:
                assert ours.error is None, (how, name, ours.error)
                if theirs.value is not None:
                    assert ours.value == theirs.value, how

    @staticmethod
    def _outcome(pipeline, name: str, args, kwargs, on: str) -> Outcome:
        owner = pipeline if on == "pipeline" else pipeline.transformer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = copy.deepcopy((args, kwargs))
            method = getattr(owner, name)
            return Outcome(lambda: method(*given[0], **given[1]))

    def compare(self, **options) -> None:
        """The same names, in the same order, and the same picture."""
        expected = picture(self.theirs, **options)
        for how, ours in self.ours.items():
            assert ours.get_active_adapters() == self.theirs.get_active_adapters(), how
            assert ours.get_list_adapters() == self.theirs.get_list_adapters(), how
            assert relative_error(picture(ours, **options), expected) < OUTPUT_BOUND, how


@pytest.fixture
def both(dense, vae, make_quantized):
    return Both(dense, vae, make_quantized, eager=(False, True))


A, B, C = tensors(1), tensors(2, rank=8), tensors(3)
SEQUENCES: dict[str, list[tuple[Any, ...]]] = {
    "nothing loaded": [
        ("enable_lora",),
        ("disable_lora",),
        ("delete_adapters", "x"),
        ("unload_lora_weights",),
        ("set_adapters", "x"),
        ("unfuse_lora",),
    ],
    "names by default": [
        ("load_lora_weights", A),
        ("load_lora_weights", B),
        ("load_lora_weights", C, "third"),
        ("set_adapters", ["default_1", "default_0"]),
    ],
    "the last that was loaded is active alone": [
        ("load_lora_weights", A, "elk"),
        ("load_lora_weights", B, "fox"),
    ],
    "order and weights": [
        ("load_lora_weights", A, "elk"),
        ("load_lora_weights", B, "fox"),
        ("load_lora_weights", C, "owl"),
        ("set_adapters", ["owl", "elk"], [0.5, -1.5]),
        ("set_adapters", ["elk", "fox", "owl"], 0.3),
        ("set_adapters", ["elk", "fox"], [None, 0.25]),
        ("set_adapters", "fox", [0.75]),
        ("set_adapters", "fox", 0.0),
        ("set_adapters", ["fox", "elk"], None),
    ],
    "weights that do not fit": [
        ("load_lora_weights", A, "elk"),
        ("load_lora_weights", B, "fox"),
        ("set_adapters", ["elk", "fox"], [0.5]),
        ("set_adapters", ["elk"], [0.5, 1.0]),
        ("set_adapters", ["elk", "nobody"], [0.5, 1.0]),
    ],
    "weights for each component": [
        ("load_lora_weights", A, "elk"),
        ("load_lora_weights", B, "fox"),
        ("set_adapters", "elk", {"transformer": 0.4}),
        ("set_adapters", ["elk", "fox"], [{"transformer": 0.4}, 0.7]),
        ("set_adapters", "elk", {"unet": 0.4}),
        ("set_adapters", "elk", [{"unet": 0.4}]),
    ],
    "a name twice": [
        ("load_lora_weights", A, "elk"),
        ("load_lora_weights", B, "elk"),
    ],
    "off and on": [
        ("load_lora_weights", A, "elk"),
        ("disable_lora",),
        ("enable_lora",),
        ("disable_lora",),
        ("load_lora_weights", B, "fox"),
        ("set_adapters", ["elk", "fox"], [0.5, 0.5]),
        ("enable_lora",),
    ],
    "delete": [
        ("load_lora_weights", A, "fox"),
        ("load_lora_weights", B, "elk"),
        ("load_lora_weights", C, "owl"),
        ("set_adapters", ["elk", "fox", "owl"], [0.5, 0.25, 0.75]),
        ("delete_adapters", "fox"),
        ("delete_adapters", ["nobody"]),
        ("set_adapters", "owl"),
        ("delete_adapters", "owl"),
        ("delete_adapters", "elk"),
        ("load_lora_weights", C),
    ],
    "the weight stays while another is active": [
        ("load_lora_weights", A, "elk"),
        ("set_adapters", "elk", 0.5),
        ("load_lora_weights", B, "fox"),
        ("delete_adapters", "fox"),
    ],
    "unload": [
        ("load_lora_weights", A, "elk"),
        ("disable_lora",),
        ("unload_lora_weights",),
        ("load_lora_weights", B),
    ],
    "hot swap": [
        ("load_lora_weights", A, "elk"),
        ("load_lora_weights", B, "fox"),
        ("set_adapters", ["fox", "elk"], [0.5, 0.25]),
        ("load_lora_weights", C, "elk", True),
        ("load_lora_weights", tensors(5, rank=2), "fox", True),
        ("load_lora_weights", C, "nobody", True),
        ("load_lora_weights", C, None, True),
    ],
}

WIDE = tensors(6, rank=2, paths=ALL_PATHS, top=TOP_PATHS)
OUTSIDE = {"in": 0.75, "proj_out": 0.75, "time_text": 0.75}
"""diffusers trips over a layer outside of blocks that no key names."""
BY_NAME: dict[str, dict[str, float]] = {
    "one block": {"transformer_blocks.0.": 0.25, **OUTSIDE},
    "all blocks": {"transformer_blocks.0.": 0.25, "transformer_blocks.1": -0.5, **OUTSIDE},
    "kinds": {"attn": 0.25, "mlp": -0.5, "mod": 0, **OUTSIDE},
    "a kind of all blocks": {"attn": 0.25, **OUTSIDE},
    "streams": {"img": 0.25, "txt": 0.5, "add": 0.5, "attn": 0.25, "proj": 0.25, "t": 1},
    "nothing but a block": {"transformer_blocks.1": 0.5, "": 0.0},
    "a kind of one stream": {"img_mlp": 0.25, "txt_mod": 2, **OUTSIDE},
    "the first that is in it holds": {"transformer_blocks.0.attn": 0.25, "attn": 0.5, **OUTSIDE},
    "block, then kind": {"transformer_blocks.0.": 0.25, "attn": 0.5, "mlp": 0, **OUTSIDE},
    "outside of blocks": {"img_in": 0.25, "txt_in": 0.5, "proj_out": 0.25, "time": 2, "attn": 0.5},
    "outside of blocks, some off": {"img_in": 0, "txt_in": 0, "proj_out": 0, "time": 2, "mlp": 3},
    "all of one": {"_": 0.5},
    "all off": {"_": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_weights_by_layers_names_are_peft_s(name, both):
    both.call("load_lora_weights", WIDE, "elk")
    both.call("set_adapters", "elk", {"transformer": BY_NAME[name]})
    both.compare()
    both.call("load_lora_weights", B, "fox")
    both.call("set_adapters", ["fox", "elk"], [0.5, {"transformer": BY_NAME[name]}])
    both.compare()
    both.call("set_adapters", ["elk"], BY_NAME[name], on="transformer")
    both.compare()
    # It keeps its weights while it is not active.
    both.call("set_adapters", ["fox"], on="transformer")
    both.call("set_adapter", ["elk"], on="transformer")
    both.compare()


def test_weights_by_name_are_one_lora_where_they_can_be(make_pipeline):
    pipeline = qwenlora.attach(make_pipeline(), eager=True)
    pipeline.load_lora_weights(WIDE, "elk")
    (one,) = pipeline.set_adapters("elk", {"transformer": BY_NAME["one block"]}).loras
    assert (one.name, one.strength, one.blocks) == ("elk", 1.0, "0:0.25; rest:0.75")
    (one,) = pipeline.set_adapters("elk", {"transformer": BY_NAME["kinds"]}).loras
    assert one.blocks == "attn:0.25, mlp:-0.5, mod:0, rest:0.75"
    several = pipeline.set_adapters("elk", {"transformer": BY_NAME["block, then kind"]})
    assert sum(lora.modules_applied for lora in several.loras) == len(WIDE) // 2 - 4
    # The layers are apart: no slot has more ranks than with one LoRA.
    assert {slot.rank_added for slot in several.slots if slot.kind == "svdq"} == {16}


def test_weights_that_no_factors_tell_apart_are_refused(pipeline):
    pipeline.load_lora_weights(WIDE, "elk")
    before = picture(pipeline)
    with pytest.raises(
        errors.AdapterWeightError,
        match=r"`elk` would get 1\.0 at `transformer_blocks\.0\.attn\.to_k` and 0\.5 at",
    ):
        pipeline.set_adapters("elk", {"transformer": {"to_q": 0.5}})
    with pytest.raises(errors.AdapterWeightError, match="cannot be on for one stream"):
        pipeline.set_adapters("elk", {"transformer": {"time": 0.0, "img_in": 0.5, "proj_out": 0.5}})
    for wrong in ({"attn": {"to_q": 1.0}}, {"attn": None}, {"attn": "1"}, {3: 1.0}):
        with pytest.raises(TypeError):
            pipeline.set_adapters("elk", {"transformer": wrong})
    assert torch.equal(picture(pipeline), before)
    # A LoRA of these layers alone can have them.
    pipeline.load_lora_weights(tensors(1, paths=("attn.to_q",)), "fox")
    pipeline.set_adapters("fox", {"transformer": {"to_q": 0.5}})


def test_keys_of_no_layer_and_of_more_blocks_are_warned_of(pipeline, caplog):
    pipeline.load_lora_weights(WIDE, "elk")
    pipeline.set_adapters("elk", {"transformer": {"down_blocks": 0.5}})
    assert "`down_blocks` is in no layer's name" in caplog.text
    caplog.clear()
    paths = [f"transformer_blocks.{block}.attn.to_q" for block in range(60)]
    parts_of("elk", [("transformer_blocks.0", 1.0)], paths)
    assert not caplog.records
    ((strength, factors),) = parts_of("elk", [("transformer_blocks.1", 0.5)], paths)
    assert (strength, str(factors)) == (1.0, "1:0.5, 10-19:0.5")
    assert "`transformer_blocks.1` also holds for `transformer_blocks.10.attn" in caplog.text
    assert "write `transformer_blocks.1.`" in caplog.text


KEYS = (
    *("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2", "blocks"),
    *("attn", "mlp", "mod", "img", "txt", "add_", "0.attn", "1.img_mlp", "2.txt"),
    *("_in", "img_in", "proj_out", "time"),
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KEYS),
            st.sampled_from([0.0, 0.5, -1.0, 2.0]),
        ),
        max_size=6,
    )
)
def test_parts_give_each_layer_what_diffusers_gives_it(by_name):
    paths = [f"transformer_blocks.{b}.{path}" for b in range(3) for path in ALL_PATHS]
    paths += TOP_PATHS
    try:
        parts = parts_of("elk", by_name, paths)
    except errors.AdapterWeightError:
        # The first layers that are unlike, or what is outside of blocks.
        assume(False)
    for path in paths:
        expected = next((weight for part, weight in by_name if part in path), 1.0)
        found = [strength * factors.factor(path) for strength, factors in parts]
        assert sum(weight != 0 for weight in found) == (expected != 0)
        assert sum(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEQUENCES)
def test_the_same_calls_do_what_peft_does(name, both):
    both.compare()
    for call, *args in SEQUENCES[name]:
        both.call(call, *args)
        both.compare()


TRANSFORMER_SEQUENCES: dict[str, list[tuple[Any, ...]]] = {
    "nothing loaded": [
        ("enable_lora",),
        ("disable_lora",),
        ("enable_adapters",),
        ("disable_adapters",),
        ("active_adapters",),
        ("set_adapter", "x"),
        ("delete_adapters", "x"),
        ("unload_lora",),
        ("unfuse_lora",),
    ],
    "all of them": [
        ("load_lora_adapter", A),
        ("load_lora_adapter", tensors(2, prefix=""), None),
        ("active_adapters",),
        ("set_adapters", ["default_1", "default_0"], [0.5, None]),
        ("active_adapters",),
        ("set_adapters", [], None),
        ("set_adapters", "default_0", 0.5),
        ("set_adapter", ["default_1", "default_0"]),
        ("set_adapter", ["nobody"]),
        ("disable_adapters",),
        ("active_adapters",),
        ("enable_adapters",),
        ("disable_lora",),
        ("enable_lora",),
        ("delete_adapters", ["default_0"]),
        ("unload_lora",),
        ("active_adapters",),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMER_SEQUENCES)
def test_the_same_calls_on_the_transformer(name, both):
    for call, *args in TRANSFORMER_SEQUENCES[name]:
        both.call(call, *args, on="transformer")
        both.compare()


@st.composite
def calls(draw):
    """A call that PEFT makes sense of."""
    names = st.sampled_from(["elk", "fox", "owl"])
    kind = draw(st.sampled_from(["load", "swap", "set", "delete", "off", "on", "unload"]))
    if kind in ("load", "swap"):
        seed = draw(st.sampled_from([1, 3, 4]))
        return ("load_lora_weights", seed, draw(names), kind == "swap")
    if kind == "set":
        chosen = draw(st.lists(names, unique=True, min_size=1))
        weight = st.one_of(st.none(), st.sampled_from([0.0, 0.5, -1.25, 2]))
        weights = st.lists(weight, min_size=len(chosen), max_size=len(chosen))
        return ("set_adapters", chosen, draw(weights))
    if kind == "delete":
        return ("delete_adapters", draw(st.lists(names, min_size=1)))
    simple = {"off": "disable_lora", "on": "enable_lora", "unload": "unload_lora_weights"}
    return (simple[kind],)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.lists(calls(), min_size=3, max_size=10), st.sampled_from([*QUANTIZED]), st.booleans())
def test_any_calls_do_what_peft_does(dense, vae, quantized, history, kind, eager):
    both = Both(dense, vae, functools.partial(quantized, kind), eager=(eager,))
    for call, *args in history:
        if call == "load_lora_weights":
            args[0] = tensors(args[0])
        both.call(call, *args)
        if not any(ours.get_list_adapters() for ours in both.ours.values()):
            # PEFT's layers stay turned off where all is deleted, until they are unloaded.
            both.call("unload_lora_weights")
    both.compare()


# ---- where ours differs, and why ----


def test_a_refused_call_changes_nothing(pipeline):
    """PEFT makes the names active before it trips over a weight."""
    pipeline.load_lora_weights(A, "elk")
    pipeline.load_lora_weights(B, "fox")
    pipeline.set_adapters("fox", 0.5)
    before = picture(pipeline)
    refused = [
        (TypeError, lambda: pipeline.set_adapters("elk", "strong")),
        (TypeError, lambda: pipeline.set_adapters([1], 0.5)),
        (ValueError, lambda: pipeline.set_adapters("elk", float("nan"))),
        (ValueError, lambda: pipeline.set_adapters(["elk", "elk"], [0.5, 0.5])),
        (ValueError, lambda: pipeline.set_adapters(["elk", "nobody"], 1.0)),
        (ValueError, lambda: pipeline.transformer.set_adapters("nobody")),
        (ValueError, lambda: pipeline.set_adapters(["elk", "fox"], [1.0])),
        (ValueError, lambda: pipeline.load_lora_weights(A, "elk")),
        (ValueError, lambda: pipeline.load_lora_weights(A, "")),
        (ValueError, lambda: pipeline.load_lora_weights(A, "owl", hotswap=True)),
        (ValueError, lambda: pipeline.load_lora_weights(A, hotswap=True)),
        (ValueError, lambda: pipeline.load_lora_weights({"x.weight": torch.zeros(2)}, "owl")),
        (ValueError, lambda: pipeline.load_lora_weights({"x.weight": 1}, "owl")),
        (TypeError, lambda: pipeline.load_lora_weights(3, "owl")),
        (TypeError, lambda: pipeline.load_lora_weights(A, "owl", weightname="x")),
        (OSError, lambda: pipeline.load_lora_weights("/nowhere/x.safetensors", "owl")),
        (ValueError, lambda: pipeline.transformer.load_lora_adapter(A, prefix="unet")),
        (NotImplementedError, lambda: pipeline.transformer.load_lora_adapter(A, metadata={"r": 1})),
        (NotImplementedError, lambda: pipeline.transformer.add_adapter(LoraConfig())),
        (NotImplementedError, lambda: pipeline.fuse_lora()),
        (NotImplementedError, lambda: pipeline.transformer.fuse_lora()),
        (ValueError, lambda: pipeline.save_lora_weights("x")),
        (ValueError, lambda: pipeline.transformer.save_lora_adapter("x")),
    ]
    for kind, call in refused:
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, errors.QwenLoraError | TypeError)
    assert pipeline.get_active_adapters() == ["fox"]
    assert pipeline.get_list_adapters() == {"transformer": ["elk", "fox"]}
    assert torch.equal(picture(pipeline), before)


def test_no_name_at_all_is_the_base(pipeline):
    """diffusers raises a KeyError on the pipeline, and takes the empty list on the transformer."""
    base = picture(pipeline)
    pipeline.load_lora_weights(A)
    pipeline.set_adapters([])
    assert pipeline.get_active_adapters() == []
    assert torch.equal(picture(pipeline), base)


def test_one_dict_holds_for_every_adapter(both):
    """diffusers takes the entry out of the dict for the first one: the others get 1."""
    both.call("load_lora_weights", A, "elk")
    both.call("load_lora_weights", B, "fox")
    both.theirs.set_adapters(["elk", "fox"], [{"transformer": 0.5}, {"transformer": 0.5}])
    weights = {"transformer": 0.5}
    for ours in both.ours.values():
        ours.set_adapters(["elk", "fox"], weights)
        assert weights == {"transformer": 0.5}
    both.compare()


def test_a_free_name_takes_no_other_one_s_place(pipeline):
    """PEFT counts the adapters, and writes over the one that has the number already."""
    pipeline.load_lora_weights(A)
    pipeline.load_lora_weights(B)
    pipeline.delete_adapters("default_0")
    pipeline.load_lora_weights(C)
    assert pipeline.get_list_adapters() == {"transformer": ["default_1", "default_2"]}


def test_a_swap_that_fails_keeps_the_old_one(pipeline):
    """PEFT forgets the adapter. One with other layers is no failure here."""
    pipeline.load_lora_weights(A, "elk")
    before = picture(pipeline)
    with pytest.raises(errors.LoraNotFoundError):
        pipeline.load_lora_weights("/nowhere/x.safetensors", "elk", hotswap=True)
    assert torch.equal(picture(pipeline), before)
    pipeline.load_lora_weights(tensors(1, paths=("txt_mlp.net.2",)), "elk", hotswap=True)
    assert not torch.equal(picture(pipeline), before)


def test_scale_of_zero_forgets_no_weight(pipeline):
    """diffusers sets every weight to 1 after a forward with scale 0."""
    base = picture(pipeline)
    pipeline.load_lora_weights(A, "elk")
    pipeline.set_adapters("elk", 0.5)
    before = picture(pipeline)
    assert torch.equal(picture(pipeline, attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(picture(pipeline), before)


# ---- scale in a call ----


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 1.0, -2, 0.0])
def test_scale_in_a_call_is_peft_s(both, scale):
    both.call("load_lora_weights", A, "elk")
    both.call("load_lora_weights", B, "fox")
    both.call("set_adapters", ["elk", "fox"], [0.5, 0.75])
    options = {"scale": scale}
    both.compare(attention_kwargs=options)
    assert options == {"scale": scale}


@pytest.mark.parametrize("name", ["joint_attention_kwargs", "cross_attention_kwargs"])
def test_scale_under_the_other_names(quantized, vae, name):
    """Forwards of other models call the argument so; the emulated one takes any."""
    pipeline = qwenlora.attach(pipeline_of(quantized("nunchaku"), vae))
    pipeline.load_lora_weights(A, "elk")
    expected = forward(pipeline.transformer, attention_kwargs={"scale": 0.5})
    assert torch.equal(forward(pipeline.transformer, **{name: {"scale": 0.5}}), expected)


def test_scale_that_is_no_number_is_refused(pipeline):
    pipeline.load_lora_weights(A, "elk")
    with pytest.raises(TypeError, match=r"`attention_kwargs` has a `scale` that is 'high'"):
        picture(pipeline, attention_kwargs={"scale": "high"})
    with pytest.raises(ValueError, match="strength is nan"):
        picture(pipeline, attention_kwargs={"scale": float("nan")})
    picture(pipeline)


def test_scale_of_a_stack_without_names(make_pipeline):
    """The wrapper alone honours it, too; tensors that were let go cannot be scaled."""
    pipeline = make_pipeline()
    wrapper = ComfyQwenImageWrapper.of(pipeline.transformer)
    wrapper.loras.append((A, 0.5))
    expected = picture(pipeline)
    wrapper.loras[:] = [A]
    assert torch.equal(picture(pipeline, attention_kwargs={"scale": 0.5}), expected)
    qwenlora.compose_loras(pipeline.transformer, A)
    with pytest.raises(errors.ModelStateError, match=r"cannot be made at scale 0\.5"):
        picture(pipeline, attention_kwargs={"scale": 0.5})


# ---- lazy, eager, reports ----


def test_lazily_nothing_is_composed_before_the_forward(pipeline, caplog):
    caplog.set_level(logging.INFO, logger="qwenlora")
    assert pipeline.load_lora_weights(A, "elk") is None
    assert pipeline.set_adapters("elk", 0.5) is None
    assert qwenlora.applied(pipeline.transformer).loras == ()
    picture(pipeline)
    (lora,) = pipeline.qwenlora.report.loras
    assert (lora.name, lora.strength, lora.modules_applied) == ("elk", 0.5, 10)
    pipeline.set_adapters("elk", 0.25)
    assert pipeline.qwenlora.compose().loras[0].strength == 0.25


def test_eagerly_every_change_gives_its_report(make_pipeline):
    pipeline = qwenlora.attach(make_pipeline(), eager=True)
    assert pipeline.load_lora_weights(A, "elk").loras[0].name == "elk"
    assert pipeline.set_adapters("elk", 0.5).loras[0].strength == 0.5
    assert pipeline.disable_lora().loras == ()
    assert pipeline.enable_lora().complete
    assert pipeline.transformer.set_adapter("elk").loras[0].strength == 0.5
    assert pipeline.delete_adapters("elk").loras == ()
    pipeline.qwenlora.eager = False
    assert pipeline.load_lora_weights(A, "elk") is None


def test_eagerly_what_cannot_be_composed_changes_nothing(make_pipeline):
    pipeline = qwenlora.attach(make_pipeline(), eager=True)
    pipeline.load_lora_weights(A, "elk")
    before = picture(pipeline)
    broken = {**B, next(iter(B)): torch.full_like(next(iter(B.values())), float("nan"))}
    with pytest.raises(errors.NonFiniteError):
        pipeline.load_lora_weights(broken, "fox")
    assert pipeline.get_list_adapters() == {"transformer": ["elk"]}
    assert pipeline.get_active_adapters() == ["elk"]
    assert torch.equal(picture(pipeline), before)


def test_lazily_what_cannot_be_composed_is_raised_by_the_forward(pipeline):
    base = picture(pipeline)
    broken = {**B, next(iter(B)): torch.full_like(next(iter(B.values())), float("nan"))}
    pipeline.load_lora_weights(broken, "fox")
    with pytest.raises(errors.NonFiniteError):
        picture(pipeline)
    pipeline.delete_adapters("fox")
    assert torch.equal(picture(pipeline), base)


def test_what_belongs_to_a_text_encoder_is_named(pipeline, caplog):
    caplog.set_level(logging.INFO, logger="qwenlora")
    key = "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight"
    pipeline.load_lora_weights({**A, key: torch.zeros(4, 8)}, "elk")
    report = pipeline.qwenlora.reports["elk"]
    assert report.complete
    assert [(skip.name, skip.reason) for skip in report.skipped] == [(key, "text encoder")]
    assert f"`elk`: left out of the file: 1 x text encoder (e.g. `{key}`)" in caplog.text
    assert pipeline.get_list_adapters() == {"transformer": ["elk"]}
    with pytest.raises(errors.OtherModelError, match="a LoRA of a text encoder"):
        pipeline.load_lora_weights({key: torch.zeros(4, 8)}, "fox")


def test_a_part_that_does_not_fit_is_warned_of(pipeline, caplog):
    wrong = dict(A)
    wrong[next(iter(A))] = torch.zeros(4, 77)
    pipeline.load_lora_weights(wrong, "elk")
    assert not pipeline.qwenlora.reports["elk"].complete
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "`elk`: not applied: 1 x" in record.getMessage()


def test_limits_are_the_wrapper_s(make_pipeline):
    pipeline = qwenlora.attach(make_pipeline(), eager=True)
    pipeline.qwenlora.wrapper.max_rank = 16
    report = pipeline.load_lora_weights(tensors(1, rank=40), "elk")
    assert {slot.rank_added for slot in report.slots} == {16}


def test_the_last_call_wins(pipeline):
    """The wrapper and `compose_loras` go on working on an attached transformer."""
    pipeline.load_lora_weights(A, "elk")
    expected = picture(pipeline)
    qwenlora.compose_loras(pipeline.transformer, B)
    assert not torch.equal(picture(pipeline), expected)
    pipeline.qwenlora.wrapper.loras.append(C)
    picture(pipeline)
    pipeline.set_adapters("elk")
    assert torch.equal(picture(pipeline), expected)
    assert pipeline.qwenlora.wrapper.loras == []


# ---- signatures ----


CLASSES = {
    "pipeline": (PIPELINE_METHODS, (QwenImageLoraLoaderMixin, LoraBaseMixin)),
    "transformer": (TRANSFORMER_METHODS, (PeftAdapterMixin,)),
}


@pytest.mark.parametrize("where", CLASSES)
def test_signatures_are_those_of_diffusers(pipeline, where):
    methods, classes = CLASSES[where]
    owner = pipeline if where == "pipeline" else pipeline.transformer
    for name in methods:
        # `getattr` with a class of diffusers' would give a class method bound already.
        (theirs,) = [vars(kind)[name] for kind in classes if name in vars(kind)][:1]
        expected = list(inspect.signature(getattr(theirs, "__func__", theirs)).parameters.values())
        found = list(inspect.signature(getattr(owner, name)).parameters.values())
        positional = [one for one in found if one.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert [one.name for one in positional] == [one.name for one in expected[1:]], name
        for mine, its in zip(positional, expected[1:], strict=True):
            default = tuple(its.default) if isinstance(its.default, list) else its.default
            assert mine.default == default, (name, mine.name)


def test_every_lora_method_of_a_pipeline_is_answered():
    """diffusers' public methods for LoRAs, but class methods that need no transformer."""
    given = {
        name
        for kind in (QwenImageLoraLoaderMixin, LoraBaseMixin)
        for name, value in vars(kind).items()
        if callable(getattr(kind, name)) and not name.startswith("_")
        if not isinstance(value, classmethod | staticmethod)
    }
    assert given - set(PIPELINE_METHODS) == set()
    on_model = {
        name
        for name in vars(PeftAdapterMixin)
        if callable(getattr(PeftAdapterMixin, name)) and not name.startswith("_")
    }
    assert on_model - set(TRANSFORMER_METHODS) == set()


# ---- attach and detach ----


def test_detach_leaves_no_trace(make_pipeline, probe):
    pipeline = make_pipeline()
    base, before = picture(pipeline), probe.snapshot(pipeline.transformer)
    names = set(vars(pipeline))
    qwenlora.attach(pipeline)
    pipeline.load_lora_weights(A, "elk")
    assert not torch.equal(picture(pipeline), base)
    qwenlora.detach(pipeline)
    assert set(vars(pipeline)) == names
    assert before.differences(probe.snapshot(pipeline.transformer)) == []
    assert torch.equal(picture(pipeline), base)
    qwenlora.detach(pipeline)
    # The class's own method answers again: PEFT cannot.
    with pytest.raises((AttributeError, ValueError), match=r"load_lora_adapter|is not supported"):
        pipeline.load_lora_weights(copy.deepcopy(A), "elk")


def test_detach_keeps_a_wrapper_that_was_there(make_pipeline):
    pipeline = make_pipeline()
    wrapper = ComfyQwenImageWrapper.of(pipeline.transformer)
    qwenlora.attach(pipeline)
    pipeline.load_lora_weights(A)
    qwenlora.detach(pipeline)
    base = picture(pipeline)
    wrapper.loras.append(A)
    assert not torch.equal(picture(pipeline), base)


def test_attaching_again_is_no_work(pipeline):
    pipeline.load_lora_weights(A, "elk")
    handle, expected = pipeline.qwenlora, picture(pipeline)
    assert qwenlora.attach(pipeline) is pipeline
    assert pipeline.qwenlora is handle
    assert torch.equal(picture(pipeline), expected)


class NoTransformer:
    transformer = None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda p: None, "a NoneType has no transformer"),
        (lambda p: NoTransformer(), "a NoTransformer has no transformer"),
        (lambda p: p.transformer, "attach takes a pipeline, not a "),
        (lambda p: type("P", (), {"transformer": 3})(), "expected a transformer module, got int"),
        (lambda p: SimpleNamespace(transformer=p.transformer), "cannot carry methods of its own"),
    ],
)
def test_what_is_no_pipeline_is_refused(make_pipeline, given, message):
    pipeline = make_pipeline()
    with pytest.raises(errors.UnsupportedModelError, match=message):
        qwenlora.attach(given(pipeline))
    assert "set_adapters" not in vars(pipeline.transformer)


def test_a_dense_transformer_is_refused(dense, vae):
    pipeline = pipeline_of(dense, vae)
    before = set(vars(pipeline)), set(vars(dense))
    with pytest.raises(errors.UnsupportedModelError, match="has no SVDQuant layer"):
        qwenlora.attach(pipeline)
    assert (set(vars(pipeline)), set(vars(dense)) - {"_qwenlora_structure"}) == before


@pytest.mark.parametrize("how", ["eager", "lazy", "peft"])
def test_loras_without_a_name_are_not_taken_over(make_pipeline, how):
    pipeline = make_pipeline()
    if how == "eager":
        qwenlora.compose_loras(pipeline.transformer, A)
    elif how == "lazy":
        ComfyQwenImageWrapper.of(pipeline.transformer).loras.append(A)
    else:
        pipeline.transformer.peft_config = {"elk": LoraConfig()}
    with pytest.raises(errors.ModelStateError, match="are on the transformer"):
        qwenlora.attach(pipeline)
    assert "qwenlora" not in vars(pipeline)


def test_a_second_pipeline_shares_the_adapters(pipeline):
    pipeline.load_lora_weights(A, "elk")
    expected = picture(pipeline)
    # diffusers compares types, and an attached transformer has one that graphs are told by.
    given = pipeline.transformer
    second = qwenlora.attach(QwenImagePipeline.from_pipe(pipeline, transformer=given))
    second.set_progress_bar_config(disable=True)
    assert second.transformer is pipeline.transformer
    assert second.get_active_adapters() == ["elk"]
    second.load_lora_weights(B, "fox")
    assert pipeline.get_list_adapters() == {"transformer": ["elk", "fox"]}
    qwenlora.detach(second)
    pipeline.set_adapters("elk")
    assert torch.equal(picture(pipeline), expected)
    qwenlora.detach(pipeline)
    assert "set_adapters" not in vars(pipeline.transformer)


def test_components_make_another_pipeline_with_the_loras(pipeline):
    """Without methods of its own, until it is attached; PEFT's loader goes to ours."""
    pipeline.load_lora_weights(A, "elk")
    assert set(pipeline.components) == {
        "scheduler", "vae", "text_encoder", "tokenizer", "transformer"
    }  # fmt: skip
    other = QwenImageImg2ImgPipeline(**pipeline.components)
    assert "set_adapters" not in vars(other)
    other.load_lora_weights(copy.deepcopy(B), "fox")
    assert pipeline.get_list_adapters() == {"transformer": ["elk", "fox"]}
    qwenlora.attach(other)
    assert other.get_active_adapters() == ["fox"]


def test_another_transformer_in_the_pipeline_is_noticed(pipeline, make_quantized):
    pipeline.load_lora_weights(A, "elk")
    pipeline.transformer = make_quantized()
    with pytest.raises(errors.ModelStateError, match=r"call qwenlora\.attach"):
        pipeline.set_adapters("elk")
    qwenlora.attach(pipeline)
    assert pipeline.get_list_adapters() == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantize", [pytest.param(quantize, id=kind) for kind, quantize in QUANTIZED.items()]
)
def test_a_compiled_transformer_is_looked_through(quantize, vae):
    pipeline = qwenlora.attach(pipeline_of(quantize(dense_transformer(num_layers=1)), vae))
    base = picture(pipeline)
    plain = pipeline.transformer
    pipeline.transformer = torch.compile(plain, backend="eager")
    pipeline.load_lora_weights(tensors(1, blocks=1), "elk")
    changed = picture(pipeline)
    assert not torch.equal(changed, base)
    pipeline.transformer.set_adapters("elk", 0.0)
    assert relative_error(picture(pipeline), base) < OUTPUT_BOUND
    assert plain.active_adapters() == ["elk"]


# ---- copies, pickles, threads, what is let go ----


def test_a_deep_copy_is_attached_by_itself(pipeline):
    pipeline.load_lora_weights(A, "elk")
    expected = picture(pipeline)
    copied = copy.deepcopy(pipeline)
    assert copied.transformer is not pipeline.transformer
    assert copied.qwenlora.pipeline is copied
    assert torch.equal(picture(copied), expected)
    copied.load_lora_weights(B, "fox")
    copied.set_adapters(["elk", "fox"], 0.5)
    assert not torch.equal(picture(copied), expected)
    assert pipeline.get_list_adapters() == {"transformer": ["elk"]}
    assert torch.equal(picture(pipeline), expected)
    qwenlora.detach(copied)
    assert torch.equal(picture(pipeline), expected)


def test_a_deep_copy_of_the_transformer_alone(pipeline):
    pipeline.load_lora_weights(A, "elk")
    copied = copy.deepcopy(pipeline.transformer)
    copied.delete_adapters("elk")
    assert pipeline.get_active_adapters() == ["elk"]
    with pytest.raises(ValueError, match="no adapter is loaded"):
        copied.active_adapters()


def test_a_shallow_copy_acts_on_the_same_transformer(pipeline):
    copied = copy.copy(pipeline)
    copied.load_lora_weights(A, "elk")
    assert pipeline.get_active_adapters() == ["elk"]
    qwenlora.attach(copied)
    expected = picture(pipeline)
    qwenlora.detach(pipeline)
    assert torch.equal(picture(copied), expected)
    assert copied.get_active_adapters() == ["elk"]


def test_a_method_of_a_pipeline_that_is_gone(pipeline):
    copied = copy.copy(pipeline)
    method = copied.load_lora_weights
    owner = weakref.ref(pipeline)
    # The fixture holds the original; a method of any other object will do.
    assert method.owner is owner()
    orphan = pickle.loads(pickle.dumps(copied.enable_lora))
    gc.collect()
    with pytest.raises(errors.ModelStateError, match="belongs to an object that is gone"):
        orphan()


@pytest.mark.parametrize("source", ["file", "state dict"])
def test_a_pickle_is_attached(pipeline, source, tmp_path):
    save_file(A, tmp_path / "elk.safetensors")
    pipeline.load_lora_weights(tmp_path / "elk.safetensors" if source == "file" else A, "elk")
    pipeline.load_lora_weights(B, "fox")
    pipeline.set_adapters(["fox", "elk"], [0.5, 0.25])
    expected = picture(pipeline)
    loaded = pickle.loads(pickle.dumps(pipeline))
    assert loaded.qwenlora.pipeline is loaded
    assert loaded.get_active_adapters() == ["fox", "elk"]
    assert torch.equal(picture(loaded), expected)
    loaded.set_adapters("elk")
    assert pipeline.get_active_adapters() == ["fox", "elk"]


def test_a_pickle_whose_file_is_gone(pipeline, tmp_path, caplog):
    save_file(A, tmp_path / "elk.safetensors")
    pipeline.load_lora_weights(tmp_path / "elk.safetensors", "elk")
    pipeline.load_lora_weights(B, "fox")
    pipeline.set_adapters(["fox", "elk"])
    dumped = pickle.dumps(pipeline)
    (tmp_path / "elk.safetensors").unlink()
    loaded = pickle.loads(dumped)
    assert loaded.get_list_adapters() == {"transformer": ["fox"]}
    assert loaded.get_active_adapters() == ["fox"]
    assert "adapter `elk` is gone" in caplog.text


def test_nothing_keeps_them_alive(make_pipeline):
    """Counts of references alone free them: 11 GB would wait for the collector otherwise."""
    gc.collect()
    gc.disable()
    try:
        pipeline = qwenlora.attach(make_pipeline())
        pipeline.load_lora_weights(A, "elk")
        # Not a whole picture: diffusers' own hooks for that are a cycle on its own models.
        forward(pipeline.transformer)
        pipeline.set_adapters("elk", 0.5)
        forward(pipeline.transformer, attention_kwargs={"scale": 0.5})
        tensor = weakref.ref(pipeline.transformer.img_in.weight)
        gone = [weakref.ref(pipeline), weakref.ref(pipeline.transformer), tensor]
        gone.append(weakref.ref(pipeline.qwenlora))
        del pipeline
        assert [reference() for reference in gone] == [None] * 4
    finally:
        gc.enable()


def test_a_deleted_adapter_lets_its_tensors_go(pipeline):
    pipeline.load_lora_weights(A, "elk")
    picture(pipeline)
    roster = vars(pipeline.transformer)["_qwenlora_roster"]
    tensor = weakref.ref(next(iter(roster.adapters.loaded["elk"].spec.source.values())))
    pipeline.delete_adapters("elk")
    picture(pipeline)
    gc.collect()
    assert tensor() is None


def test_a_state_dict_is_copied(pipeline):
    given = {key: tensor.clone() for key, tensor in A.items()}
    pipeline.load_lora_weights(given, "elk")
    expected = picture(pipeline)
    for tensor in given.values():
        tensor.zero_()
    pipeline.set_adapters("elk", 0.5)
    picture(pipeline)
    pipeline.set_adapters("elk", 1.0)
    assert torch.equal(picture(pipeline), expected)


def test_calls_in_inference_mode(pipeline):
    expected = None
    for _ in range(2):
        with torch.inference_mode():
            pipeline.load_lora_weights({key: tensor.clone() for key, tensor in A.items()}, "elk")
            found = picture(pipeline)
        assert expected is None or torch.equal(found, expected)
        expected = found.clone()
        pipeline.unload_lora_weights()


@pytest.mark.slow
@pytest.mark.parametrize("eager", [False, True])
def test_threads_change_and_run_one_transformer(make_pipeline, eager):
    """Each picture is of one of the sets that were asked for, never of a mixture."""
    pipeline = qwenlora.attach(make_pipeline(), eager=eager)
    pipeline.load_lora_weights(A, "elk")
    pipeline.load_lora_weights(B, "fox")
    sets = [["elk"], ["fox"], ["elk", "fox"]]
    expected = []
    for names in sets:
        pipeline.set_adapters(names, 0.5)
        expected.append(forward(pipeline.transformer))

    def change() -> None:
        for turn in range(12):
            pipeline.set_adapters(sets[turn % 3], 0.5)

    def run() -> list[torch.Tensor]:
        return [forward(pipeline.transformer) for _ in range(12)]

    with ThreadPoolExecutor(4) as pool:
        changes, runs = ([pool.submit(work) for _ in range(2)] for work in (change, run))
        for done in changes:
            done.result()
        found = [picture for done in runs for picture in done.result()]
    # In another thread memory lies otherwise, and some CPUs then add in another order.
    assert all(min(relative_error(one, own) for own in expected) < OUTPUT_BOUND for one in found)
    apart = [
        relative_error(one, other) for one in expected for other in expected if one is not other
    ]
    assert min(apart) > 100 * OUTPUT_BOUND


def test_a_callback_between_steps_may_change_them(pipeline):
    """diffusers calls it between forwards: the rest of the steps have another set."""
    pipeline.load_lora_weights(A, "elk")
    whole = picture(pipeline)

    def turn_off(own, step, timestep, kwargs):
        own.disable_lora()
        return {}

    half = picture(pipeline, callback_on_step_end=turn_off)
    pipeline.disable_lora()
    base = picture(pipeline)
    assert not torch.equal(half, whole)
    assert not torch.equal(half, base)
