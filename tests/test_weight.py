"""The weight that a slot's layer computes with: values, products, norms, bias, and what is kept."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import qwenlora
from qwenlora import _core, emulation
from qwenlora.emulation import AWQW4A16Linear, Precision, SVDQW4A4Linear, fused_gelu_mlp
from qwenlora.emulation.leaf import frozen
from qwenlora.errors import UnknownWeightError
from qwenlora.model.state import read_state
from qwenlora.packing import pack
from qwenlora.packing.host_bytes import host_bytes
from qwenlora.packing.layout import LowRankSide, RowOrder
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.find import find_targets
from qwenlora.weight.awq import AwqWeight
from qwenlora.weight.base_weight import BaseWeight
from qwenlora.weight.kept import shelf
from qwenlora.weight.svdq import SvdqWeight

from .conftest import make_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from qwenlora.model.target import Target

F64 = torch.float64
ROUNDED = {Precision.EXACT: torch.float32, Precision.W4A4: torch.bfloat16}
PRECISIONS = (*ROUNDED, Precision.NVFP4)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.to(F64) - wanted.to(F64)).norm() / wanted.to(F64).norm())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(layer: nn.Module) -> Tensor:
    """What a layer computes with, (N, K) float64, rows as in files: by its own definition."""
    if isinstance(layer, SVDQW4A4Linear):
        smooth = pack.unpack_vector(layer.smooth_factor).to(F64)
        down = pack.unpack_lowrank(layer.proj_down, LowRankSide.DOWN).to(F64)
        up = pack.unpack_lowrank(layer.proj_up, LowRankSide.UP).to(F64)
        residual = layer.residual().to(F64) / smooth
        if layer.wcscales is not None:
            residual *= pack.unpack_vector(layer.wcscales).to(F64)[:, None]
        return residual + up @ down
    if isinstance(layer, AWQW4A16Linear):
        return pack.deinterleave_modulation(layer.weight()).to(F64)
    return layer.weight.to(F64)


def with_matrix(model: nn.Module) -> list[Target]:
    return [target for target in find_targets(model, {}).values() if not target.only_values]


def small(precision: Precision, **options: object) -> nn.Module:
    dtype = ROUNDED.get(precision, torch.bfloat16)
    return make_model(precision=precision, dtype=dtype, num_layers=1, **options)


# ---- values and products ----


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_and_products_are_those_of_the_layer(precision):
    targets = with_matrix(small(precision))
    assert {target.kind for target in targets} == {SlotKind.SVDQ, SlotKind.AWQ, SlotKind.LINEAR}
    for target in targets:
        weight = BaseWeight.of(target)
        wanted = weight_of(target.module)
        rows, columns = wanted.shape
        assert (weight.rows_total, weight.columns) == (rows, columns)
        # A range that begins and ends within tiles.
        begin, count = rows // 3, rows // 2 + 1
        own = wanted[begin : begin + count]
        assert error(weight.rows(0, rows), wanted) < 1e-7
        assert error(weight.rows(begin, count), own) < 1e-7
        x, b = randn(columns, 5), randn(count, 3)
        assert error(weight.times(x, begin, count), own @ x.to(F64)) < 2e-6
        assert error(weight.times_left(b, begin, count), b.T.to(F64) @ own) < 2e-6


@pytest.mark.parametrize("precision", PRECISIONS)
def test_panels_are_the_rows_in_order(precision, monkeypatch):
    monkeypatch.setattr("qwenlora.weight.base_weight._PANEL_BYTES", {"cpu": 1 << 16})
    for target in with_matrix(small(precision)):
        weight = BaseWeight.of(target)
        begin, count = 3, weight.rows_total - 10
        panels = list(weight.panels(begin, count))
        firsts = [first for first, _ in panels]
        assert firsts == sorted(firsts)
        assert firsts[0] == begin
        together = torch.cat([rows for _, rows in panels])
        assert error(together, weight.rows(begin, count)) < 1e-7
        wanted = weight_of(target.module)[begin : begin + count]
        x = randn(weight.columns, 2)
        assert error(weight.times(x, begin, count), wanted @ x.to(F64)) < 2e-6


def test_channel_scales_of_an_int4_layer_are_in_it():
    model = small(Precision.W4A4)
    layer = model.transformer_blocks[0].attn.to_out[0]
    factors = 1 + randn(layer.out_features) / 8
    layer.wcscales = frozen(pack.pack_vector(factors.to(torch.bfloat16)))
    (target,) = (own for own in with_matrix(model) if own.module is layer)
    weight = BaseWeight.of(target)
    assert error(weight.rows(0, weight.rows_total), weight_of(layer)) < 1e-7


@pytest.mark.usefixtures("diffusers")
@pytest.mark.parametrize(
    ("precision", "least", "greatest"),
    [(Precision.EXACT, 0.0, 1e-6), (Precision.NVFP4, 0.01, 0.12)],
)
def test_a_fused_module_has_the_weight_that_it_was_made_of(precision, least, greatest):
    dense = emulation.tiny_z_image(layers=1)
    model = emulation.z_image_transformer(
        dense,
        form=emulation.ZImageForm.FUSED,
        rank=32,
        precision=precision,
        dtype=ROUNDED.get(precision, torch.bfloat16),
        quantized_refiners=False,
    )
    attention = dense.layers[0].attention
    wanted = torch.cat([own.weight for own in (attention.to_q, attention.to_k, attention.to_v)])
    (fused,) = (own for own in with_matrix(model) if own.prefix == "qkv_")
    weight = BaseWeight.of(fused)
    assert least <= error(weight.rows(0, weight.rows_total), wanted) < greatest
    assert weight.true_bias() is None


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn]
)
def test_a_plain_linear_of_any_float(dtype):
    model = small(Precision.EXACT)
    values = (randn(*model.proj_out.weight.shape) / 8).to(dtype)
    model.proj_out.weight = nn.Parameter(values, requires_grad=False)
    (target,) = (own for own in with_matrix(model) if own.path == "proj_out")
    assert torch.equal(BaseWeight.of(target).rows(0, len(values)), values.float())
    if dtype.itemsize == 1:
        model.proj_out.scale_weight = torch.tensor(2.5)
        assert torch.equal(BaseWeight.of(target).rows(0, len(values)), values.float() * 2.5)


def test_loras_are_not_in_it(tmp_path):
    model = small(Precision.W4A4)
    path = "transformer_blocks.0.attn.to_out.0"
    state = {
        f"{path}.lora_A.weight": randn(4, 128),
        f"{path}.lora_B.weight": randn(128, 4),
        f"{path}.diff_b": randn(128),
        "proj_out.diff": randn(*model.proj_out.weight.shape) / 8,
        "proj_out.diff_b": randn(*model.proj_out.bias.shape),
    }

    def found():
        targets = find_targets(model, read_state(model).base_ranks)
        weights = [BaseWeight.of(targets[own]) for own in (path, "proj_out")]
        return [
            (own.rows(0, own.rows_total), own.row_norms(0, own.rows_total), own.true_bias())
            for own in weights
        ]

    before = found()
    report = qwenlora.compose_loras(model, [(state, 0.7)])
    assert report.complete
    for own, other in zip(before, found(), strict=True):
        assert all(map(torch.equal, own, other))


# ---- what is not understood ----


def _words(layer):
    layer.qweight = frozen(layer.qweight.view(torch.int32))


def _unscaled(layer):
    layer.wscales = frozen(layer.wscales.to(torch.float8_e5m2))


def _longer(layer):
    layer.wscales = frozen(torch.cat([layer.wscales, layer.wscales]))


def _nothing(layer):
    del layer.wscales


def _short_smooth(layer):
    layer.smooth_factor = frozen(layer.smooth_factor[:64].clone())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_words, r"qweight is \(128, 16\) torch.int32"),
        (_unscaled, r"wscales is \(2, 128\) torch.float8_e5m2"),
        (_longer, r"wscales is \(4, 128\)"),
        (_nothing, "has no tensor `wscales`"),
        (_short_smooth, r"smooth_factor is \(64,\)"),
    ],
)
def test_another_form_of_a_quantized_weight_is_refused_by_name(change, words):
    model = small(Precision.W4A4)
    layer = model.transformer_blocks[0].attn.to_out[0]
    change(layer)
    (target,) = (own for own in with_matrix(model) if own.module is layer)
    with pytest.raises(UnknownWeightError, match=words) as refused:
        BaseWeight.of(target)
    assert "transformer_blocks.0.attn.to_out.0" in str(refused.value)


def test_a_weight_of_a_class_of_its_own_is_refused_by_name():
    class Stored(nn.Parameter):
        pass

    model = small(Precision.EXACT)
    model.proj_out.weight = Stored(model.proj_out.weight.data)
    (target,) = (own for own in with_matrix(model) if own.path == "proj_out")
    with pytest.raises(UnknownWeightError, match="`proj_out` is a Stored"):
        BaseWeight.of(target)


def test_a_norm_has_no_matrix():
    targets = find_targets(small(Precision.EXACT), {}).values()
    (norm, *_) = (own for own in targets if own.only_values)
    with pytest.raises(UnknownWeightError, match="multiplies its input with no matrix"):
        BaseWeight.of(norm)


# ---- the bias ----


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_true_bias_is_what_the_layer_gives_for_zeros(precision):
    for target in with_matrix(small(precision)):
        layer, bias = target.module, BaseWeight.of(target).true_bias()
        if getattr(layer, "act_unsigned", False):
            continue
        x = torch.zeros(1, target.row.in_features, dtype=layer.bias.dtype)
        output = layer(x)[0].float()
        if target.row_order is RowOrder.INTERLEAVED:
            output = pack.deinterleave_modulation(output)
        assert torch.equal(bias, output)


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_true_bias_behind_gelu_is_what_the_fused_mlp_gives(precision):
    """GELU of 0 is 0: with a first layer that gives 0, the MLP gives the second's bias."""
    model = small(precision)
    mlp = model.transformer_blocks[0].img_mlp
    first, second = mlp.net[0].proj, mlp.net[2]
    assert second.act_unsigned
    (target,) = (own for own in with_matrix(model) if own.module is second)
    bias = BaseWeight.of(target).true_bias()
    for parameter in (first.qweight, first.bias, first.proj_up):
        parameter.zero_()
    x = torch.zeros(1, first.in_features, dtype=first.bias.dtype)
    given = fused_gelu_mlp(x, first, second)[0]
    # In 4 bits the shift itself is rounded: powers of two as smooth factors leave little of it.
    assert error(given, bias) < {Precision.EXACT: 1e-6, Precision.W4A4: 0.05}[precision]
    stored = pack.unpack_vector(second.bias)
    assert error(stored, bias) > 0.05


# ---- norms ----


def synthetic(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian rows of differing size, some large input channels, a decaying low-rank part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(rows, columns) * (0.15 * normal(rows, 1)).exp() * (0.25 * normal(columns)).exp()
    weight += 0.35 * (normal(rows, 24) * torch.linspace(1.0, 0.2, 24)) @ normal(24, columns)
    return weight / columns**0.5


def quantized(kind: SlotKind, precision: Precision, dense: Tensor) -> BaseWeight:
    """The weight of a layer that is put into a model in place of one of its own."""
    model = small(Precision.W4A4)
    block = model.transformer_blocks[0]
    generator = torch.Generator().manual_seed(7)
    if kind is SlotKind.AWQ:
        layer: nn.Module = AWQW4A16Linear.from_dense(
            dense, torch.zeros(len(dense)), precision=precision, dtype=torch.bfloat16
        )
        block.img_mod[1] = layer
    else:
        smooth = (dense.abs().amax(dim=0) ** -0.5).clamp(0.1, 10)
        layer = SVDQW4A4Linear.from_dense(
            dense,
            None,
            rank=32,
            precision=precision,
            dtype=torch.bfloat16,
            smooth=smooth / smooth.mean(),
            generator=generator,
        )
        block.attn.to_out[0] = layer
    (target,) = (own for own in with_matrix(model) if own.module is layer)
    return BaseWeight.of(target)


@pytest.mark.parametrize(
    ("kind", "precision", "raw_bias", "left"),
    [
        # Of squared norms, on average. Measured: 0.6 %, of which 0.03 % are left.
        (SlotKind.SVDQ, Precision.W4A4, 4e-3, 5e-4),
        # Measured: 0.98 % and 0.11 %. The ends of a group's range are no whole steps, and what lies
        # in them was rounded outwards.
        (SlotKind.AWQ, Precision.W4A4, 8e-3, 1.5e-3),
        # Measured: 0.02 %. The noise of floats is none on average.
        (SlotKind.SVDQ, Precision.NVFP4, None, 5e-4),
    ],
)
def test_norms_are_those_of_the_weight_before_it_was_rounded(kind, precision, raw_bias, left):
    """Rounding adds its energy to every norm; what is known of it is taken off again."""
    dense = synthetic(384, 3072, seed=3)
    weight = quantized(kind, precision, dense)
    for axis, norms in ((1, weight.row_norms(0, 384)), (0, weight.column_norms(0, 384))):
        wanted = dense.to(F64).square().sum(dim=axis)
        raw = weight.rows(0, 384).to(F64).square().sum(dim=axis)
        assert abs(float(norms.sum() / wanted.sum()) - 1) < left
        assert abs(float((norms / wanted - 1).mean())) < left
        if raw_bias is not None:
            assert float((raw / wanted - 1).mean()) > raw_bias
        if axis == 1:
            # Of the norms, not squared.
            assert float((norms.sqrt() / wanted.sqrt() - 1).std()) < 3e-3


def test_norms_of_rows_that_were_not_rounded_are_exact():
    for target in with_matrix(small(Precision.EXACT)):
        weight, wanted = BaseWeight.of(target), weight_of(target.module)
        begin, count = 5, weight.rows_total - 9
        own = wanted[begin : begin + count].square()
        assert error(weight.row_norms(begin, count), own.sum(dim=1)) < 1e-7
        assert error(weight.column_norms(begin, count), own.sum(dim=0)) < 1e-7


def test_a_row_that_is_mostly_noise_keeps_its_norm():
    dense = synthetic(128, 128, seed=0)
    weight = quantized(SlotKind.SVDQ, Precision.W4A4, dense)
    layer = weight._target.module
    layer.qweight.zero_()
    layer.proj_up.zero_()
    values = torch.zeros(128, 128, dtype=torch.int8)
    values[:, 0] = 1
    layer.qweight.copy_(pack.pack_svdq_qweight(values))
    weight = BaseWeight.of(weight._target)
    raw = weight.rows(0, 128).to(F64).square().sum(dim=1)
    assert (weight.row_norms(0, 128) > 0).all()
    assert error(weight.row_norms(0, 128), raw) < 1e-6


# ---- what is kept ----


def first_svdq(model: nn.Module) -> Target:
    return next(own for own in with_matrix(model) if own.kind is SlotKind.SVDQ)


def counted(weight: BaseWeight, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Reads of rows from here on."""
    reads: list[int] = []
    rows: Callable[..., Tensor] = weight._stored.rows

    def read(begin: int, count: int) -> Tensor:
        reads.append(count)
        return rows(begin, count)

    monkeypatch.setattr(weight._stored, "rows", read, raising=False)
    return reads


def test_norms_are_computed_once_while_the_weight_is_the_same(monkeypatch):
    target = first_svdq(small(Precision.W4A4))
    weight = BaseWeight.of(target)
    norms = weight.row_norms(0, 128)
    again = BaseWeight.of(target)
    reads = counted(again, monkeypatch)
    assert torch.equal(again.row_norms(0, 128), norms)
    assert again.identity == weight.identity
    assert not reads
    again.row_norms(0, 64)
    assert reads


def test_a_weight_that_was_written_to_is_another_one():
    target = first_svdq(small(Precision.W4A4))
    weight = BaseWeight.of(target)
    norms = weight.row_norms(0, 128)
    target.module.wscales.mul_(2)
    other = BaseWeight.of(target)
    assert other.identity != weight.identity
    assert error(other.row_norms(0, 128), norms) > 0.1


def test_a_weight_that_moved_is_the_same_and_one_that_was_pointed_elsewhere_is_not():
    target = first_svdq(small(Precision.W4A4))
    before = BaseWeight.of(target).identity
    target.module.qweight.data = target.module.qweight.data.clone()
    assert BaseWeight.of(target).identity == before
    target.module.qweight.data = torch.flip(target.module.qweight.data, (0,)).contiguous()
    assert BaseWeight.of(target).identity != before


def test_a_copy_of_a_model_has_norms_of_its_own():
    model = small(Precision.W4A4)
    twin = copy.deepcopy(model)
    assert BaseWeight.of(first_svdq(model)).identity != BaseWeight.of(first_svdq(twin)).identity


def test_nothing_keeps_a_model_and_clear_cache_drops_norms():
    qwenlora.clear_cache()
    model = small(Precision.W4A4)
    target = first_svdq(model)
    BaseWeight.of(target).row_norms(0, 128)
    assert shelf.nbytes(on_host=True) == 4 * 128
    qwenlora.clear_cache()
    assert shelf.nbytes(on_host=True) == 0
    BaseWeight.of(target).column_norms(0, 128)
    assert shelf.nbytes(on_host=True) == 4 * target.row.in_features
    gone = weakref.ref(target.module)
    del model, target
    gc.collect()
    assert gone() is None
    assert shelf.nbytes(on_host=True) == 0


def test_no_more_is_kept_than_the_limit(monkeypatch):
    qwenlora.clear_cache()
    monkeypatch.setattr("qwenlora.weight.kept._LIMIT_BYTES", 4 * 200)
    target = first_svdq(small(Precision.W4A4))
    weight = BaseWeight.of(target)
    weight.row_norms(0, 128)
    weight.row_norms(0, 100)
    assert shelf.nbytes(on_host=True) == 4 * 128


# ---- two ways to the same values ----


@pytest.mark.parametrize("precision", [Precision.W4A4, Precision.NVFP4])
def test_host_memory_is_read_as_the_layout_is_defined(precision):
    for target in with_matrix(small(precision)):
        weight = BaseWeight.of(target)
        own = weight._stored
        if isinstance(own, SvdqWeight):
            tiles = weight.rows_total // 128
            assert torch.equal(own._by_rust(0, tiles), own._by_torch(0, tiles))
            assert torch.equal(own._by_rust(tiles - 1, tiles), own._by_torch(tiles - 1, tiles))
        elif isinstance(own, AwqWeight):
            count = weight.rows_total - 50
            assert torch.equal(own._by_rust(9, count), own._by_torch(9, count))


def test_norms_do_not_depend_on_the_number_of_threads():
    rows = randn(1000, 72)
    sums = torch.zeros(2, 72, dtype=F64)
    found = []
    for at, threads in enumerate((1, 3)):
        norms = torch.empty(1000, dtype=F64)
        options = {"columns": 72, "threads": threads}
        _core.row_norms(host_bytes(rows), host_bytes(norms), **options)
        _core.column_norms(host_bytes(rows), host_bytes(sums[at]), **options)
        found.append(norms)
    assert torch.equal(*found)
    assert torch.equal(*sums)
    assert error(found[0], rows.to(F64).square().sum(dim=1)) < 1e-7
    assert error(sums[0], rows.to(F64).square().sum(dim=0)) < 1e-7


def bytes_of(*shape: int, dtype: torch.dtype = torch.float32) -> object:
    return host_bytes(torch.zeros(*shape, dtype=dtype))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"values": bytes_of(127 * 32, dtype=torch.uint8)}, "rows must be a multiple of 128"),
        ({"scales": bytes_of(127)}, "wscales has 508 bytes, its shape takes 512"),
        ({"row_factors": bytes_of(64)}, "row factors has 256 bytes"),
        ({"column_factors": bytes_of(63)}, "must be a multiple of"),
        ({"dest": bytes_of(128, 63)}, "the destination has 32256 bytes"),
        ({"form": "int8"}, "a form is `int4` or `fp4`"),
    ],
)
def test_memory_of_another_size_is_refused(changed, words):
    arguments = {
        "form": "int4",
        "values": bytes_of(128, 32, dtype=torch.uint8),
        "scales": bytes_of(1, 128),
        "row_factors": bytes_of(128),
        "column_factors": bytes_of(64),
        "dest": bytes_of(128, 64),
    }
    _core.svdq_rows(**arguments, threads=1)
    with pytest.raises(ValueError, match=words):
        _core.svdq_rows(**{**arguments, **changed}, threads=1)


def test_weights_that_are_written_past_autograd_are_seen():
    """Nothing counts such writes, as nothing counts those to tensors of inference mode."""
    target = first_svdq(make_model())
    before = BaseWeight.of(target)
    norms, identity = before.row_norms(0, 16), before.identity
    stored = target.module.qweight
    stored.data.copy_(stored.data * 2)
    after = BaseWeight.of(target)
    assert after.identity != identity
    assert not torch.allclose(after.row_norms(0, 16), norms)
