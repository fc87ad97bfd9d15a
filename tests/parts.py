"""Parts beside a layer for tests: random ones, and what they mean as dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenlora.delta.parts import PartKind, PartShape, ScaledPart
from qwenlora.delta.slot_deltas import SlotDeltas
from qwenlora.emulation import AWQW4A16Linear, SVDQW4A4Linear
from qwenlora.packing import pack
from qwenlora.packing.layout import UNSIGNED_SHIFT, LowRankSide, RowOrder
from qwenlora.plan.documents import Route
from qwenlora.slots.whole import slot_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.model.target import Target

BLOCK = 16
"""Side of a rotation's blocks."""
STAGES = 2


@dataclass(frozen=True)
class Dense:
    """A layer's weight (N, K) and bias (N,), float64, rows as in files."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, target: Target) -> Dense:
        """What a layer of the emulation computes with."""
        module = target.module
        if isinstance(module, SVDQW4A4Linear):
            residual = module.residual().double() / pack.unpack_vector(module.smooth_factor)
            down = pack.unpack_lowrank(module.proj_down, LowRankSide.DOWN).double()
            up = pack.unpack_lowrank(module.proj_up, LowRankSide.UP).double()
            shift = UNSIGNED_SHIFT if module.act_unsigned else 0.0
            bias = pack.unpack_vector(module.bias).double() + shift * residual.sum(dim=1)
            return cls((residual + up @ down).detach(), bias.detach())
        weight = module.weight() if isinstance(module, AWQW4A16Linear) else module.weight
        weight, bias = weight.detach().double(), module.bias.detach().double()
        if target.row_order is RowOrder.INTERLEAVED:
            weight, bias = (pack.deinterleave_modulation(own) for own in (weight, bias))
        return cls(weight, bias)

    def output(self, x: Tensor) -> Tensor:
        """(M, K) to (M, N)."""
        return x.double() @ self.weight.mT + self.bias


def shape_of(kind: PartKind, columns: int, begin: int, count: int) -> PartShape:
    """A shape of this kind on these rows, with all tensors that it may have."""
    sizes = {
        PartKind.KRON: (count // 16, columns // 16, 16, 16, 1, 1),
        PartKind.DENSE: (columns,),
        PartKind.FACTOR: (),
        PartKind.INPUT_FACTOR: (columns,),
        PartKind.ROTATION: (count // BLOCK, BLOCK),
        PartKind.INPUT_ROTATION: (columns // BLOCK, BLOCK),
        PartKind.BUTTERFLY: (STAGES, count // BLOCK, BLOCK),
        PartKind.PASS: (columns // BLOCK, BLOCK),
    }
    return PartShape(kind, begin, count, sizes[kind])


def random_part(
    shape: PartShape, dense: Dense, dtype: torch.dtype, *, seed: int = 0, size: float = 0.1
) -> ScaledPart:
    """A part of this shape beside a layer."""
    generator = torch.Generator().manual_seed(seed)
    rows = slice(shape.row_begin, shape.row_begin + shape.row_count)

    def tensor(name: str, sizes: tuple[int, ...]) -> Tensor:
        if name == "bias":
            return dense.bias[rows].to(dtype)
        if name == "unscale":
            return torch.tensor(0.25)
        if name == "strength":
            return torch.tensor(0.7)
        values = torch.randn(sizes, generator=generator)
        return (size * values / max(1, sizes[-1] if len(sizes) > 1 else 1) ** 0.5).to(dtype)

    return ScaledPart(shape, {name: tensor(name, own) for name, own in shape.tensors.items()})


def delta_of(part: ScaledPart, dense: Dense) -> Dense:
    """What a part adds to a layer's weight and bias."""
    shape = part.shape
    own = {name: tensor.double() for name, tensor in part.tensors.items()}
    rows = slice(shape.row_begin, shape.row_begin + shape.row_count)
    weight, bias = torch.zeros_like(dense.weight), torch.zeros_like(dense.bias)
    base = dense.weight[rows]
    if shape.kind is PartKind.KRON:
        change = torch.kron(own["w1"], own["w2"])
        change = change * own.get("rows", torch.ones(len(change)).double())[:, None]
        change = change * own.get("columns", torch.ones(change.shape[1]).double())
    elif shape.kind is PartKind.DENSE:
        change = own["unscale"] * own["values"]
    elif shape.kind is PartKind.FACTOR:
        change = own["factor"][:, None] * base
    elif shape.kind is PartKind.INPUT_FACTOR:
        change = base * own["factor"]
    elif shape.kind is PartKind.ROTATION:
        change = torch.block_diag(*own["blocks"]) @ base
    elif shape.kind is PartKind.INPUT_ROTATION:
        change = base @ torch.block_diag(*own["blocks"]).mT
    elif shape.kind is PartKind.BUTTERFLY:
        change = own["strength"] * (
            (1 + own["rescale"])[:, None] * (_butterfly(own["stages"]) @ base) - base
        )
    else:
        turned = torch.eye(dense.weight.shape[1]).double() + torch.block_diag(*own["blocks"])
        change = own["factor"][:, None] * (base @ turned.mT)
    weight[rows] = change
    return Dense(weight, bias)


def _butterfly(stages: Tensor) -> Tensor:
    """The product of all stages as a matrix: LyCORIS turns rows (c, g, k) in order (c, k, g)."""
    size = stages.shape[1] * stages.shape[2]
    product = torch.eye(size).double()
    for index, stage in enumerate(stages):
        wide = 2**index * (stages.shape[2] // 2)
        groups = torch.arange(size).view(-1, 2, wide)
        order = [int(group[g, k]) for group in groups for k in range(wide) for g in range(2)]
        permutation = torch.eye(size).double()[order]
        turn = torch.eye(size).double() + torch.block_diag(*stage)
        product = permutation.mT @ turn @ permutation @ product
    return product


def sum_of(parts: Sequence[ScaledPart], dense: Dense) -> Dense:
    """The layer with all of these parts."""
    deltas = [delta_of(part, dense) for part in parts]
    weight = dense.weight + sum(delta.weight for delta in deltas)
    return Dense(weight, dense.bias + sum(delta.bias for delta in deltas))


def install(
    target: Target,
    parts: Sequence[ScaledPart],
    *,
    room: Sequence[PartShape] | None = None,
    route: Route = Route.BESIDE,
    **more: object,
) -> None:
    """Put parts beside a layer."""
    parts = tuple(sorted(parts, key=lambda part: part.shape))
    room = tuple(sorted(part.shape for part in parts)) if room is None else tuple(sorted(room))
    deltas = SlotDeltas(target, parts=parts, room=room, route=route, **more)
    slot_of(target).prepare(deltas).make()


def logical(target: Target, output: Tensor) -> Tensor:
    """A layer's output with its rows as in files."""
    if target.row_order is RowOrder.INTERLEAVED:
        return pack.deinterleave_modulation(output, dim=-1)
    return output
