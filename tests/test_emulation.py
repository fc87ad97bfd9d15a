"""The emulated layers and model against diffusers, dense layers and plain formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn
from torch.nn import functional as F

from qwenlora import _reference, emulation
from qwenlora.emulation import (
    AWQW4A16Linear,
    EmulatedConfig,
    EmulatedQwenImageTransformer,
    KernelContractError,
    Precision,
    RowOrder,
    SVDQW4A4Linear,
    fused_gelu_mlp,
    nvfp4,
    random_transformer,
)
from qwenlora.emulation.leaf import frozen
from qwenlora.emulation.lowrank import low_rank_factors
from qwenlora.emulation.quantize import IntegerRange, quantize_activation
from qwenlora.packing import activation, pack
from qwenlora.packing.layout import LowRankSide

DENSE_CONFIG = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "axes_dims_rope": (8, 12, 12),
}
TINY = {
    "num_layers": 2,
    "heads": 4,
    "head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "joint_attention_dim": 48,
    "in_channels": 16,
    "out_channels": 4,
}
EXACT_FLOAT32 = {"rank": 32, "precision": Precision.EXACT, "dtype": torch.float32}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def dense_model():
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**DENSE_CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: none may stay at 0 or 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 24, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 48, generator=generator),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.7, 0.3]),
        "img_shapes": [[(1, 4, 5), (1, 2, 2)]] * 2,
    }


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_layer(outputs, inputs, seed=50):
    return randn(outputs, inputs, seed=seed) / inputs**0.5, 0.1 * randn(outputs, seed=seed + 1)


def smooth_factors(channels):
    return 0.5 + 1.5 * torch.rand(channels, generator=torch.Generator().manual_seed(9))


# ---- the whole model against diffusers ----


@pytest.mark.parametrize("mask", [None, [[1] * 7, [1] * 4 + [0] * 3], [[0, 1] * 3 + [1]] * 2])
def test_exact_model_is_the_dense_model(dense_model, inputs, mask):
    model = EmulatedQwenImageTransformer.from_diffusers(dense_model, **EXACT_FLOAT32)
    arguments = dict(inputs)
    if mask is not None:
        arguments["encoder_hidden_states_mask"] = torch.tensor(mask)
    expected = dense_model(**arguments, return_dict=False)[0]
    actual = model(**arguments, txt_seq_lens=[7, 7], guidance=None, controlnet=None)
    assert relative_error(actual.sample, expected) < 2e-6
    assert torch.equal(model(**arguments, return_dict=False)[0], actual.sample)


def test_one_image_shape_per_sample_as_a_tuple(dense_model, inputs):
    model = EmulatedQwenImageTransformer.from_diffusers(dense_model, **EXACT_FLOAT32)
    arguments = {**inputs, "img_shapes": [(2, 3, 4)] * 2}
    expected = dense_model(**arguments, return_dict=False)[0]
    assert relative_error(model(**arguments).sample, expected) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_model_stays_near_the_dense_model(dense_model, inputs, dtype):
    # dtype errors come from the 16-bit timestep, quantization errors from 4-bit activations
    model = EmulatedQwenImageTransformer.from_diffusers(
        dense_model, rank=32, precision=Precision.W4A4, dtype=dtype
    )
    arguments = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in inputs.items()}
    expected = dense_model(**inputs, return_dict=False)[0]
    sample = model(**arguments).sample
    assert sample.dtype == dtype
    assert 1e-3 < relative_error(sample, expected) < 0.25


def block_arguments(model):
    image_rotary_emb = model.pos_embed([[(1, 3, 4)]], max_txt_seq_len=5, device=torch.device("cpu"))
    return {
        "hidden_states": randn(2, 12, 128, seed=2),
        "encoder_hidden_states": randn(2, 5, 128, seed=3),
        "encoder_hidden_states_mask": None,
        "temb": randn(2, 128, seed=4),
        "image_rotary_emb": image_rotary_emb,
    }


def test_block_undoes_the_interleaving_of_the_modulation(dense_model):
    model = EmulatedQwenImageTransformer.from_diffusers(dense_model, **EXACT_FLOAT32)
    arguments = block_arguments(dense_model)
    expected = dense_model.transformer_blocks[0](**arguments)
    block = model.transformer_blocks[0]
    for actual_stream, expected_stream in zip(block(**arguments), expected, strict=True):
        assert relative_error(actual_stream, expected_stream) < 1e-6
    for name in ("img_mod", "txt_mod"):
        dense = getattr(dense_model.transformer_blocks[0], name)[1]
        getattr(block, name)[1].load_dense(dense.weight, dense.bias, row_order=RowOrder.PLANAR)
    for actual_stream, expected_stream in zip(block(**arguments), expected, strict=True):
        assert relative_error(actual_stream, expected_stream) > 0.3


def test_leftover_and_missing_weights_are_named(dense_model):
    state = dense_model.state_dict()
    extra = {**state, "transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"do not belong to the model: .*to_q\.lora_A\.weight"):
        EmulatedQwenImageTransformer.from_dense_state(extra, dense_model.config, **EXACT_FLOAT32)
    del state["transformer_blocks.1.attn.to_k.bias"]
    with pytest.raises(ValueError, match=r"missing: `transformer_blocks\.1\.attn\.to_k\.bias`"):
        EmulatedQwenImageTransformer.from_dense_state(state, dense_model.config, **EXACT_FLOAT32)


# ---- structure ----


def test_default_config_has_the_real_models_leaves():
    with torch.device("meta"):
        model = EmulatedQwenImageTransformer(EmulatedConfig())
    leaves = dict(model.named_modules())
    kinds = [type(leaf) for leaf in leaves.values()]
    assert kinds.count(SVDQW4A4Linear) == 480
    assert kinds.count(AWQW4A16Linear) == 120
    plain = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, nn.Linear)}
    assert {path: (leaf.in_features, leaf.out_features) for path, leaf in plain.items()} == {
        "img_in": (64, 3072),
        "txt_in": (3584, 3072),
        "time_text_embed.timestep_embedder.linear_1": (256, 3072),
        "time_text_embed.timestep_embedder.linear_2": (3072, 3072),
        "norm_out.linear": (3072, 6144),
        "proj_out": (3072, 64),
    }
    block = "transformer_blocks.59."
    quantized = {
        path.removeprefix(block): (leaf.in_features, leaf.out_features)
        for path, leaf in leaves.items()
        if path.startswith(block) and isinstance(leaf, SVDQW4A4Linear | AWQW4A16Linear)
    }
    assert quantized == {
        "attn.to_qkv": (3072, 9216),
        "attn.add_qkv_proj": (3072, 9216),
        "attn.to_out.0": (3072, 3072),
        "attn.to_add_out": (3072, 3072),
        "img_mlp.net.0.proj": (3072, 12288),
        "img_mlp.net.2": (12288, 3072),
        "txt_mlp.net.0.proj": (3072, 12288),
        "txt_mlp.net.2": (12288, 3072),
        "img_mod.1": (3072, 18432),
        "txt_mod.1": (3072, 18432),
    }


def test_parameters_have_nunchakus_names_order_shapes_and_dtypes():
    layer = SVDQW4A4Linear(192, 256, 48, precision=Precision.W4A4)
    found = [(n, tuple(p.shape), p.dtype) for n, p in layer.named_parameters()]
    assert found == [
        ("qweight", (256, 96), torch.int8),
        ("bias", (256,), torch.bfloat16),
        ("wscales", (3, 256), torch.bfloat16),
        ("smooth_factor", (192,), torch.bfloat16),
        ("smooth_factor_orig", (192,), torch.bfloat16),
        ("proj_down", (192, 48), torch.bfloat16),
        ("proj_up", (256, 48), torch.bfloat16),
    ]
    modulation = AWQW4A16Linear(128, 768, precision=Precision.W4A4)
    found = [(n, tuple(p.shape), p.dtype) for n, p in modulation.named_parameters()]
    assert found == [
        ("qweight", (192, 64), torch.int32),
        ("bias", (768,), torch.bfloat16),
        ("wscales", (2, 768), torch.bfloat16),
        ("wzeros", (2, 768), torch.bfloat16),
    ]


def test_only_the_mlp_linears_are_not_called_as_modules(dense_model, inputs):
    model = EmulatedQwenImageTransformer.from_diffusers(dense_model, **EXACT_FLOAT32)
    called = set()
    leaves = {
        path
        for path, leaf in model.named_modules()
        if isinstance(leaf, SVDQW4A4Linear | AWQW4A16Linear | nn.Linear)
    }
    for path in leaves:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
    model(**inputs)
    assert leaves - called == {path for path in leaves if "_mlp.net." in path}


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_models_are_reproducible_and_tame(inputs, precision, dtype):
    config = EmulatedConfig(**TINY, rank=16, precision=precision, dtype=dtype)
    model = random_transformer(config, seed=3)
    arguments = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in inputs.items()}
    sample = model(**arguments).sample
    assert 0.2 < sample.float().std() < 5
    assert torch.equal(random_transformer(config, seed=3)(**arguments).sample, sample)
    assert not torch.equal(random_transformer(config, seed=4)(**arguments).sample, sample)
    assert (model.dtype, model.device) == (dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads \\* head_dim must be a multiple of 128"),
        ({"axes_dims_rope": (8, 12, 14)}, "`axes_dims_rope` must be even and add up"),
        ({"rank": 24}, "rank must be a multiple of 16"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EmulatedConfig(**{**TINY, **changes})


def test_options_that_are_not_emulated_are_refused(dense_model):
    config = {**dense_model.config, "zero_cond_t": True}
    with pytest.raises(ValueError, match="option is not emulated: `zero_cond_t`"):
        EmulatedConfig.from_diffusers(config, **EXACT_FLOAT32)


# ---- SVDQ layer ----


@pytest.mark.parametrize("act_unsigned", [False, True])
@pytest.mark.parametrize("smooth", [None, smooth_factors(128)])
def test_exact_layer_is_the_dense_layer(act_unsigned, smooth):
    weight, bias = dense_layer(192, 128)
    layer = SVDQW4A4Linear.from_dense(
        weight, bias, smooth=smooth, act_unsigned=act_unsigned, **EXACT_FLOAT32
    )
    assert layer.proj_down.abs().sum() > 1  # the low-rank branch carries part of the weight
    for x in (randn(2, 9, 128), randn(5, 128)):
        assert relative_error(layer(x), F.linear(x.double(), weight.double(), bias.double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_layer_rounds_once_in_16_bits(dtype):
    weight, bias = dense_layer(192, 128)
    bias = bias.to(dtype)
    layer = SVDQW4A4Linear.from_dense(
        weight, bias, rank=32, precision=Precision.EXACT, dtype=dtype, smooth=smooth_factors(128)
    )
    x = randn(6, 128, dtype=dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    # half a unit in the last place of each value, and the float32 sum's own error
    step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(layer(x).double(), expected, rtol=1.01 * step, atol=2e-6)


@pytest.mark.parametrize("rank", [16, 64])
def test_more_base_rank_means_less_quantization_error(rank):
    # a weight of rank 32 and a little noise: rank 64 leaves only the noise to quantize
    weight = randn(256, 32) @ randn(32, 128, seed=1) / 32 + 0.002 * randn(256, 128, seed=2)
    layer = SVDQW4A4Linear.from_dense(
        weight, None, rank=rank, precision=Precision.W4A4, dtype=torch.float32
    )
    x = randn(64, 128, seed=3)
    error = relative_error(layer(x), x @ weight.T)
    assert error < 0.01 if rank == 64 else 0.05 < error < 0.2


@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a4_layer_is_the_formula_on_unpacked_integers(dtype):
    weight, bias = dense_layer(128, 128)
    layer = SVDQW4A4Linear.from_dense(
        weight, bias, rank=16, precision=Precision.W4A4, dtype=dtype, smooth=smooth_factors(128)
    )
    x = randn(7, 128, dtype=dtype)
    assert 0.01 < relative_error(layer(x), F.linear(x.float(), weight, bias)) < 0.2

    integers = _reference.unpack_svdq_qweight(layer.qweight)
    scales = _reference.unpack_svdq_wscales(layer.wscales)
    residual = torch.empty(128, 128)
    for n in range(128):
        for k in range(128):
            residual[n, k] = integers[n, k].float() * scales[n, k // 64].float()
    smoothed = x / _reference.unpack_vector(layer.smooth_factor)
    activation = torch.empty(7, 128)
    for m in range(7):
        for begin in (0, 64):
            group = smoothed[m, begin : begin + 64].float()
            scale = group.abs().max() * (1 / 7)
            steps = (group * (1 / scale)).round().clamp(-8, 7)
            activation[m, begin : begin + 64] = steps * scale.to(dtype).float()
    down = _reference.unpack_lowrank(layer.proj_down, LowRankSide.DOWN).float()
    up = _reference.unpack_lowrank(layer.proj_up, LowRankSide.UP).float()
    low_rank = (x.float() @ down.T).to(dtype).float() @ up.T
    bias_stored = _reference.unpack_vector(layer.bias).float()
    expected = (activation @ residual.T + bias_stored + low_rank).to(dtype)
    assert torch.equal(layer(x), expected)


def test_activations_quantize_to_the_kernels_integers():
    x = torch.zeros(2, 128)
    x[0, :4] = torch.tensor([7.0, -7.0, 2.4, -2.6])
    x[1, 64:67] = torch.tensor([15.0, 1.4, 7.6])
    values, scales = quantize_activation(x, IntegerRange.SIGNED)
    assert values[0, :5].tolist() == [7, -7, 2, -3, 0]
    torch.testing.assert_close(scales, torch.tensor([[1.0, 0.0], [0.0, 15 / 7]]))
    values, scales = quantize_activation(x, IntegerRange.UNSIGNED)
    assert values[1, 64:68].tolist() == [15, 1, 8, 0]
    assert values[0, 1] == 0  # a negative value cannot be represented
    torch.testing.assert_close(scales[1], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("shape", [(96, 64), (640, 576)])
def test_base_branch_is_the_best_of_its_rank(shape):
    left, right = torch.linalg.qr(randn(*shape)).Q, torch.linalg.qr(randn(*shape[::-1])).Q
    size = min(shape)
    spectrum = 0.97 ** torch.arange(size)
    weight = left[:, :size] * spectrum @ right[:, :size].T
    down, up = low_rank_factors(weight, 32)
    best = spectrum[32:].norm()
    assert best * 0.999 < (weight - up @ down).norm() < best * 1.01


def test_base_rank_beyond_the_weights_is_zero():
    weight, _ = dense_layer(16, 64)
    down, up = low_rank_factors(weight, 32)
    torch.testing.assert_close(up @ down, weight, rtol=1e-4, atol=1e-6)
    assert not down[16:].any()
    assert not up[:, 16:].any()


# ---- an appended LoRA ----


def append(layer, down, up):
    for name, logical, side in (
        ("proj_down", down, LowRankSide.DOWN),
        ("proj_up", up, LowRankSide.UP),
    ):
        parameter = getattr(layer, name)
        channels, rank = parameter.shape
        parts = [parameter.data, pack.pack_lowrank(logical, side)]
        fragments = torch.cat([part.view(channels // 16, -1, 256) for part in parts], dim=1)
        parameter.data = fragments.reshape(channels, -1)
    assert layer.proj_down.shape[1] > rank


@pytest.mark.parametrize("precision", list(Precision))
def test_an_appended_lora_sees_the_raw_activation(precision):
    weight, bias = dense_layer(128, 128)
    layer = SVDQW4A4Linear.from_dense(
        weight,
        bias,
        rank=16,
        precision=precision,
        dtype=torch.float32,
        smooth=smooth_factors(128),
    )
    x, down, up = randn(6, 128), randn(20, 128, seed=5), randn(128, 20, seed=6)
    before = layer(x)
    append(layer, down, up)
    assert relative_error(layer(x) - before, x @ down.T @ up.T) < 1e-5


# ---- channel scales ----


def test_channel_scales_apply_before_bias_and_low_rank_branch():
    weight, bias = dense_layer(128, 128)
    options = {"rank": 16, "precision": Precision.W4A4, "dtype": torch.float32}
    layer = SVDQW4A4Linear.from_dense(weight, bias, smooth=smooth_factors(128), **options)
    x, factors = randn(6, 128), 1 + randn(128, seed=9) / 8
    assert layer.wcscales is None
    before = layer(x)
    down = pack.unpack_lowrank(layer.proj_down, LowRankSide.DOWN)
    up = pack.unpack_lowrank(layer.proj_up, LowRankSide.UP)
    others = x @ down.T @ up.T + pack.unpack_vector(layer.bias)
    layer.wcscales = frozen(pack.pack_vector(factors))
    expected = (before - others) * factors + others
    assert relative_error(layer(x), expected) < 1e-6


# ---- nvfp4 ----

E2M1_MIDDLES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


def test_nvfp4_rounds_to_nearest_and_of_two_to_the_even_one():
    x = torch.zeros(1, 16)
    x[0, :7] = torch.tensor(list(E2M1_MIDDLES))
    x[0, 7:14] = -x[0, :7]
    # The group's scale is 1.
    x[0, 14], x[0, 15] = 6.0, 2.4
    rounded = nvfp4.rounded_activation(x)[0].tolist()
    values = list(E2M1_MIDDLES.values())
    assert rounded == [*values, *(-value for value in values), 6.0, 2.0]


def test_nvfp4_weight_is_near_the_dense_one():
    weight, _ = dense_layer(256, 192)
    packed = nvfp4.packed_weight(weight, torch.bfloat16)
    assert packed.wscales.dtype == torch.float8_e4m3fn
    assert packed.wscales.shape == (12, 256)
    values = nvfp4.unpacked_weight(packed.qweight, packed.wscales, packed.wtscale)
    values *= pack.unpack_vector(packed.wcscales).float()[:, None]
    # Half a step of e2m1 is an eighth of a value at most, of the largest ones a sixth.
    assert 0.05 < relative_error(values, weight) < 0.11
    peaks = weight.view(256, 12, 16).abs().amax(dim=-1, keepdim=True)
    assert ((values - weight).view(256, 12, 16).abs() <= 0.2 * peaks).all()


def test_nvfp4_takes_no_unsigned_activations():
    with pytest.raises(ValueError, match="nvfp4 has no activations without a sign"):
        SVDQW4A4Linear(128, 128, 16, precision=Precision.NVFP4, act_unsigned=True)


# ---- fused MLP ----


def mlp(precision, dtype=torch.float32):
    options = {"rank": 16, "precision": precision, "dtype": dtype}
    dense = [*dense_layer(256, 128), *dense_layer(128, 256, seed=60)]
    fc1 = SVDQW4A4Linear.from_dense(*dense[:2], smooth=smooth_factors(128), **options)
    unsigned = precision is not Precision.NVFP4
    fc2 = SVDQW4A4Linear.from_dense(
        *dense[2:], smooth=smooth_factors(256), act_unsigned=unsigned, **options
    )
    return dense, fc1, fc2


def dense_mlp(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


@pytest.mark.parametrize(
    ("precision", "least", "greatest"),
    [
        (Precision.EXACT, 0.0, 2e-6),
        (Precision.W4A4, 0.02, 0.3),
        (Precision.NVFP4, 0.02, 0.2),
    ],
)
def test_fused_mlp_is_the_dense_mlp(precision, least, greatest):
    dense, fc1, fc2 = mlp(precision)
    x = 2 * randn(2, 9, 128)
    output = fused_gelu_mlp(x, fc1, fc2)
    assert output.shape == (2, 9, 128)
    assert least <= relative_error(output, dense_mlp(x, *dense)) < greatest


def test_w4a4_mlp_quantizes_the_shifted_gelu_output():
    _, fc1, fc2 = mlp(Precision.W4A4, torch.bfloat16)
    x = randn(5, 128, dtype=torch.bfloat16)
    gelu = F.gelu(fc1(x), approximate="tanh")
    shifted = (gelu + 0.171875) / pack.unpack_vector(fc2.smooth_factor)
    assert shifted.min() > 0
    groups = shifted.float().view(5, 4, 64)
    scales = groups.amax(dim=-1, keepdim=True) * (1 / 15)
    activation = (groups * (1 / scales)).round() * scales.bfloat16().float()
    low_rank = gelu.float() @ pack.unpack_lowrank(fc2.proj_down, LowRankSide.DOWN).float().T
    expected = fc2.product(activation.view(5, 256), low_rank).bfloat16()
    assert torch.equal(fused_gelu_mlp(x, fc1, fc2), expected)


def test_a_lora_on_the_second_linear_sees_the_plain_gelu_output():
    dense, fc1, fc2 = mlp(Precision.EXACT)
    x, down, up = randn(6, 128), randn(4, 256, seed=5), randn(128, 4, seed=6)
    before = fused_gelu_mlp(x, fc1, fc2)
    append(fc2, down, up)
    gelu = F.gelu(F.linear(x, *dense[:2]), approximate="tanh")
    assert relative_error(fused_gelu_mlp(x, fc1, fc2) - before, gelu @ down.T @ up.T) < 1e-5


def test_ranks_of_the_two_linears_may_differ():
    dense, fc1, fc2 = mlp(Precision.EXACT)
    x = randn(6, 128)
    append(fc1, torch.zeros(32, 128), torch.zeros(256, 32))
    assert relative_error(fused_gelu_mlp(x, fc1, fc2), dense_mlp(x, *dense)) < 2e-6


# ---- AWQ layer ----


@pytest.mark.parametrize(
    ("precision", "least", "greatest"), [(Precision.EXACT, 0.0, 1e-6), (Precision.W4A4, 0.01, 0.2)]
)
def test_modulation_rows_are_interleaved_and_scales_hold_their_one(precision, least, greatest):
    weight, bias = dense_layer(6 * 32, 128)
    layer = AWQW4A16Linear.from_dense(weight, bias, precision=precision, dtype=torch.float32)
    x = randn(2, 128)
    planes = F.linear(x, weight, bias).view(2, 6, 32)
    planes[:, [1, 4]] += 1
    output = layer(x)
    assert output.shape == (2, 192)
    restored = output.view(2, 32, 6).transpose(1, 2)
    assert least <= relative_error(restored, planes) < greatest


@pytest.mark.parametrize("dtype", DTYPES)
def test_awq_layer_is_the_formula_on_unpacked_integers(dtype):
    weight, bias = dense_layer(12, 128)
    layer = AWQW4A16Linear.from_dense(
        weight, bias, precision=Precision.W4A4, dtype=dtype, row_order=RowOrder.PLANAR
    )
    integers = _reference.unpack_awq_qweight(layer.qweight)
    dequantized = torch.empty(12, 128)
    for n in range(12):
        for k in range(128):
            scale, zero = layer.wscales[k // 64, n].float(), layer.wzeros[k // 64, n].float()
            dequantized[n, k] = integers[n, k].float() * scale + zero
    # 15 steps between a group's least and greatest weight, so half a step at most
    assert (dequantized - weight).abs().max() < 0.6 * layer.wscales.float().max()
    x = randn(8, 128, dtype=dtype)
    assert torch.equal(layer(x), (x.float() @ dequantized.T).to(dtype) + bias.to(dtype))


# ---- the kernels' contract ----


def svdq(precision=Precision.W4A4, **options):
    return SVDQW4A4Linear(64, 128, 32, precision=precision, torch_dtype=torch.bfloat16, **options)


def swapped(**tensors):
    layer = svdq()
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer


def half(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (swapped(proj_down=half(64, 24), proj_up=half(128, 24)), "multiple of 16 .* got: 24"),
        (swapped(proj_down=half(64, 0), proj_up=half(128, 0)), "between 16 and 1024, got: 0"),
        (
            swapped(proj_down=half(64, 1040), proj_up=half(128, 1040)),
            "between 16 and 1024, got: 1040",
        ),
        (swapped(proj_down=half(64, 48)), "must have one rank, got: 48 and 32"),
        (swapped(proj_up=half(64, 32)), r"`proj_up` must have shape \(128, 32\)"),
        (swapped(proj_down=half(4, 2, 256)), "`proj_down` must have 2 axes"),
        (swapped(proj_down=half(64, 32).float()), r"`proj_down` must be torch\.bfloat16"),
        (swapped(proj_up=half(128, 32).half()), r"`proj_up` must be torch\.bfloat16"),
        (swapped(proj_up=half(32, 128).T), "`proj_up` must be contiguous"),
        (swapped(proj_down=half(64, 64)[:, :32]), "`proj_down` must be contiguous"),
        (swapped(proj_up=half(128, 32).to("meta")), "`proj_up` must be on cpu, got: meta"),
        (swapped(bias=half(64)), r"`bias` must have shape \(128,\)"),
        (swapped(smooth_factor=half(64).float()), "`smooth_factor` must be"),
        (swapped(wscales=half(128, 1)), "`wscales` must have shape"),
        (swapped(qweight=torch.zeros(128, 64, dtype=torch.int8)), "`qweight` must have shape"),
    ],
)
def test_what_the_kernels_assume_is_enforced(layer, message):
    fc2 = SVDQW4A4Linear(128, 128, 16, precision=Precision.W4A4)
    for run in (layer, lambda x: fused_gelu_mlp(x, layer, fc2)):
        with pytest.raises(KernelContractError, match=message):
            run(half(3, 64))


def test_rank_1024_is_the_last_that_runs():
    layer = swapped(proj_down=half(64, 1024), proj_up=half(128, 1024))
    assert layer(half(3, 64)).shape == (3, 128)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (half(3, 128), "must have 64 channels"),
        (half(3, 64).float(), r"`bias` must be torch\.float32"),
        (half(3, 64).double(), "16- or 32-bit float"),
    ],
)
def test_activations_must_fit_the_layer(x, message):
    with pytest.raises(KernelContractError, match=message):
        svdq()(x)


def test_a_shifted_layer_runs_only_in_the_fused_mlp():
    layer = svdq(act_unsigned=True)
    with pytest.raises(KernelContractError, match="runs only in `fused_gelu_mlp`"):
        layer(half(3, 64))
    with pytest.raises(KernelContractError, match="do not fit together"):
        fused_gelu_mlp(half(3, 64), svdq(), layer)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (half(0, 64), "between 1 and 8 rows"),
        (half(9, 64), "between 1 and 8 rows"),
        (half(1, 2, 64), "between 1 and 8 rows"),
        (half(2, 64).half(), r"`bias` must be torch\.float16"),
    ],
)
def test_awq_layers_take_few_rows_of_their_dtype(x, message):
    layer = AWQW4A16Linear(64, 24, precision=Precision.W4A4)
    assert layer(half(8, 64)).shape == (8, 24)
    with pytest.raises(KernelContractError, match=message):
        layer(x)


def test_layers_without_a_packed_layout_cannot_be_built():
    with pytest.raises(ValueError, match="`out_features` of 128, got: 64 and 192"):
        SVDQW4A4Linear(64, 192, 32, precision=Precision.W4A4)
    with pytest.raises(KernelContractError, match="got: 1040"):
        SVDQW4A4Linear(64, 128, 1040, precision=Precision.W4A4)
    with pytest.raises(ValueError, match="`in_features` must be a multiple of 64"):
        AWQW4A16Linear(96, 24, precision=Precision.W4A4)


# ---- life as a module ----


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(Precision))
def test_deep_copy_and_state_dict_keep_the_output(dense_model, inputs, precision):
    options = {**EXACT_FLOAT32, "precision": precision}
    model = EmulatedQwenImageTransformer.from_diffusers(dense_model, **options)
    expected = model(**inputs).sample
    twin = copy.deepcopy(model)
    restored = EmulatedQwenImageTransformer(model.config)
    restored.load_state_dict(model.state_dict())
    for own, other in zip(restored.modules(), model.modules(), strict=True):
        if isinstance(own, SVDQW4A4Linear):
            # As in Nunchaku, no parameter.
            own.wtscale = other.wtscale
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(**inputs).sample, expected)
    assert torch.equal(restored(**inputs).sample, expected)
    assert not torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("precision", list(Precision))
def test_a_cast_leaves_the_quantized_weight_alone(precision):
    config = EmulatedConfig(**TINY, rank=16, precision=precision, dtype=torch.float32)
    model = random_transformer(config)
    layer = model.transformer_blocks[0].attn.to_qkv
    modulation = model.transformer_blocks[0].img_mod[1]
    before = [layer.qweight.clone(), modulation.qweight.clone()]
    names = [name for name, _ in layer.named_parameters()]
    model.to(torch.bfloat16)
    assert layer.proj_down.dtype == model.dtype == torch.bfloat16
    assert [name for name, _ in layer.named_parameters()] == names
    assert torch.equal(layer.qweight, before[0])
    assert torch.equal(modulation.qweight, before[1])
    assert layer(half(2, 3, 128)).dtype == torch.bfloat16


def test_public_names_live_where_they_say():
    assert emulation.__all__ == sorted(emulation.__all__)
    assert issubclass(KernelContractError, ValueError)
    assert KernelContractError.__module__ == "qwenlora.emulation.contract"


ACTIVATION_ROWS, ACTIVATION_COLUMNS, ACTIVATION_RANK = 512, 256, 32


def lane_of(row, column):
    """The place of a packed activation's nibble: block, group, warp, tile, lane, register, nibble.

    A lane of mma.m16n8k64 holds rows r and r + 8, and of each 8 neighbours in either half of the
    group: 4 registers of 8 values.
    """
    block, warp, tile = row // 256, row % 256 // 32, row % 32 // 16
    half, r = row % 16 // 8, row % 8
    group, of_group, i, value = column // 64, column % 64 // 32, column % 32 // 8, column % 8
    lane, register = 4 * r + i, 2 * of_group + half
    groups = ACTIVATION_COLUMNS // 64
    word = ((((block * groups + group) * 8 + warp) * 2 + tile) * 32 + lane) * 4 + register
    return 8 * word + value


def test_packed_activations_lie_lane_by_lane():
    generator = torch.Generator().manual_seed(0)
    shape = (ACTIVATION_ROWS, ACTIVATION_COLUMNS)
    values = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    flat = activation.pack_activation(values).flatten()
    nibbles = torch.stack([flat & 15, flat >> 4], dim=-1).flatten()
    for row in range(0, ACTIVATION_ROWS, 7):
        for column in range(0, ACTIVATION_COLUMNS, 5):
            assert nibbles[lane_of(row, column)] == values[row, column]


@pytest.mark.parametrize(
    ("pack", "unpack", "columns"),
    [
        (activation.pack_activation, activation.unpack_activation, ACTIVATION_COLUMNS),
        (activation.pack_scales, activation.unpack_scales, ACTIVATION_COLUMNS // 64),
        (
            activation.pack_low_rank_activation,
            activation.unpack_low_rank_activation,
            ACTIVATION_RANK,
        ),
    ],
    ids=["values", "scales", "low rank"],
)
def test_what_the_kernels_hand_on_is_packed_by_blocks(pack, unpack, columns):
    """Packing loses nothing, and blocks of rows are packed apart from each other."""
    generator = torch.Generator().manual_seed(1)
    shape = (ACTIVATION_ROWS, columns)
    values = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    packed = pack(values)
    assert torch.equal(unpack(packed), values)
    blocks = [pack(own).flatten() for own in values.split(activation.ROWS)]
    assert torch.equal(torch.cat(blocks), packed.flatten())


@pytest.mark.parametrize("precision", list(Precision), ids=lambda own: own.value)
@pytest.mark.parametrize("rows", [1, 256, 300])
def test_the_layers_two_kernels_are_its_forward(rows, precision):
    """`quantize` and `forward_quant` with Nunchaku's signatures, rows padded to whole blocks."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(128, 256, generator=generator)
    dtype = torch.float32 if precision is Precision.EXACT else torch.bfloat16
    layer = SVDQW4A4Linear.from_dense(
        weight, weight[:, 0], rank=16, precision=precision, dtype=dtype
    )
    x = torch.randn(rows, 256, generator=generator).to(dtype)
    quantized, scales, low_rank = layer.quantize(x)
    padded = -(-rows // 256) * 256
    columns, kept = (128, torch.uint8) if precision is Precision.W4A4 else (256, torch.float32)
    assert (quantized.shape, quantized.dtype) == ((padded, columns), kept)
    assert (low_rank.shape, low_rank.dtype) == ((padded, 16), torch.float32)
    assert len(scales.flatten()) == 4 * padded
    given = torch.empty(rows, 128, dtype=dtype)
    found = layer.forward_quant(quantized, scales, low_rank, given)
    assert found is given
    # Sums of another number of rows are rounded in another order.
    expected = layer(x)
    assert (found - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()
    assert torch.equal(layer.forward_quant(quantized, scales, low_rank)[:rows], found)


@pytest.mark.parametrize("wrong", ["rows", "values", "scales", "low rank"])
def test_what_the_second_kernel_cannot_take(wrong):
    layer = SVDQW4A4Linear(256, 128, 16, precision=Precision.W4A4)
    quantized, scales, low_rank = layer.quantize(torch.randn(256, 256).bfloat16())
    broken = {
        "rows": (quantized[:255], scales, low_rank),
        "values": (quantized.float(), scales, low_rank),
        "scales": (quantized, scales.float(), low_rank),
        "low rank": (quantized, scales, low_rank[:, :8]),
    }
    with pytest.raises(KernelContractError):
        layer.forward_quant(*broken[wrong])


def test_rows_are_padded_as_the_kernels_take_them():
    layer = SVDQW4A4Linear(256, 128, 16, precision=Precision.W4A4)
    with pytest.raises(KernelContractError, match="`pad_size` must be 256"):
        layer.quantize(torch.randn(256, 256).bfloat16(), pad_size=128)
