"""Tensors that lie in one allocation, each with a storage that holds its elements alone.

Views share the storage of their base tensor, and many tools work on whole storages: deep copies of
buffers and `torch.save` copy all of it, `safetensors.torch.save_model` refuses a part, and
accelerate drops all but one of the tensors in it. DLPack makes storages of parts, each of which
keeps the allocation alive.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["evenly", "is_part", "rest_from", "split"]


_KNOWN: dict[int, weakref.ref[Tensor]] = {}
"""Tensors that were split, by address; each lives as long as a part of it does."""


def split(whole: Tensor) -> list[Tensor]:
    """The parts (...) of a contiguous (n, ...), each with its own storage in the same memory."""
    root = whole if whole._base is None else whole._base
    begin = root.data_ptr()

    def forget(dead: weakref.ref[Tensor]) -> None:
        # By then the address may be another's.
        if _KNOWN.get(begin) is dead:
            del _KNOWN[begin]

    _KNOWN[begin] = weakref.ref(root, forget)
    return [from_dlpack(to_dlpack(part)) for part in whole.unbind()]


def rest_from(address: int, end: int, like: Tensor) -> Tensor | None:
    """A flat tensor of the memory from an address on, where all of it lies in what was split.

    Args:
        address: Of the first element.
        end: Past the last one that is meant; the tensor holds at least what lies before it.
        like: Gives the dtype and the device.
    """
    # A list of numbers is made in one step. While one of pairs is made the collector may run, which
    # calls `forget` in the midst of the dictionary.
    for begin in list(_KNOWN):
        known = _KNOWN.get(begin)
        root = known() if known is not None and begin <= address else None
        if root is not None and end <= begin + root.nbytes and root.device == like.device:
            flat = root.detach().view(-1).view(like.dtype)
            return flat[(address - begin) // like.itemsize :]
    return None


def is_part(tensor: Tensor) -> bool:
    """Tell if a tensor is a part of what was split, and so keeps more than itself alive."""
    begin = tensor.data_ptr()
    return rest_from(begin, begin + tensor.nbytes, tensor) is not None


def evenly(tensors: Sequence[Tensor]) -> int | None:
    """Elements from each of at least two tensors of one size to the next, where all are alike."""
    first, last = tensors[0], tensors[-1]
    begins = [tensor.data_ptr() for tensor in tensors]
    if len(tensors) < 2 or first.shape != last.shape:
        return None
    step = begins[1] - begins[0]
    if step < first.nbytes or begins != [*range(begins[0], begins[-1] + 1, step)]:
        return None
    return step // first.itemsize
