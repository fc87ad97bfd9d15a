"""Views of a quantized layer's rows: what they compute is what the whole layer computes there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qwenlora
from qwenlora import emulation
from qwenlora.emulation import Precision
from qwenlora.slots import beside
from qwenlora.slots.row_view import row_view

ROWS, COLUMNS = 384, 128
QKV = "transformer_blocks.0.attn.to_qkv"


def layer(precision: str) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) / 8
    bias = torch.randn(ROWS, generator=generator)
    return emulation.SVDQW4A4Linear.from_dense(
        weight, bias, rank=32, precision=Precision(precision), dtype=torch.bfloat16
    )


PACKED = [own.value for own in Precision if own is not Precision.EXACT]


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("rows", [(0, 128), (128, 384), (256, 384)])
def test_rows_are_those_of_the_whole_bit_for_bit(precision: str, rows: tuple[int, int]) -> None:
    own = layer(precision)
    view = row_view(own, *rows)
    assert view is not None
    x = torch.randn(1, 20, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        assert torch.equal(view(x), own(x)[..., slice(*rows)])
    for name, parameter in view._parameters.items():
        whole = own._parameters[name]
        if parameter is not None and whole is not None:
            same = parameter.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert same, name


@pytest.mark.parametrize("rows", [(0, 64), (64, 192), (0, 130)])
def test_rows_that_cut_a_tile_have_no_view(rows: tuple[int, int]) -> None:
    assert row_view(layer(PACKED[0]), *rows) is None


def test_a_layer_with_another_tensor_has_no_view() -> None:
    own = layer(PACKED[0])
    own.register_parameter("row_table", nn.Parameter(torch.zeros(ROWS)))
    assert row_view(own, 0, 128) is None


def test_a_layer_that_is_not_packed_has_no_view() -> None:
    assert row_view(layer(Precision.EXACT.value), 0, 128) is None


def test_projections_with_inputs_of_their_own_run_in_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = emulation.EmulatedConfig(
        num_layers=1,
        heads=2,
        head_dim=64,
        axes_dims_rope=(16, 24, 24),
        joint_attention_dim=96,
        precision=Precision.W4A4,
        dtype=torch.bfloat16,
    )
    model = emulation.random_transformer(config, seed=0)
    stretched = {
        f"lycoris_transformer_blocks_0_attn_to_{name}": 0.1 * (index + 1) * torch.randn(COLUMNS)
        for index, name in enumerate("qv")
    }
    file = {f"{name}.weight": values for name, values in stretched.items()}
    file |= {f"{name}.on_input": torch.tensor(True) for name in stretched}
    qwenlora.compose_loras(model, file)
    x = torch.randn(1, 9, COLUMNS).bfloat16()
    taken = []

    def counted(own: nn.Module, begin: int, end: int) -> nn.Module | None:
        taken.append((begin, end))
        return row_view(own, begin, end)

    monkeypatch.setattr(beside, "row_view", counted)
    with torch.no_grad():
        found = model.get_submodule(QKV)(x)
        assert sorted(taken) == [(0, 128), (128, 256), (256, 384)]
        monkeypatch.setattr(beside, "row_view", lambda *_: None)
        assert torch.equal(found, model.get_submodule(QKV)(x))
