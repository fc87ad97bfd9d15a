"""The form in which a slot's layer stores its weight, told by names, dtypes and shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qwenlora.errors import UnknownWeightError
from qwenlora.model.values import base_value
from qwenlora.packing.layout import MODULATION_PLANES, RowOrder
from qwenlora.packing.pack import unpack_vector
from qwenlora.plan.documents import SlotKind
from qwenlora.weight.awq import AWQ_GROUP, AwqWeight, stored_rows
from qwenlora.weight.plain import PlainWeight
from qwenlora.weight.svdq import SvdqForm, SvdqWeight

if TYPE_CHECKING:
    from torch import Tensor

    from qwenlora.model.target import Target
    from qwenlora.weight.stored import StoredWeight

__all__ = ["stored_weight", "weight_tensors"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = {SvdqForm.INT4: _FLOATS, SvdqForm.FP4: (torch.float8_e4m3fn,)}
"""Dtypes of the scales by which the forms of SVDQuant's values are told apart."""
_FP8_SCALE = "scale_weight"
"""The factor that ComfyUI keeps on a linear whose weight it stores in 8 bits."""


def stored_weight(target: Target, device: torch.device) -> StoredWeight:
    """The weight of a slot's layer without its low-rank branch.

    Args:
        target: The slot.
        device: Where rows are given.

    Raises:
        UnknownWeightError: It is stored in a form that is not known.
    """
    if target.kind is SlotKind.SVDQ:
        return _svdq(target, device)
    if target.kind is SlotKind.AWQ:
        return _awq(target, device)
    if target.kind is SlotKind.LINEAR:
        return _linear(target, device)
    raise UnknownWeightError(f"`{target.path}` multiplies its input with no matrix")


def weight_tensors(target: Target) -> list[Tensor]:
    """The tensors of a slot's weight, as the layer holds them; of a norm its values."""
    if target.kind in (SlotKind.SVDQ, SlotKind.AWQ):
        names: tuple[str, ...] = ("qweight", "wscales", "wzeros", "smooth_factor", "wcscales")
    else:
        names = ("weight", _FP8_SCALE)
    own = (base_value(target.module, target.prefix + name) for name in names)
    return [tensor for tensor in own if isinstance(tensor, torch.Tensor)]


def _svdq(target: Target, device: torch.device) -> StoredWeight:
    rows, columns = target.row.out_features, target.row.in_features
    qweight, wscales = _tensor(target, "qweight"), _tensor(target, "wscales")
    smooth = _vector(target, "smooth_factor", columns, device)
    if _is(qweight, (rows, columns), torch.float32):
        return PlainWeight(qweight, device, smooth=smooth)
    for form, dtypes in _SCALES.items():
        is_form = _is(qweight, (rows, columns // 2), torch.int8)
        if is_form and _is(wscales, (columns // form.group, rows), *dtypes):
            factors = _row_factors(target, form, device)
            return SvdqWeight(form, qweight, wscales, smooth, device, row_factors=factors)
    raise _unknown(target, qweight=qweight, wscales=wscales)


def _awq(target: Target, device: torch.device) -> StoredWeight:
    rows, columns = target.row.out_features, target.row.in_features
    qweight = _tensor(target, "qweight")
    order = target.row_order
    if order is RowOrder.INTERLEAVED and rows % MODULATION_PLANES:
        raise _unknown(target, qweight=qweight)
    if _is(qweight, (rows, columns), torch.float32):
        return PlainWeight(qweight, device, stored_rows=stored_rows(rows, order))
    wscales, wzeros = _tensor(target, "wscales"), _tensor(target, "wzeros")
    by_group = (columns // AWQ_GROUP, rows)
    is_awq = (
        _is(qweight, (rows // 4, columns // 2), torch.int32)
        and _is(wscales, by_group, *_FLOATS)
        and _is(wzeros, by_group, *_FLOATS)
    )
    if is_awq:
        return AwqWeight(qweight, wscales, wzeros, device, order=order)
    raise _unknown(target, qweight=qweight, wscales=wscales, wzeros=wzeros)


def _linear(target: Target, device: torch.device) -> StoredWeight:
    shape = (target.row.out_features, target.row.in_features)
    weight = base_value(target.module, f"{target.prefix}weight")
    if not isinstance(weight, torch.Tensor):
        raise UnknownWeightError(f"`{target.path}` has no tensor `weight`")
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        raise UnknownWeightError(
            f"the weight of `{target.path}` is a {type(weight).__name__}, whose values are its"
            " class's own affair"
        )
    if not _is(weight, shape, *_FLOATS, *_FP8):
        raise _unknown(target, weight=weight)
    factor = getattr(target.module, _FP8_SCALE, None) if weight.dtype in _FP8 else None
    if isinstance(factor, torch.Tensor) and factor.numel() != 1:
        raise _unknown(target, weight=weight, scale_weight=factor)
    return PlainWeight(weight, device, factor=factor)


def _row_factors(target: Target, form: SvdqForm, device: torch.device) -> Tensor | None:
    """(N,) float32: what the kernel multiplies each row by; None for ones."""
    rows, factors = target.row.out_features, None
    if getattr(target.module, f"{target.prefix}wcscales", None) is not None:
        factors = _vector(target, "wcscales", rows, device)
    factor = _tensor_scale(target) if form is SvdqForm.FP4 else 1.0
    if factor == 1.0:
        return factors
    return factor * (torch.ones(rows, device=device) if factors is None else factors)


def _tensor_scale(target: Target) -> float:
    """The kernel's one factor on an nvfp4 weight.

    A fused module has none: its kernel is given 1, whatever the layer had that it was made of.
    """
    factor = getattr(target.module, f"{target.prefix}wtscale", None)
    if isinstance(factor, torch.Tensor) and factor.numel() == 1:
        return float(factor)
    if factor is None or isinstance(factor, (int, float)):
        return 1.0 if factor is None else float(factor)
    raise UnknownWeightError(f"`{target.path}` has a wtscale that is no number: {factor!r:.60}")


def _vector(target: Target, name: str, length: int, device: torch.device) -> Tensor:
    """(length,) float32 of a vector that is stored packed."""
    vector = _tensor(target, name)
    if not _is(vector, (length,), *_FLOATS):
        raise _unknown(target, **{name: vector})
    return unpack_vector(vector.detach().to(device)).float()


def _tensor(target: Target, name: str) -> Tensor:
    tensor = getattr(target.module, target.prefix + name, None)
    if not isinstance(tensor, torch.Tensor):
        raise UnknownWeightError(f"`{target.path}` has no tensor `{target.prefix}{name}`")
    return tensor


def _is(tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> bool:
    """Tell if a tensor is of this shape and of one of these dtypes, one value after the other."""
    return tuple(tensor.shape) == shape and tensor.dtype in dtypes and tensor.is_contiguous()


def _unknown(target: Target, **tensors: Tensor) -> UnknownWeightError:
    shown = [f"{name} is {tuple(own.shape)} {own.dtype}" for name, own in tensors.items()]
    return UnknownWeightError(
        f"the weight of `{target.path}` is stored in a form that is not known:"
        f" {', '.join(shown)}, for {target.row.out_features} x {target.row.in_features}"
    )
