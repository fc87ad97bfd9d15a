"""The SVDQuant linear: int4 weights and a packed low-rank branch that deltas join."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, cast

from qwenlora.errors import ModelStateError
from qwenlora.model.forwards import RANK, ranks_read
from qwenlora.model.target import PACKED_DTYPES, LowRankPlace
from qwenlora.packing.layout import CHANNEL_MULTIPLE, RANK_MULTIPLE, RowOrder
from qwenlora.packing.pack import pack_vector
from qwenlora.plan.documents import SlotKind
from qwenlora.slots.branch import SideBranchSlot
from qwenlora.slots.kind import LayerFacts, LayerKind
from qwenlora.slots.packed import PackedSlot
from qwenlora.slots.value import ValueSlot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenlora.model.target import Target
    from qwenlora.slots.kind import Found
    from qwenlora.slots.slot import Slot

__all__ = ["SVDQ"]


def _facts(found: Found) -> LayerFacts | None:
    if not found.has_tensors("proj_down", "proj_up", "qweight"):
        return None
    path, base_rank = found.path, found.base_rank
    down, up = (cast("Tensor", found.tensors[name]) for name in ("proj_down", "proj_up"))
    inputs, ranks = _packed_shape(path, "proj_down", down)
    outputs, up_ranks = _packed_shape(path, "proj_up", up)
    is_alike = ranks == up_ranks or found.in_flight
    ranks = min(ranks, up_ranks)
    if not is_alike or down.dtype != up.dtype or down.device != up.device:
        raise ModelStateError(
            f"`{path}`: proj_down is {_show(down)} and proj_up {_show(up)}\nhint: reload the model"
        )
    rank = ranks if base_rank is None else base_rank
    if not 0 < rank <= ranks:
        raise ModelStateError(
            f"`{path}` has rank {ranks}, less than the {rank} of its base: something else"
            " changed it\nhint: reload the model"
        )
    return LayerFacts(down.dtype, inputs, outputs, rank)


def _packed_shape(path: str, name: str, tensor: Tensor) -> Sequence[int]:
    """(channels, rank), checked: the kernels assume it, and would abort or return garbage."""
    shape = tensor.shape
    fits = (
        len(shape) == 2
        and shape[0] % CHANNEL_MULTIPLE == 0
        and shape[1] % RANK_MULTIPLE == 0
        and shape[1] > 0
        and tensor.dtype in PACKED_DTYPES
        and tensor.is_contiguous()
        and not tensor.is_meta
    )
    if not fits:
        raise ModelStateError(
            f"`{path}.{name}` is {_show(tensor)}: expected a contiguous (channels, rank) of"
            f" multiples of {CHANNEL_MULTIPLE} and {RANK_MULTIPLE} in float16 or bfloat16"
        )
    return shape


def _show(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


_PLACE = LowRankPlace(down="proj_down", up="proj_up")
_SIZED_PLACE = _PLACE._replace(rank=RANK)


def _place(found: Found) -> LowRankPlace:
    """Nunchaku's forward takes the rank from the tensors, diffusers' from an attribute.

    An attribute that says another rank than the tensors of a base is not the one that is read.
    """
    if found.prefix:
        return _place_under(found.prefix)
    reads = ranks_read(found.module)
    if reads is None or RANK not in reads.own:
        return _PLACE
    rank = found.module.__dict__.get(RANK)
    is_base = found.base_rank is None and not found.in_flight
    if not isinstance(rank, int) or (
        is_base and rank != cast("Tensor", found.tensors["proj_down"]).shape[1]
    ):
        return _PLACE
    return _SIZED_PLACE


@lru_cache(maxsize=16)
def _place_under(prefix: str) -> LowRankPlace:
    """The place of a layer inside a fused module, whose kernel takes the rank from the tensors."""
    return LowRankPlace(down=f"{prefix}proj_down", up=f"{prefix}proj_up")


def _parts(target: Target) -> Sequence[Slot]:
    """Ranks join the packed branch, Kronecker products a side branch; a bias is a stored value."""
    return [PackedSlot(target), SideBranchSlot(target), ValueSlot(target, pack_vector)]


SVDQ = LayerKind(
    kind=SlotKind.SVDQ,
    telling="qweight",
    facts=_facts,
    parts=_parts,
    row_order=RowOrder.PLANAR,
    place=_place,
)
