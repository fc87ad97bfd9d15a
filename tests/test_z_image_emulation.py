"""Emulated Z-Image transformers: each form against diffusers' dense model, its names, its calls."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch

from qwenlora import emulation
from qwenlora.emulation import KernelContractError, Precision, ZImageForm
from qwenlora.emulation.fused_qkv import EPSILON, fused_qkv_norm_rotary
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide
from qwenlora.packing.rotation import pack_rotations, unpack_rotations

pytest.importorskip("diffusers.models.transformers.transformer_z_image")

pytestmark = pytest.mark.slow

RANK = 16
EXACT_BOUND = 2e-6
"""Relative error of an output in float32 against the dense model; measured: 7.6e-7."""
EPSILON_BOUND = 1e-5
"""The same where the norms of query and key have an epsilon of their own; measured: 3.7e-6."""
DELTA_BOUND = 2e-6
"""Relative error of an output with low-rank branches made longer; measured: 7.6e-7."""

FUSED_FORMS = (ZImageForm.FUSED, ZImageForm.PASSED, ZImageForm.COMFYUI)
"""Those where one function projects, normalizes and rotates."""
COMFYUI_FORMS = (ZImageForm.COMFYUI, ZImageForm.COMFYUI_CALLED)
LISTS = ("noise_refiner", "context_refiner", "layers")

NORMS = ["attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"]
ADALN = ["adaLN_modulation.0.weight", "adaLN_modulation.0.bias"]
TAIL = [*(f"{name}.weight" for name in NORMS), *ADALN]
SVDQ = ["qweight", "wscales", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up"]
LITE = ["qweight", "wscales", "smooth_factor", "proj_down", "proj_up"]


def of(path: str, names: list[str]) -> list[str]:
    return [f"{path}.{name}" for name in names]


def weights(*paths: str) -> list[str]:
    return [f"{path}.weight" for path in paths]


MLP = [*of("feed_forward.net.0.proj", SVDQ), *of("feed_forward.net.2", SVDQ)]
BLOCK = {
    ZImageForm.CALLED: [
        *weights("attention.norm_q", "attention.norm_k"),
        *of("attention.to_qkv", SVDQ),
        *of("attention.to_out.0", SVDQ),
        *MLP,
    ],
    ZImageForm.FUSED: [
        *of("attention.to_out.0", SVDQ),
        *[f"attention.fused_module.qkv_{name}" for name in SVDQ],
        "attention.fused_module.norm_q_weight",
        "attention.fused_module.norm_k_weight",
        *MLP,
    ],
    ZImageForm.PASSED: [
        *of("attention.to_qkv", SVDQ),
        *weights("attention.norm_q", "attention.norm_k"),
        *of("attention.to_out.0", SVDQ),
        *MLP,
    ],
    ZImageForm.STOCK: [
        *weights("attention.norm_q", "attention.norm_k"),
        *of("attention.to_q", LITE),
        *of("attention.to_k", LITE),
        *of("attention.to_v", LITE),
        *of("attention.to_out.0", LITE),
        *of("feed_forward.w1", LITE),
        *of("feed_forward.w2", LITE),
        *of("feed_forward.w3", LITE),
    ],
    ZImageForm.COMFYUI: [
        *of("attention.qkv", SVDQ),
        *of("attention.out", SVDQ),
        *weights("attention.q_norm", "attention.k_norm"),
        *of("feed_forward.w13", SVDQ),
        *of("feed_forward.w2", SVDQ),
    ],
}
BLOCK[ZImageForm.COMFYUI_CALLED] = BLOCK[ZImageForm.COMFYUI]
"""Parameters of a quantized block, in order, before its norms and modulation."""

STOCK_ATTENTION = weights(
    *("attention.norm_q", "attention.norm_k", "attention.to_q", "attention.to_k"),
    *("attention.to_v", "attention.to_out.0"),
)
DENSE_SWIGLU = [*STOCK_ATTENTION, *weights("feed_forward.net.0.proj", "feed_forward.net.2")]
DENSE_BLOCK = {
    ZImageForm.CALLED: DENSE_SWIGLU,
    ZImageForm.FUSED: DENSE_SWIGLU,
    ZImageForm.PASSED: DENSE_SWIGLU,
    ZImageForm.STOCK: [*STOCK_ATTENTION, *weights(*(f"feed_forward.w{n}" for n in (1, 2, 3)))],
    ZImageForm.COMFYUI: weights(
        *("attention.qkv", "attention.out", "attention.q_norm", "attention.k_norm"),
        *(f"feed_forward.w{n}" for n in (1, 2, 3)),
    ),
}
DENSE_BLOCK[ZImageForm.COMFYUI_CALLED] = DENSE_BLOCK[ZImageForm.COMFYUI]
"""The same of a block of a refiner that is not quantized."""

EDGES = {
    *("x_pad_token", "cap_pad_token", "cap_embedder.0.weight"),
    *("cap_embedder.1.weight", "cap_embedder.1.bias"),
    *("t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias"),
    *("t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias"),
}
ENDS = ("linear.weight", "linear.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias")
DIFFUSERS_EDGES = EDGES | {
    *("all_x_embedder.2-1.weight", "all_x_embedder.2-1.bias"),
    *(f"all_final_layer.2-1.{name}" for name in ENDS),
}
COMFYUI_EDGES = EDGES | {
    *("x_embedder.weight", "x_embedder.bias"),
    *(f"final_layer.{name}" for name in ENDS),
}

QKV = ("attention.to_q", "attention.to_k", "attention.to_v")
SLOTS = {
    form: {
        qkv: QKV,
        "attention.to_out.0.": ("attention.to_out.0",),
        "feed_forward.net.0.proj.": ("feed_forward.w3", "feed_forward.w1"),
        "feed_forward.net.2.": ("feed_forward.w2",),
    }
    for form, qkv in (
        (ZImageForm.CALLED, "attention.to_qkv."),
        (ZImageForm.FUSED, "attention.fused_module.qkv_"),
        (ZImageForm.PASSED, "attention.to_qkv."),
    )
} | {
    ZImageForm.STOCK: {
        f"{name}.": (name,)
        for name in (*QKV, "attention.to_out.0", *(f"feed_forward.w{n}" for n in (1, 2, 3)))
    },
    ZImageForm.COMFYUI: {
        "attention.qkv.": QKV,
        "attention.out.": ("attention.to_out.0",),
        "feed_forward.w13.": ("feed_forward.w3", "feed_forward.w1"),
        "feed_forward.w2.": ("feed_forward.w2",),
    },
}
SLOTS[ZImageForm.COMFYUI_CALLED] = SLOTS[ZImageForm.COMFYUI]
"""Where a form keeps a low-rank branch, and the dense linears whose rows it adds to, in order."""


@pytest.fixture(scope="module")
def dense():
    return emulation.tiny_z_image(layers=1)


@pytest.fixture(scope="module")
def build(dense):
    @functools.cache
    def build(form, *, quantized_refiners=True, precision=Precision.EXACT, dtype=torch.float32):
        return emulation.z_image_transformer(
            dense,
            form=form,
            rank=RANK,
            precision=precision,
            dtype=dtype,
            quantized_refiners=quantized_refiners,
        )

    return build


def inputs(*captions: int, side: int = 8):
    """Samples of as many tokens of caption each; neither they nor images fill their padding."""
    generator = torch.Generator().manual_seed(5)
    x = [torch.randn(16, 1, side, 12, generator=generator) for _ in captions]
    text = [torch.randn(length, 128, generator=generator) for length in captions]
    return x, torch.full((len(captions),), 0.3), text


def output(model, *captions: int, side: int = 8) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    x, t, text = inputs(*captions or (20,), side=side)
    with torch.no_grad():
        sample = model([part.to(dtype) for part in x], t, [part.to(dtype) for part in text]).sample
    return torch.stack(sample).float()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def reference(dense, form, quantized=LISTS):
    """The dense model with the epsilons that the form's norms of query and key have."""
    model = copy.deepcopy(dense)
    for name in LISTS:
        epsilon = dense.layers[0].attention.norm_q.eps
        if form in COMFYUI_FORMS:
            epsilon = torch.finfo(torch.float32).eps
        if form in FUSED_FORMS and name in quantized:
            epsilon = EPSILON
        for block in getattr(model, name):
            block.attention.norm_q.eps = block.attention.norm_k.eps = epsilon
    return model


@pytest.mark.parametrize("quantized_refiners", [True, False])
@pytest.mark.parametrize("form", ZImageForm)
def test_without_rounding_every_form_is_the_dense_model(dense, build, form, quantized_refiners):
    found = output(build(form, quantized_refiners=quantized_refiners))
    lists = LISTS if quantized_refiners else ("layers",)
    assert error(found, output(reference(dense, form, lists))) < EXACT_BOUND
    assert error(found, output(dense)) < EPSILON_BOUND


@pytest.mark.parametrize("form", ZImageForm)
def test_names_and_order_of_parameters(build, form):
    model = build(form)
    for path in LISTS:
        tail = TAIL if path != "context_refiner" else TAIL[: -len(ADALN)]
        block = getattr(model, path)[0]
        assert [name for name, _ in block.named_parameters()] == BLOCK[form] + tail
    assert not list(model.named_buffers())


@pytest.mark.parametrize("form", ZImageForm)
def test_names_around_the_blocks(build, form):
    edges = {name for name in build(form).state_dict() if not name.startswith(LISTS)}
    assert edges == (COMFYUI_EDGES if form in COMFYUI_FORMS else DIFFUSERS_EDGES)


@pytest.mark.parametrize("form", ZImageForm)
def test_names_of_dense_refiners(build, form):
    model = build(form, quantized_refiners=False)
    refined = [name for name, _ in model.noise_refiner[0].named_parameters()]
    assert refined == DENSE_BLOCK[form] + TAIL
    refined = [name for name, _ in model.context_refiner[0].named_parameters()]
    assert refined == DENSE_BLOCK[form] + TAIL[: -len(ADALN)]
    quantized = [name for name, _ in model.layers[0].named_parameters()]
    assert quantized == BLOCK[form] + TAIL


@pytest.mark.parametrize("form", ZImageForm)
def test_which_layers_are_called(build, form):
    model, calls = build(form), Counter()
    handles = [
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
        for path, module in model.named_modules()
        if path.startswith("layers.0.")
    ]
    output(model)
    for handle in handles:
        handle.remove()
    layers = {f"layers.0.{slot[:-1]}" for slot in SLOTS[form] if slot.endswith(".")}
    norms = {f"layers.0.attention.{name}" for name in ("norm_q", "norm_k", "q_norm", "k_norm")}
    uncalled = {
        ZImageForm.PASSED: {"layers.0.attention.to_qkv"},
        ZImageForm.COMFYUI: {"layers.0.attention.qkv"},
    }.get(form, set())
    assert {path for path in layers if calls[path] == 1} == layers - uncalled
    assert bool(norms & set(calls)) == (form not in FUSED_FORMS)
    assert calls["layers.0.adaLN_modulation.0"] == 1
    assert calls["layers.0.attention.fused_module"] == (form is ZImageForm.FUSED)


@pytest.mark.parametrize("form", ZImageForm)
def test_rows_of_joined_layers(dense, build, form):
    """Longer low-rank branches do to the output what their products do to the dense weights."""
    model, merged = copy.deepcopy(build(form)), reference(dense, form)
    generator = torch.Generator().manual_seed(3)
    for path in (f"{name}.0" for name in LISTS):
        for slot, members in SLOTS[form].items():
            linears = [merged.get_submodule(f"{path}.{member}") for member in members]
            down = torch.randn(RANK, linears[0].in_features, generator=generator)
            for linear in linears:
                up = torch.randn(linear.out_features, RANK, generator=generator) * 3e-3
                linear.weight += up @ down
                linear.addition = up
            lengthen(model, f"{path}.{slot}", down, torch.cat([one.addition for one in linears]))
    changed = output(merged)
    assert error(changed, output(dense)) > 0.03
    assert error(output(model), changed) < DELTA_BOUND


def lengthen(model, prefix: str, down: torch.Tensor, up: torch.Tensor) -> None:
    """Append a pair to the branch whose tensors begin with a prefix."""
    path, _, rest = prefix.rpartition(".")
    module = model.get_submodule(path)
    for side, name, pair in (
        (LowRankSide.DOWN, "proj_down", down),
        (LowRankSide.UP, "proj_up", up),
    ):
        axis = 0 if side is LowRankSide.DOWN else 1
        factor = pack.unpack_lowrank(getattr(module, rest + name), side)
        packed = pack.pack_lowrank(torch.cat([factor, pair], dim=axis), side)
        setattr(module, rest + name, torch.nn.Parameter(packed))
    if hasattr(module, "rank"):
        module.rank = factor.shape[axis] + RANK


def test_every_weight_counts(dense):
    base, model = output(dense), copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += 0.1 * before.std(correction=0).clamp(min=0.1) * noise
        assert error(output(model), base) > 5e-4, name
        parameter.copy_(before)


@pytest.mark.parametrize("form", [form for form in ZImageForm if form not in COMFYUI_FORMS[1:]])
def test_sixteen_bits(dense, build, form):
    expected = output(copy.deepcopy(dense).bfloat16())
    exact = build(form, dtype=torch.bfloat16)
    assert error(output(exact), expected) < 0.03
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in exact.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "qweight" not in name} == {torch.bfloat16}
    rounded = output(build(form, precision=Precision.W4A4, dtype=torch.bfloat16))
    assert 0.05 < error(rounded, expected) < 0.6


def test_forms_hold_the_same_numbers(build):
    """Rounded layers of one model: what differs is where values are rounded on the way."""
    called = build(ZImageForm.CALLED, precision=Precision.W4A4, dtype=torch.bfloat16)
    for form in (*FUSED_FORMS, ZImageForm.COMFYUI_CALLED):
        model = build(form, precision=Precision.W4A4, dtype=torch.bfloat16)
        assert tensors(model) == tensors(called)


def tensors(model) -> Counter:
    return Counter(
        (value.dtype, tuple(value.shape), float(value.double().sum()))
        for value in model.state_dict().values()
    )


@pytest.mark.parametrize("form", [ZImageForm.CALLED, ZImageForm.STOCK])
def test_samples_of_several_lengths(dense, build, form):
    expected = output(dense, 20, 40)
    assert error(output(build(form), 20, 40), expected) < EXACT_BOUND


@pytest.mark.parametrize("form", FUSED_FORMS)
def test_the_fused_kernel_takes_samples_one_by_one(build, form):
    with pytest.raises(KernelContractError, match="must be a multiple of 256, got: 32"):
        output(build(form), 20, 20)


def test_the_fused_kernel_takes_samples_of_whole_tiles(build):
    qkv = build(ZImageForm.PASSED).layers[0].attention
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 256, 384, generator=generator)
    rotation = torch.polar(torch.ones(2, 256, 64), torch.randn(2, 256, 64, generator=generator))

    def fused(at):
        norms = (qkv.norm_q.weight, qkv.norm_k.weight)
        return fused_qkv_norm_rotary(x[at], qkv.to_qkv, *norms, rotation[at])

    with torch.no_grad():
        both = fused(slice(0, 2))
        apart = torch.cat([fused(slice(0, 1)), fused(slice(1, 2))])
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", Precision)
def test_the_fused_kernel_does_what_follows_a_called_layer(build, precision):
    attention = (
        build(ZImageForm.CALLED, precision=precision, dtype=torch.bfloat16).layers[0].attention
    )
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 40, 384, generator=generator).bfloat16()
    rotation = torch.polar(torch.ones(1, 40, 64), torch.randn(1, 40, 64, generator=generator))
    norms = (attention.norm_q.weight, attention.norm_k.weight)
    with torch.no_grad():
        fused = fused_qkv_norm_rotary(x, attention.to_qkv, *norms, rotation)
        called = torch.cat(
            [part.flatten(2) for part in attention.processor.project(attention, x, rotation)],
            dim=-1,
        )
    assert fused.dtype == called.dtype == torch.bfloat16
    # Three roundings to bfloat16 against one.
    assert error(fused.float(), called.float()) < 0.01


def test_the_fused_kernels_contract(build):
    attention = build(ZImageForm.PASSED).layers[0].attention
    norms = (attention.norm_q.weight, attention.norm_k.weight)
    x, rotation = torch.zeros(1, 32, 384), torch.ones(1, 32, 64, dtype=torch.complex64)
    with pytest.raises(KernelContractError, match="`rotation` must have shape"):
        fused_qkv_norm_rotary(x, attention.to_qkv, *norms, rotation[:, :31])
    with pytest.raises(KernelContractError, match=r"`norm_q` must have shape \(128,\)"):
        fused_qkv_norm_rotary(x, attention.to_qkv, norms[0][:64], norms[1], rotation)
    other = emulation.SVDQW4A4Linear(
        384, 1024, RANK, False, precision=Precision.EXACT, torch_dtype=x.dtype
    )
    with pytest.raises(KernelContractError, match="heads of 128 channels, got: 1024 rows"):
        fused_qkv_norm_rotary(x, other, *norms, rotation)
    short = copy.deepcopy(attention.to_qkv)
    short.proj_up = torch.nn.Parameter(short.proj_up[:, :0])
    with pytest.raises(KernelContractError, match="must have one rank, got: 16 and 0"):
        fused_qkv_norm_rotary(x, short, *norms, rotation)


def test_without_rotations_the_fused_kernel_leaves_out_the_norms(build):
    attention = build(ZImageForm.PASSED).layers[0].attention
    norms = (attention.norm_q.weight, attention.norm_k.weight)
    x = torch.randn(1, 32, 384, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fused = fused_qkv_norm_rotary(x, attention.to_qkv, *norms, None)
        assert torch.equal(fused, attention.to_qkv(x))


@pytest.mark.parametrize("form", [ZImageForm.CALLED, ZImageForm.FUSED, ZImageForm.COMFYUI])
def test_a_cast_leaves_the_exact_weights(build, form):
    model = copy.deepcopy(build(form)).to(torch.bfloat16)
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in model.named_parameters() if name.endswith("qweight")}
    same = output(build(form, dtype=torch.bfloat16))
    assert error(output(model), same) < 0.03


def test_the_dense_model_is_only_read(dense, build):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    for form in ZImageForm:
        build(form, quantized_refiners=False)
    after = dense.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_third_refiner_is_refused(dense):
    other = copy.deepcopy(dense)
    other.siglip_refiner = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="option is not emulated: `siglip_feat_dim`"):
        emulation.z_image_transformer(
            other, form=ZImageForm.FUSED, rank=16, precision=Precision.EXACT, dtype=torch.float32
        )


def test_rotations_lie_as_the_tensor_cores_hold_a_product():
    tokens, channels = 32, 24
    angles = torch.randn(1, tokens, channels // 2, generator=torch.Generator().manual_seed(0))
    packed = torch.empty(tokens * channels)
    for token in range(tokens):
        for channel in range(channels):
            angle = angles[0, token, channel // 2]
            tile = token // 16 * (channels // 8) + channel // 8
            lane = token % 8 * 4 + channel % 8 // 2
            register = token % 16 // 8 * 2 + channel % 2
            packed[(tile * 32 + lane) * 4 + register] = angle.cos() if channel % 2 else angle.sin()
    packed = packed.view(1, tokens, channels)
    found = unpack_rotations(packed)
    torch.testing.assert_close(found, torch.stack([angles.sin(), angles.cos()], dim=-1))
    assert torch.equal(pack_rotations(found), packed)
