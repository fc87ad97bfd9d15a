"""What the kernels do beyond what Nunchaku's classes ask of them, each as figures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layer import DTYPE, Layer, Quantized
from kernels.layouts import (
    join_columns,
    join_scales,
    pack_activation,
    pack_low_rank,
    pack_scales,
    padded,
)
from qwenlora.emulation.quantize import IntegerRange, quantize_activation
from qwenlora.packing import pack
from qwenlora.packing.layout import LowRankSide
from qwenlora.slots.unsigned import quantize_unsigned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kernels.paths import Mlp

Figures = dict[str, Any]


def relative(found: Tensor, expected: Tensor) -> float:
    """Error relative to the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def differing(found: Tensor, expected: Tensor) -> float:
    """Share of the elements that are not the same."""
    return float((found != expected).float().mean())


def measure_facts(mlp: Mlp, x: Tensor) -> Iterator[tuple[str, Figures]]:
    """All of them by name, on (M, C) of any M."""
    facts: dict[str, Callable[[Mlp, Tensor], Figures]] = {
        "layouts of a quantized activation": _layouts,
        "layouts of what the fused kernel hands on": _layouts_between,
        "wcscales of an int4 layer": _column_scales,
        "wcscales of a layer behind GELU": _column_scales_unsigned,
        "wcscales in the fused kernel": _column_scales_fused,
        "out beside qout": _out_beside,
        "slices of rows": _slices,
    }
    for name, fact in facts.items():
        yield name, fact(mlp, x)


def _layouts(mlp: Mlp, x: Tensor) -> Figures:
    layer, whole = mlp.first, padded(x)
    found = mlp.kernels.quantize(x, layer)
    values, scales = quantize_activation(
        whole / pack.unpack_vector(layer.smooth), IntegerRange.SIGNED
    )
    down = pack.unpack_lowrank(layer.down, LowRankSide.DOWN)
    low_rank = whole.double() @ down.double().mT
    return {
        "bytes_differing": differing(found.values, pack_activation(values)),
        "scales_differing": differing(found.scales, pack_scales(scales)),
        "low_rank_error": relative(found.low_rank, pack_low_rank(low_rank)),
        "low_rank_error_in_plain_order": relative(found.low_rank, low_rank),
    }


def _between(mlp: Mlp, x: Tensor, *, hidden: Tensor | None = None, **more: Any) -> Quantized:
    """What the fused kernel hands to the second layer."""
    into = Quantized.empty(len(x), mlp.first.outputs, mlp.second.down.shape[1], x.device)
    quantized = mlp.kernels.quantize(x, mlp.first)
    mlp.kernels.multiply(quantized, mlp.first, out=hidden, following=mlp.second, into=into, **more)
    return into


def _hidden(mlp: Mlp, x: Tensor) -> Tensor:
    return torch.empty(len(x), mlp.first.outputs, dtype=DTYPE, device=x.device)


def _layouts_between(mlp: Mlp, x: Tensor) -> Figures:
    # Rows that are padded hold what zeros give.
    whole = padded(x)
    hidden = _hidden(mlp, whole)
    found = _between(mlp, whole, hidden=hidden)
    values, scales = quantize_unsigned(hidden, pack.unpack_vector(mlp.second.smooth))
    down = pack.unpack_lowrank(mlp.second.down, LowRankSide.DOWN)
    low_rank = hidden.double() @ down.double().mT
    return {
        "bytes_differing": differing(found.values, values),
        "scales_differing": differing(found.scales, scales),
        "low_rank_error": relative(found.low_rank, pack_low_rank(low_rank)),
    }


def _factors(count: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (1 + 0.3 * torch.randn(count, generator=generator)).to(like.device, DTYPE)


def _parts(mlp: Mlp, x: Quantized, layer: Layer, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The product of the residual alone, the low-rank part, and the bias, float64."""
    bare = replace(
        layer, bias=torch.zeros_like(layer.bias), up=torch.zeros_like(layer.up).contiguous()
    )
    product = mlp.kernels.output(x, bare, rows).double()
    only = replace(x, values=torch.zeros_like(x.values))
    low_rank = mlp.kernels.output(only, replace(layer, bias=bare.bias), rows).double()
    return product, low_rank, pack.unpack_vector(layer.bias).double()


def _scaled(mlp: Mlp, x: Quantized, layer: Layer, rows: int) -> Figures:
    factors = _factors(layer.outputs, layer.bias)
    plain = mlp.kernels.output(x, layer, rows).double()
    found = mlp.kernels.output(x, layer, rows, wcscales=pack.pack_vector(factors)).double() - plain
    product, low_rank, bias = _parts(mlp, x, layer, rows)
    more = factors.double() - 1
    return {
        "delta_if_the_sum_alone": relative(found, product * more),
        "delta_if_the_bias_too": relative(found, (product + bias) * more),
        "delta_if_low_ranks_too": relative(found, (product + low_rank) * more),
        "delta_if_all": relative(found, (product + low_rank + bias) * more),
    }


def _column_scales(mlp: Mlp, x: Tensor) -> Figures:
    return _scaled(mlp, mlp.kernels.quantize(x, mlp.first), mlp.first, len(x))


def _column_scales_unsigned(mlp: Mlp, x: Tensor) -> Figures:
    return _scaled(mlp, _between(mlp, x), mlp.second, len(x))


def _column_scales_fused(mlp: Mlp, x: Tensor) -> Figures:
    quantized = mlp.kernels.quantize(x, mlp.first)
    product, low_rank, bias = _parts(mlp, quantized, mlp.first, len(x))
    factors, hidden, plain = _factors(mlp.first.outputs, x), _hidden(mlp, x), _hidden(mlp, x)
    _between(mlp, x, hidden=plain)
    _between(mlp, x, hidden=hidden, wcscales=pack.pack_vector(factors))
    before = F.gelu(product + low_rank + bias, approximate="tanh")
    after = F.gelu(product * factors.double() + low_rank + bias, approximate="tanh")
    return {"delta_of_hidden": relative(hidden.double() - plain.double(), after - before)}


def _out_beside(mlp: Mlp, x: Tensor) -> Figures:
    hidden = _hidden(mlp, x)
    without, again, beside = _between(mlp, x), _between(mlp, x), _between(mlp, x, hidden=hidden)
    expected = F.gelu(mlp.first_output(x), approximate="tanh")
    return {
        "bytes_differing": differing(beside.values, without.values),
        "scales_differing": differing(beside.scales, without.scales),
        "low_rank_error": relative(beside.low_rank, without.low_rank),
        "low_rank_error_of_two_runs": relative(again.low_rank, without.low_rank),
        "hidden_against_gelu_of_the_layer": relative(hidden, expected),
        "hidden_differing": differing(hidden, expected),
    }


def _slices(mlp: Mlp, x: Tensor) -> Figures:
    layer, found = mlp.first, {}
    quantized = mlp.kernels.quantize(x, layer)
    whole = mlp.kernels.output(quantized, layer, len(x))
    fused = Quantized.empty(len(x), layer.outputs, mlp.second.down.shape[1], x.device)
    mlp.kernels.multiply(quantized, layer, following=mlp.second, into=fused)
    for rows in [rows for rows in (128, 768, 1024, 3072) if not layer.outputs % rows]:
        cuts = [(begin, begin + rows) for begin in range(0, layer.outputs, rows)]
        parts = [mlp.kernels.output(quantized, layer.rows(*cut), len(x)) for cut in cuts]
        intos = []
        for begin, end in cuts:
            into = Quantized.empty(len(x), rows, mlp.second.down.shape[1], x.device)
            after = replace(
                mlp.second, down=mlp.second.down[begin:end], smooth=mlp.second.smooth[begin:end]
            )
            mlp.kernels.multiply(quantized, layer.rows(begin, end), following=after, into=into)
            intos.append(into)
        found |= {
            f"{rows}: outputs_differing": differing(torch.cat(parts, dim=1), whole),
            f"{rows}: bytes_differing": differing(
                join_columns([into.values for into in intos]), fused.values
            ),
            f"{rows}: scales_differing": differing(
                join_scales([into.scales for into in intos]), fused.scales
            ),
            f"{rows}: low_rank_error": relative(
                torch.stack([into.low_rank for into in intos]).sum(dim=0), fused.low_rank
            ),
        }
    return found
