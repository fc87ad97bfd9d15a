"""`qwenlora.attach`: diffusers' own methods do on the 4-bit transformer what PEFT does on a dense one.

The same calls are made on two real `QwenImagePipeline`s. One runs diffusers' dense transformer with
PEFT, the other the emulated transformer with the same weights. After every call both must name the
same adapters, raise alike, and make the same picture.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import qwenlora
from qwenlora import errors
from qwenlora.emulation import EmulatedQwenImageTransformer, Precision

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 128
OUTPUT_BOUND = 1e-5
"""Relative error of a denoised latent in float32; measured: 1e-7."""
BLOCK_PATHS = ("attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0", "img_mlp.net.2")


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=96,
        axes_dims_rope=(16, 24, 24),
    )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]
    )


def pipeline_of(transformer, vae):
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def emulated(dense):
    return EmulatedQwenImageTransformer.from_diffusers(
        dense, rank=32, precision=Precision.EXACT, dtype=torch.float32
    )


@pytest.fixture
def make_pipeline(dense, vae):
    return lambda: pipeline_of(emulated(dense), vae)


@pytest.fixture
def pipeline(make_pipeline):
    return qwenlora.attach(make_pipeline())


def picture(pipeline, **options) -> torch.Tensor:
    """The latent that two steps make."""
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt_embeds=torch.randn(1, 6, 96, generator=generator),
        prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
        num_inference_steps=2,
        height=32,
        width=32,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **options,
    ).images


def tensors(seed, *, rank=4, paths=BLOCK_PATHS, top=(), prefix="transformer.") -> dict[str, Any]:
    """A LoRA that changes the picture visibly."""
    generator = torch.Generator().manual_seed(seed)
    targets = [f"transformer_blocks.{block}.{path}" for block in range(2) for path in paths]
    found = {}
    for target in (*targets, *top):
        inputs = 4 * WIDTH if target.endswith("net.2") else WIDTH
        outputs = 64 if target == "proj_out" else WIDTH
        down = torch.randn(rank, inputs, generator=generator)
        up = torch.randn(outputs, rank, generator=generator)
        found[f"{prefix}{target}.lora_A.weight"] = 0.4 * down
        found[f"{prefix}{target}.lora_B.weight"] = 0.4 * up
    return found


def relative_error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


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
    """PEFT on the dense pipeline, ours on the emulated one."""

    def __init__(self, dense, vae, *, eager) -> None:
        self.theirs = pipeline_of(copy.deepcopy(dense), vae)
        self.ours = qwenlora.attach(pipeline_of(emulated(dense), vae), eager=eager)

    def call(self, name: str, *args, on="pipeline", **kwargs) -> None:
        """Call a method of both; both return alike, or both raise, ours what catches theirs."""
        outcomes = []
        for pipeline in (self.theirs, self.ours):
            owner = pipeline if on == "pipeline" else pipeline.transformer
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = copy.deepcopy((args, kwargs))
                method = getattr(owner, name)
                outcomes.append(Outcome(lambda m=method, g=given: m(*g[0], **g[1])))
        theirs, ours = outcomes
        if theirs.error is not None:
            assert isinstance(ours.error, type(theirs.error)), (name, theirs.error, ours.error)
            assert isinstance(ours.error, errors.QwenLoraError | TypeError)
        else:
            assert ours.error is None, (name, ours.error)
            if theirs.value is not None:
                assert ours.value == theirs.value

    def compare(self) -> None:
        """The same names, in the same order, and the same picture."""
        assert self.ours.get_active_adapters() == self.theirs.get_active_adapters()
        assert self.ours.get_list_adapters() == self.theirs.get_list_adapters()
        assert relative_error(picture(self.ours), picture(self.theirs)) < OUTPUT_BOUND


@pytest.fixture(params=[False, True], ids=["lazy", "eager"])
def both(request, dense, vae):
    return Both(dense, vae, eager=request.param)


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
@given(st.lists(calls(), min_size=3, max_size=10), st.booleans())
def test_any_calls_do_what_peft_does(dense, vae, history, eager):
    both = Both(dense, vae, eager=eager)
    for call, *args in history:
        if call == "load_lora_weights":
            args[0] = tensors(args[0])
        both.call(call, *args)
        if not both.ours.get_list_adapters():
            # PEFT's layers stay turned off where all is deleted, until they are unloaded.
            both.call("unload_lora_weights")
    both.compare()
