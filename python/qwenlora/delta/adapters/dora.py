"""DoRA: a weight with a delta, its rows or columns brought to stored lengths.

V = W + s D, and W' is V with every row (side OUT) or column (side IN) scaled to a stored magnitude
m: by g = m / |V_i|, or by c = m / |V_j|. That is how PEFT, LyCORIS, ai-toolkit and OneTrainer train
it; the small numbers that some add to the norm are below rounding. So

    W' - W = (g - 1) W + g s D   or   W (c - 1) + s D c,

a diagonal, and the delta with its rows or columns scaled. V is never formed:

    |V_i|^2 = |W_i|^2 + 2 s <W_i, D_i> + s^2 |D_i|^2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwenlora.delta.adapters.adapter import wide
from qwenlora.delta.adapters.lokr import kron_factors
from qwenlora.delta.adapters.table import adapter_named
from qwenlora.delta.diagonal import DiagonalDelta
from qwenlora.delta.finite import damaged, is_finite
from qwenlora.errors import NonFiniteError
from qwenlora.plan.documents import Side

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from qwenlora.delta.adapters.weight import Weight
    from qwenlora.delta.factors import Factors

__all__ = ["Decomposed", "KronFactors", "Place", "as_kron", "as_pair"]


class KronFactors(NamedTuple):
    """A Kronecker product with factors on its rows or columns, without the scale."""

    w1: Tensor
    """(ol, im)."""
    w2: Tensor
    """(ok, il)."""
    rows: Tensor | None
    """(ol ok) float32."""
    columns: Tensor | None
    """(im il) float32."""


@dataclass(frozen=True)
class Place:
    """Where a DoRA acts.

    Attributes:
        module: Its name, for errors.
        side: Whether its magnitudes are of rows or of columns.
        row_begin: First logical row that it changes.
        row_count: How many.
    """

    module: str
    side: Side
    row_begin: int
    row_count: int


@dataclass(frozen=True)
class Decomposed:
    """W' - W, strength-free.

    Attributes:
        diagonal: (g - 1) on rows, or (c - 1) on columns.
        pair: D with its rows or columns scaled, without the scale s; None where it is a product.
        kron: The same as a Kronecker product; None where it is a pair.
    """

    diagonal: DiagonalDelta
    pair: Factors | None = None
    kron: KronFactors | None = None


def as_pair(
    tensors: Mapping[str, Tensor],
    weight: Weight,
    place: Place,
    *,
    scale: float,
    norms: Tensor | None = None,
    budget: int | None = None,
) -> Decomposed:
    """A DoRA whose delta is executed as rank: a LoRA, LoHa or LoKr.

    Args:
        tensors: `dora_scale`, m: one magnitude for each row or column, in any shape; and the inner
            delta's tensors by role, flattened to matrices.
        weight: The layer's weight.
        place: Where it acts.
        scale: s, the factor on the inner delta.
        norms: Float64 squared norms of the rows or columns of the weight that it was trained on;
            None where they are estimated from `weight`.
        budget: Most ranks of the inner delta; None where its exact pair is wanted.

    Returns:
        The diagonal, and the pair in float32 (float64 where it is stored so).

    Raises:
        NonFiniteError: A value is NaN or infinite, or a row or column of V is zero.
    """
    inner = _inner(tensors, place)
    adapter = adapter_named(_name(inner))
    device = next(iter(inner.values())).device
    if adapter.name == "lora":
        factors = adapter.factors(inner, None, device)
        added = _of_pair(factors, weight, place, scale)
    else:
        factors = adapter.factors(inner, budget, device)
        added = _of_rows(inner, weight, place, scale)
    ratio = _ratio(tensors["dora_scale"], weight, place, norms, added)
    return Decomposed(_diagonal(ratio, place), pair=_scaled(factors, ratio, place.side))


def as_kron(
    tensors: Mapping[str, Tensor],
    weight: Weight,
    place: Place,
    *,
    scale: float,
    norms: Tensor | None = None,
) -> Decomposed:
    """A DoRA whose inner LoKr runs beside the layer as the product that it is.

    Arguments and errors are those of `as_pair`.

    Returns:
        The diagonal, and the product with its own factors on rows or columns.
    """
    inner = _inner(tensors, place)
    added = _of_rows(inner, weight, place, scale)
    ratio = _ratio(tensors["dora_scale"], weight, place, norms, added)
    w1, w2 = kron_factors(inner)
    own = ratio.to(torch.float32)
    rows, columns = (own, None) if place.side is Side.OUT else (None, own)
    return Decomposed(_diagonal(ratio, place), kron=KronFactors(w1, w2, rows, columns))


def _inner(tensors: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    if not all(map(is_finite, tensors.values())):
        raise damaged(place.module, "its dora")
    return {role: tensor for role, tensor in tensors.items() if role != "dora_scale"}


def _name(inner: Mapping[str, Tensor]) -> str:
    """The adapter that these roles are of."""
    if any(role.startswith("lokr_") for role in inner):
        return "lokr"
    return "loha" if "hada_w1_a" in inner else "lora"


def _of_pair(factors: Factors, weight: Weight, place: Place, scale: float) -> Tensor:
    """What s D adds to the squared norms of rows (n,) or columns (K,), float64, of D = B A.

    Of rows 2 s (W A^T)_i B_i + s^2 B_i (A A^T) B_i^T, of columns the same with W^T B and B^T B.
    """
    at = (place.row_begin, place.row_count)
    if place.side is Side.OUT:
        product = weight.times(factors.down.mT.to(torch.float32), *at)  # (n, r)
        own, other = factors.up, factors.down.mT
    else:
        product = weight.times_left(factors.up.to(torch.float32), *at).mT  # (K, r)
        own, other = factors.down.mT, factors.up
    own, other = (half.to(product.device, torch.float64) for half in (own, other))
    cross = (product.double() * own).sum(dim=1)
    square = ((own @ (other.mT @ other)) * own).sum(dim=1)
    return 2 * scale * cross + scale**2 * square


def _of_rows(inner: Mapping[str, Tensor], weight: Weight, place: Place, scale: float) -> Tensor:
    """The same of a delta that is no pair: some of its rows are formed at a time."""
    adapter = adapter_named(_name(inner))
    on_device: Mapping[str, Tensor] = inner
    axis = 1 if place.side is Side.OUT else 0
    sums: list[Tensor] = []
    for first, panel in weight.panels(place.row_begin, place.row_count):
        if next(iter(on_device.values())).device != panel.device:
            on_device = {role: tensor.to(panel.device) for role, tensor in inner.items()}
        rows = torch.arange(len(panel), device=panel.device) + (first - place.row_begin)
        delta = adapter.rows(on_device, rows).double()
        sums.append((delta * (2 * scale * panel.double() + scale**2 * delta)).sum(dim=axis))
    return torch.cat(sums) if axis else torch.stack(sums).sum(dim=0)


def _ratio(
    magnitude: Tensor, weight: Weight, place: Place, norms: Tensor | None, added: Tensor
) -> Tensor:
    """The factors m / |V| in float64, on the magnitude's device; 1 where both are zero.

    Raises:
        NonFiniteError: A norm is zero, or is not finite.
    """
    if norms is None:
        measure = weight.row_norms if place.side is Side.OUT else weight.column_norms
        norms = measure(place.row_begin, place.row_count)
    wanted = magnitude.flatten().double()
    squared = norms.to(wanted.device) + added.to(wanted.device)
    empty = (squared == 0) & (wanted == 0)
    ratio = torch.where(empty, torch.ones_like(wanted), wanted / squared.sqrt())
    bad = ~torch.isfinite(ratio)
    if bool(bad.any()):
        raise _no_norm(place, int(bad.nonzero()[0]), float(squared[bad][0]))
    return ratio


def _no_norm(place: Place, index: int, squared: float) -> NonFiniteError:
    axis = "row" if place.side is Side.OUT else "column"
    what = "0" if squared == 0 else f"the root of {squared}"
    return NonFiniteError(
        f"`{place.module}`: its dora divides by the norm of {axis} {index}, which is {what}"
        "\nhint: the LoRA is damaged, or was trained on another model"
    )


def _diagonal(ratio: Tensor, place: Place) -> DiagonalDelta:
    return DiagonalDelta(
        side=place.side,
        row_begin=place.row_begin,
        row_count=place.row_count,
        values=(ratio - 1).to(torch.float32),
    )


def _scaled(factors: Factors, ratio: Tensor, side: Side) -> Factors:
    """The pair with rows of `up`, or columns of `down`, scaled; what was cut is at most so."""
    most = float(ratio.abs().max()) ** 2
    up, down = wide(factors.up), wide(factors.down)
    if side is Side.OUT:
        up = (up.double() * ratio.unsqueeze(1)).to(up.dtype)
    else:
        down = (down.double() * ratio).to(down.dtype)
    energy = None if factors.energy is None else factors.energy * most
    return replace(factors, up=up, down=down, energy_lost=factors.energy_lost * most, energy=energy)
