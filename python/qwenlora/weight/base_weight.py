"""The weight that a slot's layer computes with in the base."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from qwenlora.model.values import base_value
from qwenlora.packing.layout import UNSIGNED_SHIFT, RowOrder
from qwenlora.packing.pack import deinterleave_modulation, unpack_vector
from qwenlora.plan.documents import SlotKind
from qwenlora.weight.branch import BaseBranch
from qwenlora.weight.forms import stored_weight, weight_tensors
from qwenlora.weight.kept import shelf
from qwenlora.weight.norms import add_column_norms, row_norms

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from torch import Tensor

    from qwenlora.model.target import Target
    from qwenlora.weight.kept import KeptNorms

__all__ = ["BaseWeight", "weight_identity"]


_PANEL_BYTES = {"cpu": 4 << 20}
_DEVICE_PANEL_BYTES = 80 << 20
"""Bytes of one float32 panel on a GPU; unpacking it takes up to four times as much."""
_MOSTLY_NOISE = 0.5
"""Where rounding makes up more than this share of a norm, the estimate of it is not used."""


class BaseWeight:
    """W of y = W x + b, where x is the layer's raw input.

    Rows are in the order of files. What LoRAs add is not in it: of a low-rank branch the ranks of
    the base count, and of stored values the base's.

    Attributes:
        path: The slot's path.
        rows_total: N.
        columns: K.
        device: Where results are.
    """

    def __init__(self, target: Target, device: torch.device) -> None:
        """See `of`."""
        self._target = target
        self.path = target.path
        self.rows_total = target.row.out_features
        self.columns = target.row.in_features
        self.device = device
        self._stored = stored_weight(target, device)
        self._kept = _kept(target)

    @classmethod
    def of(cls, target: Target, *, device: torch.device | None = None) -> BaseWeight:
        """The weight of a slot's layer.

        Args:
            target: The slot.
            device: Where to compute with tensors that are in host memory; None for the CPU.
                Tensors on a device are computed with there.

        Raises:
            UnknownWeightError: The layer stores it in a form that is not known.
        """
        own = target.owner
        held = next((tensor.device for tensor in own.parameters(recurse=False)), target.device)
        if held.type == "cpu" and device is not None:
            held = device
        return cls(target, held)

    @cached_property
    def _branch(self) -> BaseBranch | None:
        return BaseBranch.of(self._target, self.device)

    @property
    def identity(self) -> Hashable:
        """What tells the values of this weight from those of any other, in this process.

        The key of what is derived from it. A layer whose weight changes gets another one.
        """
        return self._kept.number

    def rows(self, begin: int, count: int) -> Tensor:
        """(count, K) float32: these rows of W."""
        rows = self._stored.rows(begin, count)
        if self._branch is None:
            return rows
        # A quantized layer has no rows of its own that this could write to.
        return rows.addmm_(self._branch.up[begin : begin + count], self._branch.down)

    def panels(self, begin: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """These rows of W piece by piece: the first row of each piece, and the piece."""
        for first, rows in self._spans(begin, count):
            yield first, self.rows(first, rows)

    def row_norms(self, begin: int, count: int) -> Tensor:
        """(count,) float64: the squared norm of each of these rows.

        The energy that rounding to 4 bits has added is taken off: step²/12 per element. What was
        computed is kept as float32 while the layer's weight is the same.
        """
        key = ("rows", begin, count)
        return shelf.norms(self._kept, key, self.device, lambda: self._row_norms(begin, count))

    def column_norms(self, begin: int, count: int) -> Tensor:
        """(K,) float64: the squared norm of each column over these rows, likewise."""
        key = ("columns", begin, count)
        return shelf.norms(self._kept, key, self.device, lambda: self._column_norms(begin, count))

    def times(self, x: Tensor, begin: int, count: int) -> Tensor:
        """Multiply these rows of W by a matrix.

        Args:
            x: (K, r), any float dtype.
            begin: First row.
            count: Rows.

        Returns:
            (count, r) float32.
        """
        x = x.to(self.device, torch.float32)
        spans = self._spans(begin, count)
        product = torch.cat([self._stored.rows(first, rows) @ x for first, rows in spans])
        if self._branch is None:
            return product
        return torch.addmm(product, self._branch.up[begin : begin + count], self._branch.down @ x)

    def times_left(self, b: Tensor, begin: int, count: int) -> Tensor:
        """Multiply a matrix by these rows of W: Bᵀ W.

        Args:
            b: (count, r), any float dtype.
            begin: First row.
            count: Rows.

        Returns:
            (r, K) float32.
        """
        left = b.to(self.device, torch.float32).T  # (r, count)
        product = torch.zeros((left.shape[0], self.columns), device=self.device)
        for first, rows in self._spans(begin, count):
            own = left[:, first - begin : first - begin + rows]
            product.addmm_(own, self._stored.rows(first, rows))
        if self._branch is None:
            return product
        return product.addmm_(left @ self._branch.up[begin : begin + count], self._branch.down)

    def true_bias(self) -> Tensor | None:
        """(N,) float32: the layer's output where its input is zero; None where it has no bias.

        A layer that takes its input shifted, to be quantized without a sign, stores a bias that
        makes up for the shift. That is undone here.
        """
        target = self._target
        stored = base_value(target.module, f"{target.prefix}bias")
        if stored is None:
            return None
        bias = stored.detach().to(self.device).float()
        if target.kind is SlotKind.SVDQ:
            bias = unpack_vector(bias)
        elif target.row_order is RowOrder.INTERLEAVED:
            bias = deinterleave_modulation(bias)
        if not getattr(target.module, "act_unsigned", False):
            return bias
        sums = shelf.norms(self._kept, ("sums", 0, self.rows_total), self.device, self._row_sums)
        return (bias.double() + UNSIGNED_SHIFT * sums).float()

    def _row_sums(self) -> Tensor:
        """(N,) float64: the sum of each row of W without the low-rank branch."""
        sums = [
            self._stored.rows(first, rows).sum(dim=1, dtype=torch.float64)
            for first, rows in self._spans(0, self.rows_total)
        ]
        return torch.cat(sums)

    def _row_norms(self, begin: int, count: int) -> Tensor:
        norms = [row_norms(rows) for _, rows in self.panels(begin, count)]
        steps = self._stored.steps(begin, count)
        return _debiased(torch.cat(norms), None if steps is None else steps.row_noise())

    def _column_norms(self, begin: int, count: int) -> Tensor:
        norms = torch.zeros(self.columns, dtype=torch.float64, device=self.device)
        for _, rows in self.panels(begin, count):
            add_column_norms(norms, rows)
        steps = self._stored.steps(begin, count)
        return _debiased(norms, None if steps is None else steps.column_noise())

    def _spans(self, begin: int, count: int) -> Iterator[tuple[int, int]]:
        """Rows in pieces of bounded memory that end where reading is cheap: (first, rows)."""
        limit = _PANEL_BYTES.get(self.device.type, _DEVICE_PANEL_BYTES)
        step = self._stored.alignment
        step = max(limit // (4 * self.columns) // step, 1) * step
        first, end = begin, begin + count
        while first < end:
            last = min((first // step + 1) * step, end)
            yield first, last - first
            first = last


def weight_identity(target: Target) -> Hashable:
    """`BaseWeight.identity` of a slot's layer; also of a norm, whose weight is no matrix."""
    return _kept(target).number


def _kept(target: Target) -> KeptNorms:
    return shelf.of(target.module, target.prefix, weight_tensors(target))


def _debiased(norms: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None:
        return norms
    return torch.where(noise > _MOSTLY_NOISE * norms, norms, norms - noise)
