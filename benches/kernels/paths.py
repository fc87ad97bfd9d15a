"""The ways through Qwen-Image's fused MLP, and what each can carry beside the layers' ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layer import DTYPE, Kernels, Layer, Quantized
from kernels.layouts import (
    GROUP,
    ROWS,
    join_columns,
    join_scales,
    pack_low_rank,
    padded,
)
from qwenlora.packing import pack
from qwenlora.packing.layout import UNSIGNED_SHIFT, LowRankSide
from qwenlora.slots.parts.product import kron_product
from qwenlora.slots.unsigned import quantize_unsigned

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_RANKS = 1024
"""What the kernels take."""


@dataclass(frozen=True)
class Kron:
    """The factors of a Kronecker product, (ol, im) and (ok, il)."""

    w1: Tensor
    w2: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(M, im il) to (M, ol ok)."""
        return kron_product(x, self.w1, self.w2)

    def dense(self) -> Tensor:
        """(ol ok, im il) float64."""
        return torch.kron(self.w1.double(), self.w2.double())


@dataclass(frozen=True)
class Mlp:
    """Both layers of an MLP, C to H channels and back, over one set of kernels."""

    kernels: Kernels
    first: Layer
    second: Layer

    def fused(self, x: Tensor, *, hidden: Tensor | None = None) -> Tensor:
        """As Nunchaku runs it: (M, C) to (M, C). `hidden` (M, H) takes what is behind GELU."""
        between = Quantized.empty(len(x), self.first.outputs, self.second.down.shape[1], x.device)
        self.kernels.multiply(
            self.kernels.quantize(x, self.first),
            self.first,
            out=hidden,
            following=self.second,
            into=between,
        )
        return self.kernels.output(between, self.second, len(x))

    def first_output(self, x: Tensor) -> Tensor:
        """(M, C) to (M, H), before GELU."""
        return self.kernels.output(self.kernels.quantize(x, self.first), self.first, len(x))


class FusedWithHidden:
    """The fused kernel writes what is behind GELU, too: for a product beside the second layer."""

    def __init__(self, mlp: Mlp, *, second: Kron | None = None) -> None:
        self._mlp = mlp
        self._second = second

    def __call__(self, x: Tensor) -> Tensor:
        hidden = torch.empty(len(x), self._mlp.first.outputs, dtype=DTYPE, device=x.device)
        out = self._mlp.fused(x, hidden=hidden)
        return out if self._second is None else out.add_(self._second(hidden))


class Sliced:
    """The first layer in slices of its rows, each with ranks of its own.

    Rows `i ok ...` of `kron(w1, w2)` are `w2` times `sum_j w1[i, j] X_j`. So a slice of `count`
    rows of `w1` is a product of `count * il` ranks, whose activation one small product gives.
    """

    def __init__(self, mlp: Mlp, first: Kron, count: int, *, second: Kron | None = None) -> None:
        self._mlp = mlp
        self._first = first
        self._second = second
        self._ranks = count * first.w2.shape[1]
        self._rows = count * first.w2.shape[0]
        if self._ranks + mlp.first.up.shape[1] > MOST_RANKS or self._rows % 128:
            raise ValueError(f"slices of {self._rows} rows and {self._ranks} ranks do not run")
        block = torch.block_diag(*[first.w2] * count)  # (count ok, count il)
        self._up = pack.pack_lowrank(block, LowRankSide.UP).view(self._rows // 16, -1)

    def __call__(self, x: Tensor) -> Tensor:
        mlp, layer, rows = self._mlp, self._mlp.first, self._rows
        quantized = mlp.kernels.quantize(x, layer)
        w1, w2 = self._first.w1, self._first.w2
        # (ol, im) @ (M, im, il) -> (M, ol il)
        mixed = torch.matmul(w1, x.view(len(x), w1.shape[1], w2.shape[1])).flatten(1)
        own = pack_low_rank(padded(mixed).float()).view(-1, mixed.shape[1] // 16, 16 * 256)
        hidden = None
        if self._second is not None:
            hidden = torch.empty(len(x), layer.outputs, dtype=DTYPE, device=x.device)
        parts = []
        for number, begin in enumerate(range(0, layer.outputs, rows)):
            cut = layer.rows(begin, begin + rows)
            up = torch.cat([cut.up.view(rows // 16, -1), self._up], dim=1).view(rows, -1)
            tiles = slice(number * self._ranks // 16, (number + 1) * self._ranks // 16)
            added = own[:, tiles].reshape(len(quantized.low_rank), -1)
            low_rank = join_columns([quantized.low_rank, added])
            into = Quantized.empty(len(x), rows, mlp.second.down.shape[1], x.device)
            part = None if hidden is None else torch.empty_like(hidden[:, :rows]).contiguous()
            mlp.kernels.multiply(
                replace(quantized, low_rank=low_rank),
                replace(cut, up=up),
                out=part,
                following=replace(
                    mlp.second,
                    down=mlp.second.down[begin : begin + rows],
                    smooth=mlp.second.smooth[begin : begin + rows],
                ),
                into=into,
            )
            if hidden is not None:
                hidden[:, begin : begin + rows] = part
            parts.append(into)
        joined = Quantized(
            join_columns([part.values for part in parts]),
            join_scales([part.scales for part in parts]),
            torch.stack([part.low_rank for part in parts]).sum(dim=0),
        )
        out = mlp.kernels.output(joined, mlp.second, len(x))
        return out if hidden is None else out.add_(self._second(hidden))  # type: ignore[misc]


class Open:
    """The first layer as a layer, GELU, and a quantizer in PyTorch for the second.

    The quantizer takes all rows at once, or some at a time, which holds less meanwhile.
    """

    def __init__(
        self,
        mlp: Mlp,
        *,
        first: Kron | None = None,
        second: Kron | None = None,
        compiled: bool = False,
        piece: int | None = None,
    ) -> None:
        self._mlp = mlp
        self._first = first
        self._second = second
        self._piece = piece
        self._smooth = pack.unpack_vector(mlp.second.smooth)
        self._down = pack.unpack_lowrank(mlp.second.down, LowRankSide.DOWN).contiguous()
        self._quantize: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = quantize_unsigned
        if compiled:
            self._quantize = torch.compile(quantize_unsigned)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = _opened(self._mlp, x, self._first)
        pieces = padded(hidden).split(self._piece or len(x) + ROWS)
        found = [self._quantize(piece, self._smooth) for piece in pieces]
        low_rank = pack_low_rank(padded(F.linear(hidden, self._down)).float())
        groups = hidden.shape[1] // GROUP
        # Blocks of rows lie behind each other, whatever the shapes say.
        values = torch.cat([own.flatten() for own, _ in found]).view(-1, hidden.shape[1] // 2)
        scales = torch.cat([own.flatten() for _, own in found]).view(groups, -1)
        between = Quantized(values, scales, low_rank)
        out = self._mlp.kernels.output(between, self._mlp.second, len(x))
        return out if self._second is None else out.add_(self._second(hidden))


class OpenCentred:
    """The same over Nunchaku's own quantizer, which is signed: each group less its middle.

    The middles go through the sums of the weight's groups, which are a product of `H / 64` ranks.
    """

    def __init__(self, mlp: Mlp, *, first: Kron | None = None, second: Kron | None = None) -> None:
        self._mlp = mlp
        self._first = first
        self._second = second
        layer = mlp.second
        self._smooth = pack.unpack_vector(layer.smooth)
        self._down = pack.unpack_lowrank(layer.down, LowRankSide.DOWN).contiguous()
        self._up = pack.unpack_lowrank(layer.up, LowRankSide.UP).contiguous()
        residual = layer.residual()
        bias = pack.unpack_vector(layer.bias).double() + UNSIGNED_SHIFT * residual.sum(dim=1)
        smoothed = residual * self._smooth.double()
        self._sums = smoothed.view(layer.outputs, -1, GROUP).sum(dim=-1).to(DTYPE)  # (C, H/64)
        self._signed = replace(
            layer,
            bias=pack.pack_vector(bias.to(DTYPE)),
            smooth=torch.ones_like(layer.smooth),
            down=torch.zeros_like(layer.down[:, :16]).contiguous(),
            up=torch.zeros_like(layer.up[:, :16]).contiguous(),
            act_unsigned=False,
        )

    def __call__(self, x: Tensor) -> Tensor:
        hidden = _opened(self._mlp, x, self._first)
        smoothed = (hidden / self._smooth).view(len(x), -1, GROUP)
        low, high = torch.aminmax(smoothed, dim=-1)
        middle = ((low.float() + high.float()) / 2).to(DTYPE)  # (M, H/64)
        centred = (smoothed - middle[..., None]).view_as(hidden)
        quantized = self._mlp.kernels.quantize(centred, self._signed)
        out = self._mlp.kernels.output(quantized, self._signed, len(x))
        out.addmm_(middle, self._sums.mT)
        out.addmm_(F.linear(hidden, self._down), self._up.mT)
        return out if self._second is None else out.add_(self._second(hidden))


def _opened(mlp: Mlp, x: Tensor, first: Kron | None) -> Tensor:
    hidden = mlp.first_output(x)
    if first is not None:
        hidden.add_(first(x))
    return F.gelu(hidden, approximate="tanh")
